"""metrics.json from predictions alone: no model, no GPU."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from qatbench.records import Accuracy, Metrics, Prediction, TaskMetrics
from qatbench.stats import wilson


def summarize(
    rows: Sequence[Prediction],
    *,
    protocols: Mapping[str, str],
    mode: str,
    seconds: float,
    timed: int | None = None,
) -> Metrics:
    """Accuracy of each task, overall and by subject and modality, with what was not answered.

    `timed` of the rows were answered in these `seconds` (all if None): the others by a run that
    was cut off, which do not count for questions a second.
    """
    by_task: dict[str, list[Prediction]] = defaultdict(list)
    for row in rows:
        by_task[row.task].append(row)
    return Metrics(
        tasks=tuple(_task(name, some, protocols[name], mode) for name, some in by_task.items()),
        seconds=round(seconds, 3),
        questions_per_second=round((len(rows) if timed is None else timed) / seconds, 3)
        if seconds
        else 0.0,
    )


def _task(name: str, rows: Sequence[Prediction], protocol: str, mode: str) -> TaskMetrics:
    groups: dict[str, dict[str, list[Prediction]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        groups["modality"]["image" if row.meta.get("has_image") else "text"].append(row)
        if row.meta.get("subject"):
            groups["subject"][row.meta["subject"]].append(row)
    return TaskMetrics(
        task=name,
        protocol=protocol,
        mode=mode,
        overall=accuracy(rows),
        unparsed=sum(row.status == "unparsed" for row in rows),
        errors=sum(row.status == "error" for row in rows),
        ties=sum(row.tie for row in rows),
        groups={k: {g: accuracy(v) for g, v in sorted(some.items())} for k, some in groups.items()},
    )


def accuracy(rows: Sequence[Prediction]) -> Accuracy:
    """Right over all asked, with the 95 % Wilson interval and the level of chance."""
    right = sum(row.right for row in rows)
    low, high = wilson(right, len(rows))
    return Accuracy(
        n=len(rows),
        right=right,
        accuracy=right / len(rows),
        low=low,
        high=high,
        chance=sum(1 / len(row.choices) for row in rows) / len(rows),
    )
