"""What `train` is asked for: settings, inputs and how to run them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from qatbench.records import Question
from qatbench.stages import card
from qatbench.stages.train_settings import TrainSettings
from qatbench.tasks import sources
from qatbench.tasks.sources import Item, Source
from qatbench.vlm.load import ModelFolder


@dataclass(frozen=True)
class TrainRequest:
    """Settings, inputs and how to run them."""

    settings: TrainSettings
    student: ModelFolder
    teacher: ModelFolder | None
    questions: Sequence[Question] | Sequence[Source]
    device: str | None = None
    save_every: int = 50
    dtype: str | None = None  # of activations and the teacher; default by device
    init: ModelFolder | None = None  # a packed checkpoint of the student to start from
    teacher_dtype: Literal["auto", "int8"] = "auto"  # of the frozen teacher's weights
    checkpointing: bool = False  # recompute activations in the backward pass
    kept_blocks: int = 0  # but for those of the last decoder blocks
    compile: bool | None = None  # the fake quantization; default: on CUDA
    compile_blocks: bool = False  # the decoder blocks of student and teacher
    remarks: tuple[str, ...] = ()  # on the training data, for the report
    leakage: tuple[str, ...] = ()  # which evaluation questions are among them, for the report
    places: Mapping[str, str] = field(default_factory=dict)  # of a task's data, for the card

    def how(self, device: str) -> dict[str, Any]:
        """What `student.prepare` is told of memory and compilation, for a type of device."""
        compiles = self.compile
        if compiles is None:
            compiles = device == "cuda" and not torch._dynamo.config.disable
        return {
            "checkpointing": self.checkpointing,
            "kept_blocks": self.kept_blocks,
            "compile": compiles,
            "compile_blocks": self.compile_blocks,
        }

    @property
    def samples(self) -> list[Item]:
        """All training samples."""
        return [item for source in sources.given(self.questions) for item in source.items]

    @property
    def origin(self) -> dict[str, Any]:
        """Base, teacher, sources and seed, for the record and the model card."""
        given = sources.given(self.questions)
        data = [
            {"name": s.name, "n": len(s.items), "place": self.places.get(s.name.split(":")[0])}
            | ({"weight": s.weight} if len(given) > 1 else {})
            for s in given
        ]
        return card.origin(self.student, data, self.settings.seed, self.teacher)
