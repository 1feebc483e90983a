"""What answers the questions of an evaluation: a model, and the engine that writes for it."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from qatbench.engine import pick, writing
from qatbench.errors import PrerequisiteError, UsageError
from qatbench.stages.common import Progress
from qatbench.vlm import load as models
from qatbench.vlm.answer import Writer
from qatbench.vlm.kernel import pick_kernel
from qatbench.vlm.load import Loaded, ModelFolder


class Wanted(Protocol):
    """What of an evaluation's settings decides it."""

    @property
    def mode(self) -> str:
        """`options` or `generate`."""

    @property
    def kernel(self) -> str:
        """`auto`, `library` or `dense`."""

    @property
    def engine(self) -> str:
        """`auto`, `transformers` or `qatbench`."""


@dataclass(frozen=True)
class Answerer:
    """A loaded model; `write` is None where the plain model writes; `record` says what runs."""

    loaded: Loaded
    write: Writer | None
    record: dict[str, Any]


def check_engine(wanted: Wanted) -> None:
    """Refuse what does not go together.

    Raises: UsageError when this project's engine is asked for with option mode, or with a kernel.
    """
    if wanted.engine == "qatbench" and wanted.mode != "generate":
        raise UsageError("option mode is one forward of the plain model", hint="--mode generate")
    if wanted.engine == "qatbench" and wanted.kernel != "auto":
        raise UsageError(
            f"--kernel {wanted.kernel} is of the engine transformers",
            hint="leave out --engine or --kernel",
        )


def answerer(
    wanted: Wanted, model: ModelFolder, device: str, dtype: torch.dtype, progress: Progress
) -> Answerer:
    """Load a model for an evaluation.

    Option mode is one forward of the plain model. In generate mode this project's engine writes,
    unless it cannot run the model here, which progress and the record then say, or another one was
    asked for. What a machine lacks is found before the engine loads anything.

    Raises: UsageError when an engine is asked for that cannot run the model, PrerequisiteError when
        it lacks a part of CUDA; what loading raises.
    """
    record: dict[str, Any] = {}
    if wanted.mode == "generate" and wanted.engine != "transformers" and wanted.kernel == "auto":
        try:
            return _by_engine(model, device, dtype, progress)
        except (PrerequisiteError, UsageError) as error:
            if wanted.engine == "qatbench":
                raise
            record["engine_note"] = f"not by the engine qatbench: {error.message}"
            progress(f"Answers {record['engine_note']}", 0, 0)
    kernel = pick_kernel(model, device, dtype) if wanted.kernel == "auto" else wanted.kernel
    loaded = models.load(model, device=device, dtype=dtype, kernel=kernel)
    record = {"kernel": models.kernel_name(loaded)} | record
    if wanted.mode == "generate":
        record["engine"] = "transformers"
    return Answerer(loaded, None, record)


def _by_engine(model: ModelFolder, device: str, dtype: torch.dtype, progress: Progress) -> Answerer:
    runner = pick.load("qatbench", model, device=device, dtype=dtype, progress=progress)
    record = {"kernel": runner.kernel, "engine": runner.engine, "attention": runner.attention}
    return Answerer(runner.loaded, functools.partial(writing.texts, runner), record)
