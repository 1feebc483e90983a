"""Packed INT4 tensors: the GPTQ and AWQ layouts that other tools load.

Both store unsigned fields, code + zero, in int32 words (`fields`): field i occupies bits
[i * bits, (i + 1) * bits) of a stream. At 3 bits fields straddle words (32 fields in 3 words).

GPTQ  qweight (in * bits / 32, out): the stream runs down the inputs of an output.
      qzeros (groups, out * bits / 32): the stream runs along the outputs; "v1" stores zero - 1.
      scales (groups, out) fp16; g_idx (in,) int32 names each input's group.
AWQ   qweight (in, out / 8), qzeros (groups, out / 8): the stream runs along the outputs, and every
      eight of them are stored in the order 0, 2, 4, 6, 1, 3, 5, 7; zeros as they are; no g_idx.

Source: gptqmodel 7.7.0, `nn_modules/qlinear/__init__.py`, `quantization/awq/utils/packing_utils.py`
and `utils/model.py:convert_gptq_v1_to_v2_format_module`; the tests compare with all three.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from qatbench.errors import ArtifactError, NumericsError, ShapeError, UsageError
from qatbench.quant.fields import (
    WORD,
    pack_awq_fields,
    pack_fields,
    unpack_awq_fields,
    unpack_fields,
)
from qatbench.quant.grid import Grid, grouped


class Affine(NamedTuple):
    """A linear as its checkpoint has it: weight = (field - zero) * scale, by groups of inputs."""

    fields: Tensor  # (out, in) uint8
    zeros: Tensor  # (out, groups) uint8
    scales: Tensor  # (out, groups) fp16


def pack_gptq(codes: Tensor, scales: Tensor, grid: Grid, *, name: str = "") -> dict[str, Tensor]:
    """Symmetric codes and scales as the tensors of a GPTQ v1 linear.

    Shapes: codes (out, in) int8; scales (out, groups), each value exact in fp16.
    Returns: qweight, qzeros, g_idx (int32) and scales (fp16), laid out as above.
    Raises: ShapeError if in * bits or out * bits is no multiple of 32, or the scales do not fit;
        NumericsError if a code is off the grid or a scale is not an fp16 value.
    """
    half = _checked_scales(codes, scales, grid, name)
    out_features, in_features = codes.shape
    zeros = torch.full((half.shape[1], out_features), -grid.qmin - 1, device=codes.device)
    span = in_features // half.shape[1]
    return {
        "qweight": pack_fields(codes.T.to(torch.int16) - grid.qmin, grid.bits, f"{name} inputs"),
        "qzeros": pack_fields(zeros.T, grid.bits, f"{name} outputs").T.contiguous(),
        "scales": half.T.contiguous(),
        "g_idx": torch.arange(in_features, device=codes.device, dtype=torch.int32) // span,
    }


def unpack_gptq(
    tensors: Mapping[str, Tensor], grid: Grid, *, name: str = ""
) -> tuple[Tensor, Tensor]:
    """Undo `pack_gptq` exactly.

    Returns: codes (out, in) int8 and scales (out, groups) fp32.
    Raises: ShapeError if the tensors do not belong together; ArtifactError if one is missing, a
        zero point is not the symmetric one (stored as 2^(bits-1) - 1), or the inputs are not
        grouped in order; see `dequantize_gptq`.
    """
    qweight, qzeros, scales, g_idx = (
        _take(tensors, key, name) for key in ("qweight", "qzeros", "scales", "g_idx")
    )
    fields = unpack_fields(qweight, grid.bits, f"{name} qweight")
    codes = (fields.to(torch.int16) + grid.qmin).to(torch.int8).T.contiguous()
    groups = grouped(codes, grid, name)
    _expect_shape(scales, (groups.shape[1], groups.shape[0]), f"{name} scales")
    zeros = unpack_fields(qzeros.T, grid.bits, f"{name} qzeros").T
    _expect_shape(zeros, tuple(scales.shape), f"{name} zeros")
    if not (zeros == -grid.qmin - 1).all():
        raise ArtifactError(
            f"{name or 'layer'}: zero points are not those of a symmetric GPTQ v1 layer",
            hint="it is asymmetric, or in the gptq_v2 format: read it with dequantize_gptq",
        )
    in_order = torch.arange(codes.shape[1], device=g_idx.device) // groups.shape[2]
    if not torch.equal(g_idx.long(), in_order):
        raise ArtifactError(
            f"{name or 'layer'}: g_idx does not group the inputs in order (desc_act)",
            hint="read it with dequantize_gptq",
        )
    return codes, scales.float().T.contiguous()


def dequantize_gptq(
    tensors: Mapping[str, Tensor], bits: int, group_size: int, *, v2: bool = False, name: str = ""
) -> Tensor:
    """Weights of any GPTQ linear: any zero points, any order of the groups.

    `v2` says that the zeros are stored as they are (checkpoint_format "gptq_v2"). Without g_idx
    the inputs are taken to be grouped in order, as vLLM does.

    Returns: (out, in) fp32.
    Raises: ShapeError if the tensors do not belong together; ArtifactError if a tensor is missing
        or g_idx names a group that is not there.
    """
    fields, zeros, scales, row = _gptq_parts(tensors, bits, group_size, v2, name)
    return ((fields.float() - zeros.float()[row]) * scales.float()[row]).T.contiguous()


def affine_gptq(
    tensors: Mapping[str, Tensor], bits: int, group_size: int, *, v2: bool = False, name: str = ""
) -> Affine:
    """A GPTQ linear whose inputs are grouped in order, without multiplying anything out.

    Raises: as `dequantize_gptq`; UsageError if the inputs are not grouped in order.
    """
    fields, zeros, scales, g_idx = _gptq_parts(tensors, bits, group_size, v2, name)
    span = fields.shape[0] // scales.shape[0]
    if not torch.equal(g_idx, torch.arange(len(g_idx), device=g_idx.device) // span):
        raise UsageError(
            f"{name or 'layer'}: g_idx does not group the inputs in order (desc_act)",
            hint="--engine transformers",
        )
    return Affine(fields.T.contiguous(), zeros.T.contiguous(), scales.T.contiguous())


def _gptq_parts(
    tensors: Mapping[str, Tensor], bits: int, group_size: int, v2: bool, name: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(fields (in, out), zeros (groups, out), scales, group of each input), checked."""
    qweight, qzeros, scales = (_take(tensors, key, name) for key in ("qweight", "qzeros", "scales"))
    grid = Grid(bits, group_size)
    fields = unpack_fields(qweight, bits, f"{name} qweight")
    groups = grid.groups(fields.shape[0], name)
    _expect_shape(scales, (groups, fields.shape[1]), f"{name} scales")
    zeros = _stored_zeros(qzeros, bits, v2, name)
    _expect_shape(zeros, tuple(scales.shape), f"{name} zeros")
    g_idx = tensors.get("g_idx")
    if g_idx is None:
        g_idx = torch.arange(fields.shape[0], device=fields.device) // (fields.shape[0] // groups)
    _expect_shape(g_idx, (fields.shape[0],), f"{name} g_idx")
    if g_idx.min() < 0 or g_idx.max() >= groups:
        raise ArtifactError(f"{name or 'layer'}: g_idx names a group beyond the {groups} there are")
    return fields, zeros, scales, g_idx.long()


