"""The frozen teacher of a training run: loaded, checked against the student, made smaller."""

from __future__ import annotations

import torch

from qatbench.errors import PrerequisiteError, UsageError
from qatbench.stages.student import compile_decoder
from qatbench.vlm import layout
from qatbench.vlm import load as models
from qatbench.vlm.load import Loaded, ModelFolder


def load_teacher(
    folder: ModelFolder,
    student: Loaded,
    device: str,
    dtype: torch.dtype,
    weights: str,
    *,
    compile_blocks: bool = False,
) -> Loaded:
    """Load the teacher; `weights` is `auto` (those of `dtype`) or `int8`.

    Raises: UsageError when it does not speak the student's tokens; PrerequisiteError without
        torchao for `int8`.
    """
    teacher = models.load(folder, device=device, dtype=dtype)
    check_vocabulary(teacher, student)
    teacher.model.requires_grad_(False)
    if weights == "int8":
        to_int8(teacher)
    if compile_blocks:
        compile_decoder(teacher.model, teacher.arch)
    return teacher


def check_vocabulary(teacher: Loaded, student: Loaded) -> None:
    """Every token must mean the same to both; heads may be padded to different sizes.

    Raises: UsageError when the vocabularies differ, or a head has fewer rows than tokens.
    """
    names = f"{teacher.folder.name} and {student.folder.name}"
    if teacher.tokenizer.get_vocab() != student.tokenizer.get_vocab():
        raise UsageError(
            f"{names} have different vocabularies",
            hint="distillation needs a teacher with the student's tokenizer",
        )
    tokens = len(student.tokenizer)
    for loaded in (teacher, student):
        rows = loaded.model.get_output_embeddings().weight.shape[0]
        if rows < tokens:
            raise UsageError(
                f"{loaded.folder.name} has {rows} output rows for {tokens} tokens",
                hint="distillation needs logits of every token from both models",
            )


def to_int8(teacher: Loaded) -> None:
    """Hold the weights of the language model's linears in 8 bits, a scale a row, in place.

    Raises: PrerequisiteError without torchao; UsageError for a packed teacher.
    """
    if teacher.folder.quantization:
        raise UsageError(
            f"{teacher.folder.name} is quantized already", hint="leave --teacher-dtype out"
        )
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_  # type: ignore[import-untyped]
    except ImportError as error:
        raise PrerequisiteError(
            f"an int8 teacher needs torchao: {error}", hint="pip install 'torchao>=0.17'"
        ) from error
    names = set(layout.linear_shapes(teacher.folder.config))
    quantize_(teacher.model, Int8WeightOnlyConfig(), filter_fn=lambda _, name: name in names)
