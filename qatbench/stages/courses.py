"""How trainings went, from the train.jsonl that a trained arm's results hold."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from qatbench.errors import ArtifactError
from qatbench.report.model import Course, Stretch
from qatbench.stages.arms import Arm, Run, section

LOG = "train.jsonl"
STRETCHES = 5  # a training is told in
_TERMS = ("ce", "kd", "rcka", "gate", "beta")


def courses(arms: Sequence[Arm]) -> tuple[Course, ...]:
    """The course of every arm that was trained here, in the order of the arms.

    Raises: ArtifactError when a log is damaged.
    """
    told = []
    for arm in arms:
        runs = [run for run in arm.runs if (run.folder / LOG).is_file()]
        if runs:
            told.append(_course(arm.name, runs))
    return tuple(told)


def _course(name: str, runs: Sequence[Run]) -> Course:
    logs = [_read(run.folder / LOG) for run in runs]
    last = min(len(log) for log in logs)
    edges = [last * i // STRETCHES for i in range(STRETCHES + 1)]
    pairs = [(a, b) for a, b in itertools.pairwise(edges) if b > a]
    stretches = tuple(_stretch([line for log in logs for line in log[a:b]]) for a, b in pairs)
    betas = [line["beta"] for log in logs for line in log if line.get("beta") is not None]
    bounds = [_bounds(run) for run in runs]
    known = [bound for bound in bounds if bound is not None]
    if not betas or len(known) < len(runs):
        return Course(arm=name, seeds=tuple(run.seed for run in runs), stretches=stretches)
    stuck = [
        line["beta"] in bound
        for log, bound in zip(logs, known, strict=True)
        for line in log
        if line.get("beta") is not None
    ]
    return Course(
        arm=name,
        seeds=tuple(run.seed for run in runs),
        stretches=stretches,
        beta_range=(min(betas), max(betas)),
        beta_at_bound=fmean(stuck),
    )


def _stretch(lines: Sequence[dict[str, Any]]) -> Stretch:
    means = {}
    for term in _TERMS:
        values = [line[term] for line in lines if line.get(term) is not None]
        means[term] = fmean(values) if values else None
    steps = [line["step"] for line in lines]
    return Stretch(first=min(steps), last=max(steps), **means)


def _bounds(run: Run) -> tuple[float, float] | None:
    spec = section(run.checkpoint, "spec")
    controller = section(spec, "controller")
    moves = spec.get("method") == "grace" and controller.get("rate")
    if not moves or not {"low", "high"} <= controller.keys():
        return None
    return float(controller["low"]), float(controller["high"])


def _read(path: Path) -> list[dict[str, Any]]:
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        if not lines or not all({"step", "ce"} <= line.keys() for line in lines):
            raise ValueError("no steps")
    except (ValueError, AttributeError) as error:
        raise ArtifactError(f"{path} is damaged: {error}", hint="train this arm again") from error
    return lines