def pack_awq(codes: Tensor, scales: Tensor, grid: Grid, *, name: str = "") -> dict[str, Tensor]:
    """Symmetric 4-bit codes and scales as the tensors of an AWQ GEMM linear (zero point 8).

    Shapes: codes (out, in) int8; scales (out, groups), each value exact in fp16.
    Returns: qweight, qzeros (int32) and scales (fp16), laid out as above.
    Raises: UsageError if the grid has not 4 bits; ShapeError if out is no multiple of 8, or the
        scales do not fit; NumericsError if a code is off the grid or a scale is not an fp16 value.
    """
    _expect_four_bits(grid)
    half = _checked_scales(codes, scales, grid, name)
    zeros = torch.full((half.shape[1], codes.shape[0]), -grid.qmin, device=codes.device)
    return {
        "qweight": pack_awq_fields(codes.T.to(torch.int16) - grid.qmin, name),
        "qzeros": pack_awq_fields(zeros, name),
        "scales": half.T.contiguous(),
    }


def unpack_awq(
    tensors: Mapping[str, Tensor], grid: Grid, *, name: str = ""
) -> tuple[Tensor, Tensor]:
    """Undo `pack_awq` exactly.

    Returns: codes (out, in) int8 and scales (out, groups) fp32.
    Raises: UsageError if the grid has not 4 bits; ShapeError if the tensors do not belong together;
        ArtifactError if one is missing or a zero point is not 8.
    """
    _expect_four_bits(grid)
    qweight, qzeros, scales = (_take(tensors, key, name) for key in ("qweight", "qzeros", "scales"))
    fields, zeros = unpack_awq_fields(qweight, name), unpack_awq_fields(qzeros, name)
    codes = (fields.to(torch.int16) + grid.qmin).to(torch.int8).T.contiguous()
    groups = grouped(codes, grid, name)
    _expect_shape(scales, (groups.shape[1], groups.shape[0]), f"{name} scales")
    _expect_shape(zeros, tuple(scales.shape), f"{name} zeros")
    if not (zeros == -grid.qmin).all():
        raise ArtifactError(
            f"{name or 'layer'}: zero points are not 8, the layer is asymmetric",
            hint="read it with dequantize_awq",
        )
    return codes, scales.float().T.contiguous()


