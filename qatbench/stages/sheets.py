"""Arms lined up question by question: which questions count, who was right, what is resampled."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from qatbench.errors import ArtifactError, UsageError
from qatbench.stages.arms import Arm, Run, section
from qatbench.stages.paired import Scores

QUESTION = "question"  # each resampled by itself


class Sheet(NamedTuple):
    """One task: which questions count, and who was right on them."""

    task: str
    keys: tuple[str, ...]  # the questions, sorted
    scores: dict[str, Scores]  # by arm
    dropped: dict[str, int]  # arm -> questions left out
    clusters: tuple[str, ...] | None = None  # of each question; None: each alone
    clustered_by: str = QUESTION  # in words


def line_up(arms: Sequence[Arm], *, intersection: bool, cluster: str = QUESTION) -> list[Sheet]:
    """Line up the questions of every task that the arms share.

    `cluster` names the field of `Prediction.meta` whose value questions have in common that are
    resampled together; a question without one stands alone. Passes of a circular question that are
    counted apart (`pass_of`) are resampled together where the field says nothing else.

    Raises: ArtifactError if tasks, questions or gold answers differ and not `intersection`, if
        nothing is shared, or if two runs state different values of the field for a question;
        UsageError if no run states the field.
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
    runs = [run for _, run, _ in signed]
    return Sheet(task, keys, scores, dropped, *_clusters(runs, task, keys, cluster))


def _clusters(
    runs: Sequence[Run], task: str, keys: Sequence[str], cluster: str
) -> tuple[tuple[str, ...] | None, str]:
    """What each question is resampled with (None: each alone), and that in words.

    Raises: UsageError if no question of the task has such a field, unless it is the picture and
        no question shows one; ArtifactError as `_stated`.
    """
    passes = _stated(runs, task, keys, "pass_of")
    values = {} if cluster == QUESTION else _values(runs, task, keys, cluster)
    if cluster != QUESTION and not values and not _without_pictures(runs, task, keys, cluster):
        rows = [row for run in runs for key in keys for row in run.units[task][key]]
        known = sorted({name for row in rows for name in row.meta})
        raise UsageError(
            f"{task}: no prediction states {cluster!r}, which questions are to be clustered by",
            hint=f"evaluate again if it is image or skill; recorded: {', '.join(known) or 'none'}",
        )
    ids = []
    for key in keys:
        whole = f"passes of {passes[key]}" if key in passes else f"alone {key}"
        ids.append(f"with {values[key]}" if key in values else whole)
    words = f"{QUESTION}, its passes together" if passes else QUESTION
    if cluster != QUESTION:
        lacking, alone = len(keys) - len(values), "with its passes" if passes else "alone"
        told = f" ({lacking} of {len(keys)} questions state none: each {alone})"
        words = f"{cluster}{told if lacking else ''}"
    return tuple(ids) if len(set(ids)) < len(ids) else None, words


def _values(runs: Sequence[Run], task: str, keys: Sequence[str], cluster: str) -> dict[str, Any]:
    """`_stated`, of the questions' own pictures where another run was shown others' (a control)."""
    shuffled = [section(run.provenance, "spec").get("images") == "shuffled" for run in runs]
    own = [run for run, swapped in zip(runs, shuffled, strict=True) if not swapped]
    found = _stated(own, task, keys, cluster) if cluster == "image" else {}
    return found or _stated(runs, task, keys, cluster)


def _stated(runs: Sequence[Run], task: str, keys: Sequence[str], field: str) -> dict[str, Any]:
    """Values of a field of `Prediction.meta`, by question, of whichever run states one.

    Raises: ArtifactError for a question of which different values are stated.
    """
    found: dict[str, Any] = {}
    where: dict[str, Run] = {}
    for run in runs:
        for key in keys:
            for row in run.units[task][key]:
                value = row.meta.get(field)
                if value is not None and found.setdefault(key, value) != value:
                    raise ArtifactError(
                        f"{task}: question {key} has {field} {found[key]!r} in"
                        f" {where[key].folder} and {value!r} in {run.folder}",
                        hint="evaluate both on one copy of the data, or --cluster by another field",
                    )
                if key in found:
                    where.setdefault(key, run)
    return found


def _without_pictures(runs: Sequence[Run], task: str, keys: Sequence[str], cluster: str) -> bool:
    """Whether the picture is asked for and every question is said to have none."""
    if cluster != "image":
        return False
    shown = _stated(runs, task, keys, "has_image")
    return len(shown) == len(keys) and not any(shown.values())


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
