"""Seconds and memory of `qatbench compare`: 10 arms x 4329 rows, 10,000 bootstrap draws.

Predictions are random, in ScienceQA's shape (five options at most, scores of each, subjects and
categories). The verb runs in a process of its own, reports and figures included.

    python benchmarks/compare_time.py [--arms 10] [--rows 4329] [--seeds 1] [--json FILE]
"""

from __future__ import annotations

import argparse
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests" / "report")]

from kept import show  # noqa: E402
from run_folders import write_run  # noqa: E402

from qatbench.records import Prediction  # noqa: E402

METHODS = ("base", "sft", "kd", "rtn", "gptq", "awq", "autoround", "qat", "grace", "grace")
SUBJECTS = ("natural science", "social science", "language science")


def predictions(rng: random.Random, count: int, skill: float) -> list[Prediction]:
    """Rows of one evaluation; the questions are the same for every `rng`."""
    questions, made = random.Random(0), []
    for at in range(count):
        letters = "ABCDE"[: questions.choice((2, 2, 3, 4, 5))]
        gold = questions.choice(letters)
        meta = {"subject": questions.choice(SUBJECTS), "category": f"c{questions.randrange(26)}",
                "has_image": questions.random() < 0.48}  # fmt: skip
        hard = questions.random()
        scores = {k: round(rng.gauss(-2, 0.3), 6) for k in letters}
        if hard + rng.gauss(0, 0.05) < skill:
            scores[gold] = -0.5
        chosen = max(scores, key=scores.__getitem__)
        row = {"id": str(at), "task": "scienceqa", "choices": tuple(letters), "gold": gold}
        row |= {"chosen": chosen, "status": "ok", "scores": scores, "meta": meta}
        made.append(Prediction.model_validate(row))
    return made


def main() -> None:
    """Measure and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--arms", type=int, default=10)
    parser.add_argument("--rows", type=int, default=4329)
    parser.add_argument("--seeds", type=int, default=1, help="of the trained arms")
    parser.add_argument("--json", type=Path, help="file for the figures")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        runs = []
        for at in range(given.arms):
            method = METHODS[at % len(METHODS)]
            runs.append(root / f"arm{at}")
            bits = {} if method in ("base", "sft", "kd") else {"bits": 4, "group_size": 128}
            trained = method in ("sft", "kd", "qat", "grace") and given.seeds > 1
            for seed in range(given.seeds if trained else 1):
                rows = predictions(random.Random(100 * at + seed), given.rows, 0.7 + at / 100)
                folder = runs[-1] / f"seed-{seed}" if trained else runs[-1]
                write_run(folder, rows, method=method, making_seconds=60.0 * at + 1, **bits)
        command = [sys.executable, "-m", "qatbench", "compare", *map(str, runs)]
        command += ["--baseline", str(runs[0]), "--out", str(root / "out")]
        started = time.monotonic()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        found = {
            "arms": given.arms, "rows": given.rows, "seeds": given.seeds, "draws": 10_000,
            "seconds": round(time.monotonic() - started, 1),
            "peak_gb": round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6, 2),
        }  # fmt: skip
    show(found, given.json)


if __name__ == "__main__":
    main()