def dequantize_awq(
    qweight: Tensor, qzeros: Tensor, scales: Tensor, group_size: int, *, name: str = ""
) -> Tensor:
    """Weights of an AWQ GEMM 4-bit linear with any zero points.

    Returns: (out, in) fp32.
    Raises: ShapeError if the tensors do not belong together.
    """
    fields, zeros, scales = affine_awq(qweight, qzeros, scales, group_size, name=name)
    groups = fields.reshape(*zeros.shape, -1).float()
    return ((groups - zeros.float().unsqueeze(2)) * scales.float().unsqueeze(2)).flatten(1)


def affine_awq(
    qweight: Tensor, qzeros: Tensor, scales: Tensor, group_size: int, *, name: str = ""
) -> Affine:
    """An AWQ GEMM 4-bit linear without multiplying anything out.

    Raises: ShapeError if the tensors do not belong together.
    """
    fields, zeros = unpack_awq_fields(qweight, name), unpack_awq_fields(qzeros, name)
    groups = Grid(4, group_size).groups(fields.shape[0], name)
    _expect_shape(scales, (groups, fields.shape[1]), f"{name} scales")
    _expect_shape(zeros, tuple(scales.shape), f"{name} zeros")
    return Affine(fields.T.contiguous(), zeros.T.contiguous(), scales.T.contiguous())


def _stored_zeros(qzeros: Tensor, bits: int, v2: bool, name: str) -> Tensor:
    """Zero points (groups, out) uint8 of a GPTQ layer.

    v1's missing 1 is added as gptqmodel does: to whole words at 2, 4 and 8 bits, where a field of
    all ones carries into its neighbour (its writer subtracted with the same borrow), and modulo 8
    to each field at 3 bits.
    """
    if not v2 and WORD % bits == 0:
        ones = sum(1 << shift for shift in range(0, WORD, bits))
        low = (qzeros.long() + ones) & 0xFFFFFFFF
        qzeros = ((low ^ 0x80000000) - 0x80000000).to(torch.int32)
    zeros = unpack_fields(qzeros.T, bits, f"{name} qzeros").T
    return (zeros + 1) & 7 if not v2 and bits == 3 else zeros


def _checked_scales(codes: Tensor, scales: Tensor, grid: Grid, name: str) -> Tensor:
    """Return the scales as fp16, once it is sure that packing loses nothing."""
    groups = grouped(codes, grid, name)
    _expect_shape(scales, tuple(groups.shape[:2]), f"{name} scales")
    if codes.dtype != torch.int8 or codes.min() < grid.qmin or codes.max() > grid.qmax:
        raise NumericsError(
            f"{name or 'layer'}: codes must be int8 in [{grid.qmin}, {grid.qmax}], got "
            f"{codes.dtype} in [{codes.min().item()}, {codes.max().item()}]"
        )
    half = scales.half()
    if not torch.isfinite(half).all() or not torch.equal(half.to(scales.dtype), scales):
        raise NumericsError(
            f"{name or 'layer'}: fp16 does not hold the scales exactly",
            hint="round them with grid.round_scales before quantizing",
        )
    return half


def _take(tensors: Mapping[str, Tensor], key: str, name: str) -> Tensor:
    if key not in tensors:
        raise ArtifactError(f"{name or 'layer'}: the packed tensor {key!r} is missing")
    return tensors[key]


def _expect_shape(tensor: Tensor, shape: tuple[int, ...], name: str) -> None:
    if tensor.shape != shape:
        raise ShapeError(f"{name.strip()}: {tuple(tensor.shape)}, expected {shape}")


def _expect_four_bits(grid: Grid) -> None:
    if grid.bits != 4:
        raise UsageError(f"AWQ is a 4-bit format, got {grid.bits} bits", hint="use gptq")
