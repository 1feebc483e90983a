"""The questions that a report's gallery shows, read again from the data that the arms answered."""

from __future__ import annotations

from collections.abc import Mapping

from qatbench.errors import ArtifactError
from qatbench.records import Question
from qatbench.report.model import Comparison, TaskComparison
from qatbench.tasks import selector


def load(comparison: Comparison, paths: Mapping[str, str]) -> dict[tuple[str, str], Question]:
    """Read the questions of every flip: (task, id of its row) -> question.

    `paths` says where a task's data are, as in `selector.load`; of a user's own questions, which
    file they are. Of tasks that are not in it nothing is read: their cards hold ids and letters.

    Raises: ArtifactError if the data hold no such question or another answer; what the task's
        loader raises.
    """
    return {
        (task.definition.task, question.id): question
        for task in comparison.tasks
        if task.definition.task in paths
        for question in _flipped(task, paths[task.definition.task])
    }


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
