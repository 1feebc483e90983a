"""The questions that a report's gallery shows, read again from the data that the arms answered."""

from __future__ import annotations

from collections.abc import Mapping

from qatbench.errors import ArtifactError, QatbenchError
from qatbench.records import Question
from qatbench.report.model import Comparison, Setting, TaskComparison
from qatbench.tasks import selector


def load(comparison: Comparison, paths: Mapping[str, str]) -> dict[tuple[str, str], Question]:
    """Read the questions of every flip: (task, id of its row) -> question.

    `paths` says where a task's data are, as in `selector.load`; of a user's own questions, which
    file they are. A task that is not in it is read only if its questions are the built-in ones,
    which may be passed on; of all others the cards hold ids and letters.

    Raises: ArtifactError if the data hold no such question or another answer; what the task's
        loader raises.
    """
    found = {}
    for task in comparison.tasks:
        path = paths.get(task.definition.task) or built_in(task)
        for question in _flipped(task, path) if path else ():
            found[task.definition.task, question.id] = question
    return found


def built_in(task: TaskComparison) -> str | None:
    """Name of the built-in data that were asked, told by their digests; None if none were.

    Nothing is drawn or read for a task without listed flips. Of a part of the questions
    (`--limit`) the digest is that of the same part with seed 0.
    """
    asked = task.definition.data
    listed = any(changes.flips for changes in task.changes)
    if not asked or not listed or task.definition.task not in selector.TASKS:
        return None
    for name in selector.BUILT_IN:
        if all(_is(key, digests, name, task.definition.n) for key, digests in asked.items()):
            return name
    return None


def _is(key: str, digests: Setting, name: str, n: int) -> bool:
    """Whether every arm was asked these questions, all or `n` of them, of built-in data."""
    source = selector.parse(key)
    try:
        rows = selector.load(source, {source.task: name})
    except QatbenchError:  # it has no such split or task
        return False
    return digests in ((selector.digest(rows),), (selector.digest(selector.limit(rows, n)),))


def _flipped(task: TaskComparison, path: str) -> list[Question]:
    name = task.definition.task
    gold = {flip.id: flip.gold for changes in task.changes for flip in changes.flips}
    questions: dict[str, Question] = {}
    for source in _sources(task, path) if gold else ():
        questions |= {q.id: q for q in selector.load(source, {name: path}) if q.id in gold}
    for row, letter in gold.items():
        there = questions.get(row)
        if there is None or there.gold != letter:
            answer = "is missing there" if there is None else f"has the answer {there.gold} there"
            raise ArtifactError(
                f"{path} does not hold the questions of this comparison: {row} of {name} {answer}",
                hint=f"it is about {', '.join(task.definition.data) or name}",
            )
    return list(questions.values())


def _sources(task: TaskComparison, path: str) -> list[selector.Selector]:
    """The parts of the data that were asked; of a task of the user's own, its file."""
    if task.definition.task not in selector.TASKS:
        return [selector.parse(path)]
    return [selector.parse(key) for key in task.definition.data or (task.definition.task,)]
