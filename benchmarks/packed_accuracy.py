"""Is the accuracy of the packed checkpoint that of the model that was trained?

python benchmarks/packed_accuracy.py RECIPE --arm grace-w3 [--seed 0] [--limit N] --out DIR

Trains one arm of a recipe, asks its questions while the weights still pass through the fake
quantization, then asks the packed checkpoint with each kernel, all in float32 on the same batches.
Prints one JSON object and writes it to DIR/packed-ARM.json: every question with another chosen
option, with its margin (nats a token between the best two options) before and after.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from qatbench import store
from qatbench.recipe_file import load_recipe
from qatbench.records import Prediction
from qatbench.stages.answering import answer_all
from qatbench.stages.common import silent
from qatbench.stages.plan import Plan, Unit
from qatbench.stages.run import make_checkpoint, request_of
from qatbench.stages.train import TrainingRun
from qatbench.vlm import load as models
from qatbench.vlm.load import Loaded


def main() -> None:
    """Train, ask three times, compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--arm", required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--device")
    parser.add_argument("--data", action="append", default=[], help="TASK=PATH")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    paths = dict(item.split("=", 1) for item in given.data)
    device = models.pick_device(given.device)
    recipe = load_recipe(given.recipe)
    plan = Plan(recipe, given.out, paths=paths, limit=given.limit, device=device)
    unit = plan.unit(given.arm, given.seed)
    figures = compare(plan, unit, given.out / f"work-{given.arm}")
    store.write_json(given.out / f"packed-{given.arm}.json", figures)
    print(json.dumps(figures))


def compare(plan: Plan, unit: Unit, work: Path) -> dict[str, Any]:
    """Answers of the trained model, and of its packed checkpoint by each kernel."""
    shutil.rmtree(work, ignore_errors=True)
    checkpoint = work / "checkpoint"
    checkpoint.mkdir(parents=True)
    for other in (unit.source, unit.teacher, unit.init):
        if isinstance(other, Unit):
            make_checkpoint(plan, other, silent, 50)
    run = TrainingRun(request_of(plan, unit, save_every=10**9), str(plan.device), checkpoint)
    run.fit(silent)
    run.student.model.eval()
    trained = ask(plan, run.student, work / "trained.jsonl")
    run.export()
    told: dict[str, Any] = {"arm": unit.arm, "seed": unit.seed, "n": len(trained)}
    for kernel in models.KERNELS:
        folder = models.find(str(checkpoint))
        again = models.load(folder, device=str(plan.device), dtype=torch.float32, kernel=kernel)
        packed = ask(plan, again, work / f"{kernel}.jsonl")
        told[kernel] = difference(trained, packed) | {"multiplies": models.kernel_name(again)}
    shutil.rmtree(work)
    return told


def ask(plan: Plan, loaded: Loaded, partial: Path) -> list[Prediction]:
    """All questions of the recipe."""
    how = plan.evaluation
    return answer_all(loaded, plan.asked(), how.protocol, how.mode, partial, silent).rows


def difference(before: Sequence[Prediction], after: Sequence[Prediction]) -> dict[str, Any]:
    """Accuracies, the largest difference of an option's score, and the answers that changed."""
    changed = [
        {"id": a.id, "before": a.chosen, "after": b.chosen, "gold": a.gold,
         "margin_before": margin(a), "margin_after": margin(b)}
        for a, b in zip(before, after, strict=True) if a.chosen != b.chosen
    ]  # fmt: skip
    gaps = [
        abs(a.scores[letter] - b.scores[letter])
        for a, b in zip(before, after, strict=True)
        if a.scores and b.scores
        for letter in a.scores
    ]
    return {
        "right_before": sum(row.right for row in before),
        "right_after": sum(row.right for row in after),
        "changed": changed,
        "largest_score_difference": max(gaps),
    }


def margin(row: Prediction) -> float:
    """Score of the best option over the second, nats a token."""
    best, second = sorted((row.scores or {}).values(), reverse=True)[:2]
    return best - second


if __name__ == "__main__":
    main()
