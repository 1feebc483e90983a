"""What the built-in models can do: every evaluation of results/mini-pretraining, and its page.

python benchmarks/mini_models.py [--jobs 2]     resumes; --page only writes README.md again
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "results" / "mini-pretraining"
MODELS = ("student", "teacher")
BOTH = ("--task", "scienceqa:test", "--task", "mmbench:dev")
PICTURES = ("--task", "scienceqa:test:image")
LETTERS = ("--protocol", "scienceqa=llava-sqa", "--protocol", "mmbench=llava-mmbench")
WRITTEN = ("--task", "scienceqa:test", "--mode", "generate", "--limit", "600")
EVALUATIONS = {  # name -> (what it is, arguments)
    "options": ("options' texts scored (protocol `qatbench`)", BOTH),
    "letters": ("letters scored (`llava-sqa`, `llava-mmbench`)", (*BOTH, *LETTERS)),
    "generate": ("answer written, matched with an option (`qatbench`)",
                 WRITTEN),
    "generate-letters": ("letter written (`llava-sqa`)",
                         (*WRITTEN, *LETTERS[:2])),
    "no-pictures": ("picture questions without their pictures", (*PICTURES, "--images", "none")),
    "shuffled": ("picture questions with another question's", (*PICTURES, "--images", "shuffled")),
}  # fmt: skip


def main() -> None:
    """Run what is missing, then write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--page", action="store_true")
    given = parser.parse_args()
    if not given.page:
        wanted = [(model, name) for model in MODELS for name in EVALUATIONS]
        with ThreadPoolExecutor(given.jobs) as pool:
            list(pool.map(lambda pair: _evaluate(*pair, given.jobs), wanted))
    (OUT / "README.md").write_text(page(OUT), encoding="utf-8")


def _evaluate(model: str, name: str, jobs: int) -> None:
    command = [sys.executable, "-m", "qatbench", "eval", f"mini/{model}", *EVALUATIONS[name][1],
               "--data", "scienceqa=mini", "--dtype", "float32", "--resume",
               "--out", str(OUT / model / name)]  # fmt: skip
    if "mmbench:dev" in command:
        command += ["--data", "mmbench=mini"]
    threads = str(max(1, (os.cpu_count() or 1) // jobs))
    subprocess.run(command, check=True, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": threads})


def page(folder: Path) -> str:
    """README.md of the folder, from the metrics and training logs in it."""
    logs = {model: _log(folder / f"{model}.jsonl") for model in MODELS}
    made = [
        f"| {model} | {log[0]['parameters'] / 1e6:.2f} M | {log[-1]['step']} |"
        f" {log[0]['training_seconds']:.0f} | {log[0]['settings']['lr']:g} |"
        f" {log[-1]['captions']:.3f} | {log[-1]['pictures']:.3f} | {log[-1]['texts']:.3f} |"
        f" {log[-1]['drills']:.3f} |"
        for model, log in logs.items()
    ]
    rows = []
    for name, (what, _) in EVALUATIONS.items():
        found = {model: _metrics(folder / model / name) for model in MODELS}
        for i, task in enumerate(found["student"]["tasks"]):
            pair = [found[model]["tasks"][i] for model in MODELS]
            cells = " | ".join(_score(one["overall"]) for one in pair)
            chance = pair[0]["overall"]["chance"]
            rows.append(f"| {task['task']} | {what} | {pair[0]['overall']['n']} |"
                        f" {100 * chance:.1f} | {cells} |")  # fmt: skip
            if name == "options":
                for part, groups in task["groups"].items():
                    rows += [
                        f"| {task['task']} | - {part}: {group} | {one['n']} |"
                        f" {100 * one['chance']:.1f} | "
                        + " | ".join(_score(each["groups"][part][group]) for each in pair)
                        + " |"
                        for group, one in groups.items()
                    ]
    text = (folder / "TEMPLATE.md").read_text(encoding="utf-8")
    return text.replace("{made}", "\n".join(made)).replace("{rows}", "\n".join(rows))


def _score(part: dict[str, Any]) -> str:
    low, high = 100 * part["low"], 100 * part["high"]
    return f"{100 * part['accuracy']:.1f} [{low:.1f}, {high:.1f}]"


def _log(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _metrics(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    return found


if __name__ == "__main__":
    main()
