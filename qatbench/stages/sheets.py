"""Arms lined up question by question: which questions count, who was right, what is resampled."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from qatbench.errors import ArtifactError, UsageError
from qatbench.stages.arms import Arm, Run
from qatbench.stages.paired import Scores

QUESTION = "question"  # each resampled by itself


class Sheet(NamedTuple):
    """One task: which questions count, and who was right on them."""

    task: str
    keys: tuple[str, ...]  # the questions, sorted
    scores: dict[str, Scores]  # by arm
    dropped: dict[str, int]  # arm -> questions left out
    clusters: tuple[str, ...] | None = None  # of each question; None: each alone


def line_up(arms: Sequence[Arm], *, intersection: bool, cluster: str = QUESTION) -> list[Sheet]:
    """Line up the questions of every task that the arms share.

    `cluster` names the field of `Prediction.meta` whose value questions have in common that are
    resampled together; a question without one stands alone.

    Raises: ArtifactError if tasks, questions or gold answers differ and not `intersection`, or if
        nothing is shared.
    """
    return [_sheet(arms, task, intersection, cluster) for task in _tasks(arms, intersection)]


def _tasks(arms: Sequence[Arm], intersection: bool) -> list[str]:
    """Tasks of every run, in the first run's order."""
    runs = [(arm.name, run) for arm in arms for run in arm.runs]
    first = list(runs[0][1].units)
    shared = [task for task in first if all(task in run.units for _, run in runs)]
    for name, run in runs:
        if not intersection and set(run.units) != set(first):
            raise ArtifactError(
                f"{arms[0].name} answered {', '.join(first)}; {name} ({run.folder}) answered"
                f" {', '.join(run.units)}",
                hint="evaluate all arms on the same tasks, or compare with --intersection",
            )
    if not shared:
        raise ArtifactError("the arms share no task", hint="evaluate all arms on the same task")
    return shared


def _sheet(arms: Sequence[Arm], task: str, intersection: bool, cluster: str) -> Sheet:
    """Line up the questions: equal ids, rows and golds in every run, or an error."""
    signed = [(arm, run, _signatures(run, task)) for arm in arms for run in arm.runs]
    _, first_run, first = signed[0]
    shared = set(first.items()).intersection(*(mine.items() for _, _, mine in signed))
    for arm, run, mine in signed:
        if not intersection and mine != first:
            raise ArtifactError(
                f"{task}: {arms[0].name} and {arm.name} answered different questions:"
                f" {_mismatch(first, mine)} ({first_run.folder}, {run.folder})",
                hint="evaluate both on one question set, or compare with --intersection",
            )
    if not shared:
        raise ArtifactError(
            f"{task}: the arms share no question", hint="evaluate all arms on the same data"
        )
    keys = tuple(sorted(key for key, _ in shared))
    scores = {arm.name: _scores(arm, task, keys) for arm in arms}
    dropped = {arm.name: 0 for arm in arms} if intersection else {}
    for arm, _, mine in signed if intersection else ():
        dropped[arm.name] = max(dropped[arm.name], len(mine) - len(keys))
    return Sheet(task, keys, scores, dropped, _clusters(first_run, task, keys, cluster))


def _clusters(run: Run, task: str, keys: Sequence[str], cluster: str) -> tuple[str, ...] | None:
    """What each question is resampled with.

    Raises: UsageError when no question of the task has such a field.
    """
    if cluster == QUESTION:
        return None
    values = [run.units[task][key][0].meta.get(cluster) for key in keys]
    if all(value is None for value in values):
        known = sorted({name for key in keys for name in run.units[task][key][0].meta})
        raise UsageError(
            f"{task}: no prediction states {cluster!r}, which questions are to be clustered by",
            hint=f"evaluate again if it is image or skill; recorded: {', '.join(known) or 'none'}",
        )
    return tuple(
        f"alone {key}" if value is None else f"with {value}"
        for key, value in zip(keys, values, strict=True)
    )


def _signatures(run: Run, task: str) -> dict[str, frozenset[tuple[str, str | None]]]:
    return {key: frozenset((r.id, r.gold) for r in rows) for key, rows in run.units[task].items()}


def _mismatch(first: dict[str, Any], other: dict[str, Any]) -> str:
    """Say how two question sets differ, with one example."""
    missing, extra = first.keys() - other.keys(), other.keys() - first.keys()
    if missing or extra:
        return f"{len(missing)} missing, {len(extra)} more, such as {min(missing | extra)}"
    changed = [key for key in first if first[key] != other[key]]
    return f"{len(changed)} with another gold answer or other rows, such as {min(changed)}"


def right_of(run: Run, task: str, keys: Iterable[str]) -> list[int]:
    """1 for each question all of whose rows are right, else 0."""
    return [int(all(row.right for row in run.units[task][key])) for key in keys]


def _scores(arm: Arm, task: str, keys: Iterable[str]) -> Scores:
    right = np.array([right_of(run, task, keys) for run in arm.runs], dtype=np.int64)
    return Scores(arm.name, arm.seeds, right)
