"""README's result tables and its two figures, from the committed comparisons and measurements.

Rewrites what stands between `<!-- NAME -->` and `<!-- end -->` in README.md, and docs/figures/.
`make results` compares all committed runs again first (benchmarks/recompare.py).

    python benchmarks/readme_results.py [--check]
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from qatbench.report.figures import figures, of_task
from qatbench.report.model import Comparison
from qatbench.report.tables import arm_rows, markdown_table
from qatbench.stages.claim_rules import MemoryTest, SpeedTest, published
from qatbench.stages.claim_speed import faster, smaller
from qatbench.stages.report_files import read

ROOT = Path(__file__).resolve().parents[1]
TITLES = {"acc %": "accuracy %", "95 % CI": "95 % interval", "p": "p (Holm)"}
METHODS = ("rtn", "gptq", "awq", "qat", "grace")


def smol(comparison: Comparison) -> str:
    """Every arm of the real model on real questions."""
    shown = ("arm", "acc %", "95 % CI", "diff", "p", "bits/w")
    titles = TITLES | {"diff": f"difference to {comparison.baseline}, points"}
    rows = [{key: row[key] for key in shown} for row in arm_rows(comparison)]
    return markdown_table(rows, titles | {"bits/w": "bits/weight"})


def mini(comparison: Comparison) -> str:
    """The drawn benchmark: a row a width."""
    task = comparison.tasks[0].definition.task
    accuracy = {row["arm"]: row["acc %"] for row in arm_rows(comparison) if row["task"] == task}
    head = ["| bits | " + " | ".join(METHODS) + " |", "|" + " ---: |" * (1 + len(METHODS))]
    rows = [
        f"| {bits} | " + " | ".join(accuracy[f"{m}-w{bits}"] for m in METHODS) + " |"
        for bits in (4, 3, 2)
    ]
    return "\n".join([*head, *rows])


def engine(figures: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """INT4 against 16 bits in the engine and in plain transformers; what that says of claims.

    `figures` are LLaVA-1.5-7B's, `other` Qwen2-VL-2B's.
    """
    [model], [small] = figures["models"], other["models"]
    plain, dense, packed = "transformers bf16", "engine bf16", "engine int4"
    title = f"LLaVA-1.5-7B's shape, one {figures['device']}"
    rows = [[title, plain, dense, packed, "INT4 over bf16"], ["---", *["---:"] * 4]]
    for batch, found in model["decode"].items():
        told = [f"{found[way]['tokens_per_second']:.0f}" for way in (plain, dense, packed)]
        rows.append(
            [f"decoding, batch {batch}, tokens/s", *told, f"{found['int4_over_bf16']:.2f} x"]
        )
    found = model["prefill"]
    told = [f"{found[way]['ms']:.0f}" for way in (plain, dense, packed)]
    rows.append(["prefill, 8 x 656 tokens, ms", *told, f"{found['int4_over_bf16']:.2f} x"])
    weights = [model["weights_gb"][way] for way in (plain, dense, packed)]
    saved = 1 - weights[2] / weights[1]
    rows.append(["weights, GB", *(f"{gb:.2f}" for gb in weights), f"-{100 * saved:.0f} %"])
    for batch, found in small["decode"].items():
        told = [f"{found[way]['tokens_per_second']:.0f}" for way in (plain, dense, packed)]
        title = f"Qwen2-VL-2B's shape: decoding, batch {batch}, tokens/s"
        rows.append([title, *told, f"{found['int4_over_bf16']:.2f} x"])
    tests = {one.id: one.test for one in published()}
    alone = model["decode"]["1"]
    ends = [alone[dense][a] / alone[packed][b] for a, b in (("min", "max"), ("max", "min"))]
    speed, memory = tests["throughput"], tests["memory"]
    assert isinstance(speed, SpeedTest)
    assert isinstance(memory, MemoryTest)
    table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    return (
        f"{table}\n\nPublished: {speed.expect_at_least:.0f} x the throughput, here"
        f" **{faster(*ends, speed.expect_at_least)}**;"
        f" {100 * memory.expect_at_least:.0f} % less memory, here by the weights"
        f" **{smaller(saved, memory.expect_at_least)}**."
    )


TABLES: dict[str, Callable[[Comparison], str]] = {"smol-scienceqa": smol, "mini": mini}
ENGINE = ("engine/llava.json", "engine/qwen.json")
FIGURES = {"accuracy": ("smol-scienceqa", 0), "pareto": ("mini", 1)}  # folder, which of a task's


def replaced(readme: str, name: str, text: str) -> str:
    """README.md with another block of a name. Ends the program unless there is one."""
    block = f"<!-- {name} -->\n{text}\n<!-- end -->"
    pattern = rf"<!-- {name} -->\n.*?<!-- end -->"
    readme, count = re.subn(pattern, lambda _: block, readme, flags=re.DOTALL)
    if count != 1:
        raise SystemExit(f"README.md has {count} places for {name}, not one")
    return readme


def made(results: Path, readme: str) -> dict[str, str]:
    """Path under the root -> text, README.md among them."""
    comparisons = {name: read(results / name) for name in TABLES}
    for name, table in TABLES.items():
        readme = replaced(readme, name, table(comparisons[name]))
    measured = [json.loads((results / file).read_text(encoding="utf-8")) for file in ENGINE]
    readme = replaced(readme, "engine", engine(*measured))
    texts = {"README.md": readme}
    for figure, (name, place) in FIGURES.items():
        comparison = comparisons[name]
        path = of_task(comparison, comparison.tasks[0].definition.task)[place]
        texts[f"docs/figures/{figure}.svg"] = figures(comparison)[path]
    return texts


def main() -> None:
    """Write, or say what differs."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="only say what would change; exit 1")
    given = parser.parse_args()
    old = (ROOT / "README.md").read_text(encoding="utf-8")
    differs = []
    for path, text in made(ROOT / "results", old).items():
        file = ROOT / path
        if not file.is_file() or file.read_text(encoding="utf-8") != text:
            differs.append(path)
            if not given.check:
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(text, encoding="utf-8")
    print("\n".join(differs) or "nothing differs")
    sys.exit(1 if differs and given.check else 0)


if __name__ == "__main__":
    main()
