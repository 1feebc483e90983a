"""Packed checkpoints read with this project's own unpacking: no quantization library is needed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from qatbench.errors import ArtifactError
from qatbench.quant.packing import dequantize_awq, dequantize_gptq

_PACKED = ("qweight", "qzeros", "scales", "g_idx")


def dequantized_state(path: Path, settings: Mapping[str, Any]) -> dict[str, Tensor]:
    """All weights of a packed checkpoint, packed linears as dense fp32 `.weight` tensors.

    `settings` is the quantization_config. Names are those in the files, whatever their spelling.

    Raises: ArtifactError on damaged files or a format that this project does not write; ShapeError
        when packed tensors do not belong together.
    """
    tensors: dict[str, Tensor] = {}
    try:
        for file in sorted(path.glob("*.safetensors")):
            with safe_open(file, "pt") as stream:
                tensors |= {key: stream.get_tensor(key) for key in stream.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ArtifactError(f"damaged weights in {path}: {error}") from error
    method, bits = settings.get("quant_method"), int(settings.get("bits", 0))
    group_size = int(settings.get("group_size", 0))
    names = [key.removesuffix(".qweight") for key in tensors if key.endswith(".qweight")]
    for name in names:
        packed = {part: tensors.pop(f"{name}.{part}", None) for part in _PACKED}
        present = {part: value for part, value in packed.items() if value is not None}
        if method == "gptq":
            v2 = settings.get("checkpoint_format") == "gptq_v2"
            weight = dequantize_gptq(present, bits, group_size, v2=v2, name=name)
        elif method == "awq" and bits == 4 and len(present) == len(_PACKED) - 1:
            weight = dequantize_awq(
                present["qweight"], present["qzeros"], present["scales"], group_size, name=name
            )
        else:
            raise ArtifactError(f"{path}: cannot unpack {bits}-bit {method}")
        tensors[f"{name}.weight"] = weight
    return tensors
