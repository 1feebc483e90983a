"""Packed checkpoints read with this project's own unpacking: no quantization library is needed."""

from __future__ import annotations

from collections.abc import Mapping
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
    method, bits, size = _settings(settings)
    for name in _packed_names(tensors):
        present = _taken(tensors, name)
        if method == "gptq":
            v2 = settings.get("checkpoint_format") == "gptq_v2"
            weight = dequantize_gptq(present, bits, size, v2=v2, name=name)
        elif method == "awq" and bits == 4 and len(present) == len(_PACKED) - 1:
            weight = dequantize_awq(
                present["qweight"], present["qzeros"], present["scales"], size, name=name
            )
        else:
            raise ArtifactError(f"{path}: cannot unpack {bits}-bit {method}")
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
    method, bits, size = _settings(settings)
    found: dict[str, Affine] = {}
    for name in _packed_names(tensors):
        present = {part: value.to(device) for part, value in _taken(tensors, name).items()}
        if method == "gptq":
            v2 = settings.get("checkpoint_format") == "gptq_v2"
            affine = affine_gptq(present, bits, size, v2=v2, name=name)
        elif method == "awq" and bits == 4 and len(present) == len(_PACKED) - 1:
            affine = affine_awq(
                present["qweight"], present["qzeros"], present["scales"], size, name=name
            )
        else:
            raise ArtifactError(f"{path}: cannot unpack {bits}-bit {method}")
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


def _settings(settings: Mapping[str, Any]) -> tuple[Any, int, int]:
    """Method, bits, group size."""
    bits, size = int(settings.get("bits", 0)), int(settings.get("group_size", 0))
    return settings.get("quant_method"), bits, size


def _packed_names(tensors: Mapping[str, Tensor]) -> list[str]:
    return [key.removesuffix(".qweight") for key in tensors if key.endswith(".qweight")]


def _taken(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """The packed tensors of one linear, taken out."""
    packed = {part: tensors.pop(f"{name}.{part}", None) for part in _PACKED}
    return {part: value for part, value in packed.items() if value is not None}
