"""Packed checkpoints read with this project's own unpacking: no quantization library is needed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qatbench.errors import ArtifactError
from qatbench.quant.packing import (
    Affine,
    affine_awq,
    affine_gptq,
    dequantize_awq,
    dequantize_gptq,
)
from qatbench.vlm.layout import Architecture, under

_PACKED = ("qweight", "qzeros", "scales", "g_idx")


def dequantized_state(path: Path, settings: Mapping[str, Any]) -> dict[str, Tensor]:
    """All weights of a packed checkpoint, packed linears as dense fp32 `.weight` tensors.

    `settings` is the quantization_config. Names are those in the files, whatever their spelling.

    Raises: ArtifactError on damaged files or a format that this project does not write; ShapeError
        when packed tensors do not belong together.
    """
    tensors = _tensors(path)
    form = _Form(settings)
    for name, present in form.linears(path, tensors):
        if form.method == "gptq":
            weight = dequantize_gptq(present, form.bits, form.size, v2=form.v2, name=name)
        else:
            weight = dequantize_awq(*form.awq(present), name=name)
        tensors[f"{name}.weight"] = weight
    return tensors


def affine_state(
    path: Path, settings: Mapping[str, Any], arch: Architecture, device: torch.device | str
) -> tuple[dict[str, Tensor], dict[str, Affine]]:
    """What a packed checkpoint holds, without multiplying it out.

    Returns: (unpacked tensors by their names in the files; packed linears by their names in memory,
        on `device`). A packed linear's `.weight` is among the first as zeros that take no memory.
    Raises: as `dequantized_state`; UsageError for inputs that are not grouped in order;
        ArtifactError for a packed linear outside the language model's layers.
    """
    tensors = _tensors(path)
    form = _Form(settings)
    found: dict[str, Affine] = {}
    for name, held in form.linears(path, tensors):
        present = {part: value.to(device) for part, value in held.items()}
        if form.method == "gptq":
            affine = affine_gptq(present, form.bits, form.size, v2=form.v2, name=name)
        else:
            affine = affine_awq(*form.awq(present), name=name)
        inside = [spelt for spelt in arch.spellings(name) if under(spelt, (arch.layers,))]
        if not inside:
            raise ArtifactError(f"{path}: {name} is packed and is no linear of {arch.layers}")
        found[inside[0]] = affine
        nothing = torch.zeros(1, dtype=torch.bfloat16)
        tensors[f"{name}.weight"] = nothing.expand(affine.fields.shape)
    return tensors, found


def _tensors(path: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    try:
        for file in sorted(path.glob("*.safetensors")):
            with safe_open(file, "pt") as stream:
                tensors |= {key: stream.get_tensor(key) for key in stream.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ArtifactError(f"damaged weights in {path}: {error}") from error
    return tensors


class _Form:
    """How a checkpoint is packed, by its quantization_config."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.method = settings.get("quant_method")
        self.bits, self.size = int(settings.get("bits", 0)), int(settings.get("group_size", 0))
        self.v2 = settings.get("checkpoint_format") == "gptq_v2"

    def linears(
        self, path: Path, tensors: dict[str, Tensor]
    ) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """Each packed linear with its tensors, which are taken out.

        Raises: ArtifactError for a format that this project does not write.
        """
        for key in [key for key in tensors if key.endswith(".qweight")]:
            name = key.removesuffix(".qweight")
            parts = {part: tensors.pop(f"{name}.{part}", None) for part in _PACKED}
            present = {part: value for part, value in parts.items() if value is not None}
            awq = self.method == "awq" and self.bits == 4 and len(present) == len(_PACKED) - 1
            if self.method != "gptq" and not awq:
                raise ArtifactError(f"{path}: cannot unpack {self.bits}-bit {self.method}")
            yield name, present

    def awq(self, present: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, int]:
        """What unpacking an AWQ linear takes."""
        return present["qweight"], present["qzeros"], present["scales"], self.size
