"""Scores of finished evaluations for a model card, as a table and as the hub's model-index."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qatbench import store
from qatbench.errors import ArtifactError
from qatbench.records import Metrics, TaskMetrics
from qatbench.tasks import selector


def scores_of(run: Path, fingerprint: str) -> list[dict[str, Any]]:
    """One row a task of a finished evaluation of the model with this fingerprint.

    Raises: ArtifactError when it is not finished, damaged, or has the answers of another model.
    """
    if not (run / store.PROVENANCE).is_file() or not (run / "metrics.json").is_file():
        raise ArtifactError(f"{run} is no finished evaluation", hint="qatbench eval ... --resume")
    record = store.read_json(run / store.PROVENANCE)
    asked = record.get("spec", {})
    if record.get("stage") != "eval" or asked.get("model") != fingerprint:
        raise ArtifactError(
            f"{run} has the answers of another model ({asked.get('model')}, not {fingerprint})",
            hint="evaluate this checkpoint, and give that run",
        )
    try:
        metrics = Metrics.model_validate(store.read_json(run / "metrics.json"))
    except ValueError as error:
        raise ArtifactError(f"damaged metrics in {run}", hint="evaluate again") from error
    return [_score(task, record) for task in metrics.tasks]


def _score(task: TaskMetrics, record: Mapping[str, Any]) -> dict[str, Any]:
    asked, figures = record["spec"], record.get("figures", {})
    parts = [text for text in asked["tasks"] if text.split(":")[0] == task.task]
    return {
        "task": task.task,
        "parts": parts,
        "place": figures.get("data", {}).get(task.task),
        "protocol": task.protocol,
        "mode": task.mode,
        "images": asked.get("images", "shown"),
        "limit": asked.get("limit"),
        "kernel": figures.get("kernel"),
        "dtype": figures.get("dtype"),
        "n": task.overall.n,
        "accuracy": round(100 * task.overall.accuracy, 2),
        "low": round(100 * task.overall.low, 2),
        "high": round(100 * task.overall.high, 2),
        "chance": round(100 * task.overall.chance, 2),
        "unparsed": task.unparsed,
        "errors": task.errors,
    }


def result(row: Mapping[str, Any]) -> dict[str, Any]:
    """One entry of the hub's model-index."""
    place = row["place"]
    known = place if place and "/" in place else row["task"]
    drawn = f" ({place}, drawn by qatbench)" if place in selector.BUILT_IN else ""
    keys = ("protocol", "mode", "n", "low", "high", "chance", "unparsed", "errors", "limit",
            "images", "kernel", "dtype")  # fmt: skip
    told = f"{row['protocol']}, {row['mode']}, n = {row['n']}, 95 % [{row['low']}, {row['high']}]"
    return {
        "task": {"type": "question-answering", "name": "multiple-choice questions"},
        "dataset": {
            "type": known,
            "name": f"{row['task']}{drawn}",
            "split": ", ".join(row["parts"]),
        },
        "metrics": [
            {
                "type": "accuracy",
                "name": f"accuracy %, protocol {told}",
                "value": row["accuracy"],
                "args": {key: row[key] for key in keys if row[key] is not None},
            }
        ],
    }
