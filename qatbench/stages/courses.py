"""How trainings went, from the train.jsonl that a trained arm's results hold."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import get_args

from pydantic import ConfigDict, ValidationError

from qatbench.errors import ArtifactError
from qatbench.records import Record
from qatbench.report.model import Course, Curve, Stretch, Term
from qatbench.stages.arms import Arm, Run, section

LOG = "train.jsonl"
STRETCHES = 5  # a training is told in
POINTS = 60  # at most, of a curve
_DIGITS = 5  # significant, of a curve
_TERMS: tuple[Term, ...] = get_args(Term)


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
    pairs = _parts(last, STRETCHES)
    stretches = tuple(_stretch([line for log in logs for line in log[a:b]]) for a, b in pairs)
    bins = _parts(last, min(last, POINTS))
    curves = {term: _curve(logs, bins, term) for term in _TERMS}
    course = Course(
        arm=name,
        seeds=tuple(run.seed for run in runs),
        stretches=stretches,
        points=tuple(_short(fmean(line.step for line in logs[0][a:b])) for a, b in bins),
        curves={
            term: curve for term, curve in curves.items() if any(v is not None for v in curve.mean)
        },
    )
    betas = [line.beta for log in logs for line in log if line.beta is not None]
    bounds = [_bounds(run) for run in runs]
    known = [bound for bound in bounds if bound is not None]
    if not betas or len(known) < len(runs):
        return course
    stuck = [
        line.beta in bound
        for log, bound in zip(logs, known, strict=True)
        for line in log
        if line.beta is not None
    ]
    told = {"beta_range": (min(betas), max(betas)), "beta_at_bound": fmean(stuck)}
    return course.model_copy(update=told)


def _parts(length: int, count: int) -> list[tuple[int, int]]:
    """Cut range(length) into `count` neighbouring parts of like size, empty ones left out."""
    edges = [length * i // count for i in range(count + 1)]
    return [(a, b) for a, b in itertools.pairwise(edges) if b > a]


def _curve(logs: Sequence[Sequence[_Step]], bins: Sequence[tuple[int, int]], term: Term) -> Curve:
    """Each seed's mean over the steps of a point, then mean, lowest and highest over seeds."""
    by_point = [
        [value for log in logs if (value := _mean(log[a:b], term)) is not None] for a, b in bins
    ]
    mean = tuple(_short(fmean(values)) if values else None for values in by_point)
    if len(logs) == 1:
        return Curve(mean=mean)
    return Curve(
        mean=mean,
        low=tuple(_short(min(values)) if values else None for values in by_point),
        high=tuple(_short(max(values)) if values else None for values in by_point),
    )


def _mean(lines: Sequence[_Step], term: Term) -> float | None:
    values = [value for line in lines if (value := getattr(line, term)) is not None]
    return fmean(values) if values else None


def _short(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")


def _stretch(lines: Sequence[_Step]) -> Stretch:
    means = {term: _mean(lines, term) for term in _TERMS}
    steps = [line.step for line in lines]
    return Stretch.model_validate({"first": min(steps), "last": max(steps), **means})


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
