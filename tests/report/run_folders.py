"""Run folders as evaluation leaves them, for the tests of compare."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qatbench.records import Accuracy, Metrics, Prediction, TaskMetrics

TASK = "scienceqa:test:text"


def predictions(right: Sequence[int], task: str = TASK, **changes: Any) -> list[Prediction]:
    """One row an entry: 1 chose the gold letter, 0 another."""
    return [
        Prediction(
            id=f"{k}",
            task=task,
            choices=("A", "B"),
            gold="A",
            chosen="A" if good else "B",
            status="ok",
            **changes,
        )
        for k, good in enumerate(right)
    ]


def task_metrics(rows: Sequence[Prediction], protocol: str) -> TaskMetrics:
    right = sum(row.right for row in rows)
    overall = Accuracy(
        n=len(rows), right=right, accuracy=right / len(rows), low=0, high=1, chance=0.5
    )
    return TaskMetrics(
        task=rows[0].task,
        protocol=protocol,
        mode="options",
        overall=overall,
        unparsed=sum(row.status == "unparsed" for row in rows),
        errors=sum(row.status == "error" for row in rows),
        ties=sum(row.tie for row in rows),
    )


def write_run(
    folder: Path, rows: Sequence[Prediction], *, protocol: str = "llava-sqa", **model: Any
) -> Path:
    folder.mkdir(parents=True)
    lines = "".join(row.model_dump_json() + "\n" for row in rows)
    (folder / "predictions.jsonl").write_text(lines)
    tasks = [
        task_metrics(list(mine), protocol) for _, mine in itertools.groupby(rows, lambda r: r.task)
    ]
    metrics = Metrics(tasks=tuple(tasks), seconds=1, questions_per_second=1)
    (folder / "metrics.json").write_text(metrics.model_dump_json())
    if model:
        provenance = {
            "fingerprint": "f00d",
            "spec": {"dtype": "float32", "batch": 8},
            "inputs": {"model": model, "data": {TASK: "d1"}},
            "versions": {"torch": "2.0"},
        }
        (folder / "provenance.json").write_text(json.dumps(provenance))
    return folder


def pattern(n: int, right: int) -> list[int]:
    return [1] * right + [0] * (n - right)


def damage(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(text)


def lost_two_gained_three(folder: Path) -> tuple[Path, Path]:
    """Base right on 0-5, arm right on 2-8, of ten questions: lost 0, 1; gained 6, 7, 8."""
    base = write_run(folder / "r" / "base", predictions([1] * 6 + [0] * 4), method="base")
    arm = write_run(folder / "r" / "gptq", predictions([0] * 2 + [1] * 7 + [0]), method="gptq")
    return base, arm
