"""speed.json beside a comparison: read it, and give every arm the rows of its model."""

from __future__ import annotations

from pathlib import Path

from qatbench import store
from qatbench.errors import PrerequisiteError, UsageError
from qatbench.records_speed import Speed
from qatbench.report.model import ArmResult, Comparison, TaskComparison
from qatbench.report.speed_model import ArmSpeed
from qatbench.stages.claims import verdicts


def read_speed(path: Path) -> Speed:
    """Read what `qatbench speed` wrote: the file, or the folder that it lies in.

    Raises: PrerequisiteError if it is not there; ArtifactError if it is damaged or of another
        version.
    """
    file = path / "speed.json" if path.is_dir() else path
    if not file.is_file():
        raise PrerequisiteError(f"no {file}", hint="qatbench speed MODEL... --out DIR writes it")
    return store.read_record(Speed, file, "measure again: qatbench speed MODEL... --out DIR")


def with_speed(comparison: Comparison, speed: Speed) -> Comparison:
    """The comparison with the speeds of its arms, and its claims judged with them.

    An arm is known by the fingerprint of its model; of several seeds the first that was measured.

    Raises: UsageError when no arm's model was measured.
    """
    tasks = tuple(_with_speed(task, speed) for task in comparison.tasks)
    if not any(arm.speed for task in tasks for arm in task.arms):
        if not any(arm.models for task in tasks for arm in task.arms):
            raise UsageError(
                "this comparison does not say which models it is of: it is older than speeds",
                hint="compare the runs again, with --speed",
            )
        names = ", ".join(model.model for model in speed.models)
        raise UsageError(
            f"none of the models whose speed was measured is an arm here: {names}",
            hint="qatbench speed with the very checkpoints that were evaluated",
        )
    claims = verdicts(tasks, comparison.baseline)
    return comparison.model_copy(update={"tasks": tasks, "claims": claims})


def _with_speed(task: TaskComparison, speed: Speed) -> TaskComparison:
    arms = tuple(_measured(arm, task.definition.task, speed) for arm in task.arms)
    return task.model_copy(update={"arms": arms})


def _measured(arm: ArmResult, task: str, speed: Speed) -> ArmResult:
    known = {row.fingerprint for row in speed.rows}
    for seed, model in zip(arm.seeds, arm.models, strict=False):
        if model is not None and model in known:
            made = ArmSpeed(
                seed=seed,
                device=speed.device,
                on=speed.on,
                repeats=speed.repeats,
                warm_up=speed.warm_up,
                in_turns=speed.in_turns,
                rows=tuple(row for row in speed.rows if row.fingerprint == model),
            )
            rate = _questions_per_second(model, task, speed)
            return arm.model_copy(update={"speed": made, "questions_per_second": rate})
    return arm.model_copy(update={"speed": None, "questions_per_second": None})


def _questions_per_second(model: str, task: str, speed: Speed) -> float | None:
    """Of the evaluation of this very task, where it was measured."""
    for row in speed.evaluations:
        same = row.fingerprint == model and row.task.split(":")[0] == task.split(":")[0]
        if same and row.questions_per_second is not None:
            return row.questions_per_second.median
    return None
