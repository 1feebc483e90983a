"""What packed tensors say about themselves: width, groups, zero points and order of the inputs.

Shapes and fields only, so that a checkpoint whose config is wrong can be told from one whose
tensors are. The layouts are those of `packing`, and compressed-tensors' pack-quantized:
weight_packed (out, in * bits / 32), weight_scale (out, groups), weight_shape (2,).
"""

from __future__ import annotations

import torch
from torch import Tensor

from qatbench.errors import ShapeError
from qatbench.quant.fields import WORD, pack_fields

WEIGHTS = {"gptq": "qweight", "awq": "qweight", "compressed-tensors": "weight_packed"}
SCALES = {"gptq": "scales", "awq": "scales", "compressed-tensors": "weight_scale"}
GPTQ_BITS = (2, 3, 4, 8)
"""Widths of transformers; gptqmodel 7.7 also has AWQ at 2 to 8 bits, in its own order but at 4."""
VLLM_BITS = {"gptq": (4, 8), "awq": (4,), "compressed-tensors": (4, 8)}

Shape = tuple[int, ...]


def part_shapes(
    method: str, out: int, width: int, bits: int, group_size: int
) -> dict[str, Shape] | None:
    """Shapes of one linear's packed tensors, None where these sizes cannot be packed."""
    groups = 1 if group_size == -1 else width // group_size if group_size > 0 else 0
    packed = {"gptq": (width, out), "awq": (out,)}.get(method, (width,))
    if not groups or (group_size != -1 and width % group_size):
        return None
    if any(size * bits % WORD for size in packed):
        return None
    words = out * bits // WORD
    if method == "gptq":
        return {
            "qweight": (width * bits // WORD, out),
            "qzeros": (groups, words),
            "scales": (groups, out),
            "g_idx": (width,),
        }
    if method == "awq":
        return {"qweight": (width, words), "qzeros": (groups, words), "scales": (groups, out)}
    return {
        "weight_packed": (out, width * bits // WORD),
        "weight_scale": (out, groups),
        "weight_shape": (2,),
    }


def implied_bits(method: str, shape: Shape, out: int, width: int) -> int | None:
    """Bits of a weight, from the shape of the packed weights of an (out, in) linear."""
    if len(shape) != 2:
        return None
    words, whole, kept, other = {
        "gptq": (shape[0], width, shape[1], out),
        "awq": (shape[1], out, shape[0], width),
    }.get(method, (shape[1], width, shape[0], out))
    bits, rest = divmod(words * WORD, whole)
    return bits if kept == other and not rest and bits in (2, 3, 4, 8) else None


def implied_groups(method: str, shape: Shape, out: int, width: int) -> int | None:
    """Groups of an (out, in) linear, from the shape of its scales."""
    if len(shape) != 2:
        return None
    groups, outputs = shape if method != "compressed-tensors" else shape[::-1]
    return groups if outputs == out and groups and width % groups == 0 else None


def only_field(qzeros: Tensor, bits: int) -> int | None:
    """The field that all zero points (groups, out * bits / 32) store; None when they differ.

    Raises: ShapeError when they are no packed int32 matrix.
    """
    if qzeros.dtype != torch.int32 or qzeros.ndim != 2 or not qzeros.numel():
        raise ShapeError(f"{tuple(qzeros.shape)} {qzeros.dtype} are no packed zero points")
    field = int(qzeros[0, 0]) & ((1 << bits) - 1)
    words = 1 if WORD % bits == 0 else bits  # after which the stream repeats
    if qzeros.shape[1] % words:
        raise ShapeError(f"{tuple(qzeros.shape)} hold no whole periods of {bits} bits")
    pattern = pack_fields(torch.full((words * WORD // bits, 1), field), bits).flatten()
    alike = qzeros.reshape(-1, words) == pattern.to(qzeros.device)
    return field if bool(alike.all()) else None


def constant_zeros(groups: int, out: int, bits: int, field: int) -> Tensor:
    """Zero points that all store one field: (groups, out * bits / 32) int32.

    Raises: ShapeError when out * bits is no multiple of 32.
    """
    return pack_fields(torch.full((out, groups), field), bits, "outputs").T.contiguous()


def in_order(g_idx: Tensor, groups: int) -> bool:
    """Whether the inputs (in,) lie in groups of equal length, one after another."""
    width = g_idx.numel()
    return not width % groups and torch.equal(
        g_idx.long(), torch.arange(width) // (width // groups)
    )


def as_stored(part: str, value: Tensor) -> Tensor | None:
    """A packed tensor in the type that the formats define, None where that would lose bits.

    Words and g_idx: int32; scales: fp16.
    """
    if part in ("scales", "weight_scale"):
        half = value.to(torch.float16)
        return half if torch.equal(half.to(value.dtype), value) else None
    if value.dtype == torch.uint32:
        return value.view(torch.int32)
    if value.is_floating_point():
        return None
    words = value.to(torch.int32)
    return words if torch.equal(words.to(value.dtype), value) else None
