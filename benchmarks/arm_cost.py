"""What an optimizer step of each trained arm of a recipe costs: side by side in one run, as ratios.

python benchmarks/arm_cost.py RECIPE --reference sft [--rounds 8] [--arm A]... [--json FILE]

All arms are built first; then they take turns, one step each a round, on the same samples. The
seconds in a report are those of whole runs on a machine as it was; these ratios are comparable.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from qatbench.recipe import TRAINED, Recipe
from qatbench.recipe_file import load_recipe
from qatbench.stages.plan import Plan
from qatbench.stages.run import request_of
from qatbench.stages.train import TrainingRun
from qatbench.vlm import load as models


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--reference", required=True, help="the arm that is 1.00")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--arm", action="append")
    parser.add_argument("--device")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    recipe = load_recipe(given.recipe)
    wanted = given.arm or trained_alone(recipe)
    with tempfile.TemporaryDirectory() as scratch:
        plan = Plan(recipe, Path(scratch), paths={}, device=models.pick_device(given.device))
        names = dict.fromkeys([given.reference, *wanted])
        runs = {name: start(plan, name, Path(scratch)) for name in names}
        seconds = measure(runs, given.rounds)
    told = {
        name: {"median_s": statistics.median(values), "low_s": min(values), "high_s": max(values)}
        for name, values in seconds.items()
    }
    base = told[given.reference]["median_s"]
    print(f"{'arm':<16}{'s a step':>10}{'min to max':>18}{'ratio':>8}")
    for name, row in told.items():
        row["ratio"] = row["median_s"] / base
        spread = f"{row['low_s']:.2f} to {row['high_s']:.2f}"
        print(f"{name:<16}{row['median_s']:>10.3f}{spread:>18}{row['ratio']:>8.2f}")
    if given.json:
        facts = {
            "reference": given.reference,
            "rounds": given.rounds,
            "threads": torch.get_num_threads(),
        }
        given.json.write_text(json.dumps(facts | {"arms": told}, indent=1) + "\n")


def trained_alone(recipe: Recipe) -> list[str]:
    """Trained arms that need no other arm's checkpoint."""
    return [n for n, arm in recipe.arms.items() if arm.kind in TRAINED and not recipe.needs(n)]


def start(plan: Plan, name: str, scratch: Path) -> TrainingRun:
    """The arm's first seed, before its first step."""
    unit = plan.unit(name, plan.recipe.seeds_of(name)[0])
    print(f"building {name}", file=sys.stderr)
    return TrainingRun(request_of(plan, unit, 10**9), str(plan.device), scratch / name)


def measure(runs: dict[str, TrainingRun], rounds: int) -> dict[str, list[float]]:
    """Seconds of each arm's steps; the first round warms up and does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            started = time.perf_counter()
            run.step(number)
            if run.device.type == "cuda":
                torch.cuda.synchronize()
            if number:
                seconds[name].append(time.perf_counter() - started)
        print(f"round {number} of {rounds}", file=sys.stderr)
    return seconds


if __name__ == "__main__":
    main()
