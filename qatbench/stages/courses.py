"""How trainings went, from the train.jsonl that a trained arm's results hold."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from pydantic import ConfigDict, ValidationError

from qatbench.errors import ArtifactError
from qatbench.records import Record
from qatbench.report.model import Course, Stretch
from qatbench.stages.arms import Arm, Run, section

LOG = "train.jsonl"
STRETCHES = 5  # a training is told in
_TERMS = ("ce", "kd", "rcka", "gate", "beta")


class _Step(Record):
    """What is read of a line of train.jsonl."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False, strict=True)

    step: int
    ce: float
    kd: float | None = None
    rcka: float | None = None
    gate: float | None = None
    beta: float | None = None


def courses(arms: Sequence[Arm]) -> tuple[Course, ...]:
    """The course of every arm that was trained here, in the order of the arms.

    Raises: ArtifactError when a log is damaged, is missing for some seeds of an arm, or stops
        earlier than that of another seed.
    """
    told = []
    for arm in arms:
        runs = [run for run in arm.runs if (run.folder / LOG).is_file()]
        if 0 < len(runs) < len(arm.runs):
            raise ArtifactError(
                f"{arm.name} has {LOG} for {len(runs)} of its {len(arm.runs)} seeds",
                hint="run the recipe again: it copies what is missing beside the predictions",
            )
        if runs:
            told.append(_course(arm.name, runs))
    return tuple(told)


def _course(name: str, runs: Sequence[Run]) -> Course:
    logs = [_read(run.folder / LOG) for run in runs]
    last = len(logs[0])
    if any(len(log) != last for log in logs):
        raise ArtifactError(
            f"the logs of {name} have different lengths", hint="train its shorter seeds again"
        )
    edges = [last * i // STRETCHES for i in range(STRETCHES + 1)]
    pairs = [(a, b) for a, b in itertools.pairwise(edges) if b > a]
    stretches = tuple(_stretch([line for log in logs for line in log[a:b]]) for a, b in pairs)
    betas = [line.beta for log in logs for line in log if line.beta is not None]
    bounds = [_bounds(run) for run in runs]
    known = [bound for bound in bounds if bound is not None]
    if not betas or len(known) < len(runs):
        return Course(arm=name, seeds=tuple(run.seed for run in runs), stretches=stretches)
    stuck = [
        line.beta in bound
        for log, bound in zip(logs, known, strict=True)
        for line in log
        if line.beta is not None
    ]
    return Course(
        arm=name,
        seeds=tuple(run.seed for run in runs),
        stretches=stretches,
        beta_range=(min(betas), max(betas)),
        beta_at_bound=fmean(stuck),
    )


def _stretch(lines: Sequence[_Step]) -> Stretch:
    means = {}
    for term in _TERMS:
        values = [value for line in lines if (value := getattr(line, term)) is not None]
        means[term] = fmean(values) if values else None
    steps = [line.step for line in lines]
    return Stretch(first=min(steps), last=max(steps), **means)


def _bounds(run: Run) -> tuple[float, float] | None:
    spec = section(run.checkpoint, "spec")
    controller = section(spec, "controller")
    moves = spec.get("method") == "grace" and controller.get("rate")
    if not moves or not {"low", "high"} <= controller.keys():
        return None
    return float(controller["low"]), float(controller["high"])


def _read(path: Path) -> list[_Step]:
    lines = path.read_bytes().splitlines()
    steps = []
    for number, line in enumerate(lines, start=1):
        try:
            steps.append(_Step.model_validate_json(line))
        except ValidationError as error:
            raise ArtifactError(
                f"{path} is damaged: line {number}", hint="train this arm again"
            ) from error
    if not steps:
        raise ArtifactError(f"{path} is damaged: it is empty", hint="train this arm again")
    return steps
