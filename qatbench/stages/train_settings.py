"""Everything that decides a training run: settings, their fingerprint, the schedule."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from qatbench.quant.result import Layout
from qatbench.records import Question
from qatbench.stages.objective import Distillation
from qatbench.tasks import sources
from qatbench.tasks.sources import Source

Method = Literal["sft", "kd", "qat", "grace"]
QUANTIZED = ("qat", "grace")
# Settings that came later: at their defaults they are left out of a spec, so that what was finished
# before keeps its fingerprint.
LATER = {
    "projector": "trained", "scale_gradient": "log", "optimizer": "adamw", "weights": "float32",
    "packing": "pack", "max_length": 2048, "layout": "auto",
}  # fmt: skip
LATER_DISTILLATION = {"tokens": "supervised"}
TAUGHT = ("kd", "grace")


@dataclass(frozen=True)
class ControllerSettings:
    """beta's controller (GRACE.md item 3); `rate` 0 keeps beta at `initial`."""

    target: float = 3.0
    rate: float = 0.003
    initial: float = 0.5
    low: float = 0.1
    high: float = 1.0
    ema: float = 0.99


@dataclass(frozen=True)
class TrainSettings:
    """Everything that decides a training run, but not where it runs.

    A micro-batch is one packed sequence; its size bounds memory and changes results by rounding.
    """

    method: Method
    steps: int
    bits: int = 4
    group_size: int = 128
    batch_size: int = 64
    micro_batch_size: int = 16
    lr: float = 1e-4
    scale_lr: float = 1e-3
    weight_decay: float = 0.0
    warmup: float = 0.1  # share of the steps
    clip: float = 1.0
    betas: tuple[float, float] = (0.9, 0.95)
    formats: tuple[str, ...] = ("qatbench",)
    seed: int = 0
    distillation: Distillation = field(default_factory=Distillation)
    controller: ControllerSettings = field(default_factory=ControllerSettings)
    omega: float = 3.0
    omega_warmup: int = 400  # steps
    projector: Literal["trained", "frozen", "quantized"] = "trained"
    scale_gradient: Literal["log", "lsq"] = "log"  # lsq: times 1 / sqrt(n * qmax)
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    weights: Literal["float32", "bfloat16"] = "float32"  # what the optimizer updates
    packing: Literal["pack", "group"] = "pack"  # samples side by side, or padded to like lengths
    max_length: int = 2048  # tokens of a sample
    layout: Layout = "auto"  # of the checkpoint's tensors

    def spec(
        self,
        student: str,
        teacher: str | None,
        data: Sequence[Question] | Sequence[Source],
        init: str | None = None,
        teacher_dtype: str = "auto",
    ) -> dict[str, Any]:
        """What decides the checkpoint; a method's spec holds only what it uses.

        `student`, `teacher` and `init` (the packed checkpoint that training starts from) are
        fingerprints.
        """
        spec = dataclasses.asdict(self)
        _drop(spec, LATER)
        _drop(spec["distillation"], LATER_DISTILLATION)
        if self.method not in QUANTIZED:
            for key in ("bits", "group_size", "scale_lr", "scale_gradient", "layout"):
                spec.pop(key, None)
            if self.projector == "quantized":  # there is no grid: it is trained
                spec.pop("projector", None)
        if self.method not in TAUGHT:
            del spec["distillation"]
        if self.method != "grace":
            for key in ("controller", "omega", "omega_warmup"):
                del spec[key]
        spec["betas"], spec["formats"] = list(self.betas), list(self.formats)
        if init is not None:
            spec["init"] = init
        if teacher_dtype != "auto" and self.method in TAUGHT:
            spec["teacher_dtype"] = teacher_dtype
        return spec | {
            "student": student,
            "teacher": teacher if self.method in TAUGHT else None,
            "data": sources.digest(sources.given(data)),
        }


def _drop(spec: dict[str, Any], defaults: dict[str, Any]) -> None:
    for key, default in defaults.items():
        if spec[key] == default:
            del spec[key]


def schedule(step: int, steps: int, warmup: float) -> float:
    """Linear warm-up over a share of the steps, then a cosine to zero: factor in (0, 1]."""
    warm = math.ceil(steps * warmup)
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))
