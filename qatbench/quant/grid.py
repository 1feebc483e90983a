"""The INT grid that every method shares: groups, scales and codes, and how far they are off.

A weight (out, in) is cut along its inputs into groups of equal length; each group has one positive
scale; a weight is the integer `code` times that scale. RTN, GPTQ and LSQ differ only in how they
choose the two. Scales are always values that fp16 holds, because checkpoints store them so.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qatbench.errors import NumericsError, ShapeError, UsageError

RTN_RATIOS = tuple(percent / 100 for percent in range(30, 121, 2))
"""46 ratios 0.30, 0.32, ..., 1.20: a dense search for weights that are not trained afterwards."""

LSQ_RATIOS = tuple(0.3 + 0.9 * step / 19 for step in range(20))
"""GRACE's 20 evenly spaced ratios 0.3 .. 1.2 (arXiv:2601.22709, its released code)."""

SMALLEST_SCALE = 2.0**-14
"""The smallest normal fp16: below it a scale loses bits, and some kernels flush it to zero."""

LARGEST_FP16 = 65504.0
# Weights searched at a time: on a CPU the temporaries stay in a core's cache, elsewhere a kernel's
# work should outlast its launch.
_BLOCK, _DEVICE_BLOCK = 1 << 18, 1 << 24


@dataclass(frozen=True)
class Grid:
    """A symmetric signed integer grid.

    Raises: UsageError for other bits or group sizes than those below.
    """

    bits: int
    """2, 3, 4 or 8."""
    group_size: int
    """Inputs that share a scale, a positive multiple of 8; -1 = the whole row."""

    def __post_init__(self) -> None:
        if self.bits not in (2, 3, 4, 8):
            raise UsageError(f"bits = {self.bits}: no such grid", hint="use 2, 3, 4 or 8 bits")
        if self.group_size != -1 and (self.group_size < 8 or self.group_size % 8):
            raise UsageError(
                f"group size {self.group_size} is not a positive multiple of 8",
                hint="use 32, 64 or 128, or -1 for one group a row",
            )

    @property
    def qmin(self) -> int:
        """The lowest code, -2^(bits-1)."""
        return -(1 << (self.bits - 1))

    @property
    def qmax(self) -> int:
        """The highest code, 2^(bits-1) - 1."""
        return (1 << (self.bits - 1)) - 1

    def groups(self, in_features: int, name: str = "") -> int:
        """Count the groups in a row of `in_features` weights.

        Raises: ShapeError if the group size does not divide the row; it is never changed in
            silence.
        """
        if in_features < 1:
            raise ShapeError(f"{name or 'layer'}: {in_features} inputs")
        if self.group_size == -1:
            return 1
        if in_features % self.group_size:
            raise ShapeError(
                f"{name or 'layer'}: group size {self.group_size} does not divide "
                f"{in_features} inputs",
                hint=f"choose a group size that divides {in_features}, or -1 for the whole row",
            )
        return in_features // self.group_size


def grouped(weight: Tensor, grid: Grid, name: str = "") -> Tensor:
    """View (out, in) as (out, groups, inputs of a group).

    Raises: ShapeError if `weight` is not a matrix, is empty, or its rows cannot be cut.
    """
    if weight.ndim != 2 or not weight.numel():
        raise ShapeError(f"{name or 'weight'}: a matrix is needed, got {tuple(weight.shape)}")
    return weight.reshape(weight.shape[0], grid.groups(weight.shape[1], name), -1)


def round_scales(scales: Tensor, grid: Grid) -> Tensor:
    """Take the nearest scales that a checkpoint can hold: same shape, fp32.

    Rounded to fp16 and kept within [2^-14, 65504 / 2^(bits-1)]: no scale is subnormal, and no
    code times its scale overflows when a loader multiplies in fp16. NaN stays NaN.
    """
    return scales.clamp(SMALLEST_SCALE, LARGEST_FP16 / -grid.qmin).half().float()


def stored_scales(log_scale: Tensor, grid: Grid) -> Tensor:
    """Take the scales of their logarithms as a checkpoint stores them: same shape, fp32.

    exp is taken in fp64, where no device's differs enough to end on another fp16: what is trained
    on one and packed on another has the same scales.
    """
    return round_scales(log_scale.double().exp().float(), grid)


def over_scales(weight: Tensor, scales: Tensor, grid: Grid, name: str = "") -> Tensor:
    """Place each weight on the grid, w / s, before rounding.

    Shapes: weight (out, in) of any float dtype; scales (out, groups).
    Returns: a new (out, groups, inputs of a group) tensor, fp32 (fp64 for an fp64 weight).
    Raises: ShapeError if the scales are not one a group.
    """
    groups = grouped(weight, grid, name)
    _check_scales(scales, groups, name)
    wide = torch.promote_types(weight.dtype, torch.float32)
    return groups.to(wide) / scales.to(wide).unsqueeze(-1)


def quantize(weight: Tensor, scales: Tensor, grid: Grid, *, name: str = "") -> Tensor:
    """Codes of the weights: round(w / s), ties to even, clamped to [qmin, qmax].

    Shapes: weight (out, in) of any float dtype; scales (out, groups).
    Returns: (out, in) int8.
    Raises: ShapeError if the shapes do not belong together; NumericsError if a weight is not
        finite, or a scale not finite and positive.
    """
    _check_positive(scales, name)
    place = over_scales(weight.detach(), scales.detach(), grid, name)
    if not torch.isfinite(place).all():
        raise NumericsError(f"{name or 'weight'}: weights over scales are not finite")
    return place.round_().clamp_(grid.qmin, grid.qmax).flatten(1).to(torch.int8)


def dequantize(codes: Tensor, scales: Tensor, grid: Grid, *, name: str = "") -> Tensor:
    """Codes times scales: the weights that a quantized layer really has.

    The product is exact in fp32 when the scales are fp16 values (8 + 11 significant bits).
    Shapes: codes (out, in) integers; scales (out, groups).
    Returns: (out, in) fp32.
    Raises: ShapeError if the shapes do not belong together.
    """
    groups = grouped(codes, grid, name)
    _check_scales(scales, groups, name)
    return (groups.float() * scales.float().unsqueeze(-1)).flatten(1)


def search_scales(
    weight: Tensor, grid: Grid, *, ratios: Sequence[float] = RTN_RATIOS, name: str = ""
) -> Tensor:
    """For each group the scale of least squared error among ratio * max|w| / qmax.

    Ratio 1 is always a candidate and wins ties, so the result is never worse than plain
    round to nearest. Every candidate is rounded as it will be stored before it is judged.
    A group of zeros gets the smallest scale.

    Shapes: weight (out, in) of any float dtype.
    Returns: (out, groups) fp32, each value exact in fp16.
    Raises: ShapeError if the group size does not divide the rows; UsageError if a ratio is not
        positive and finite; NumericsError if a weight is NaN, infinite or beyond fp16's range.
    """
    if not all(math.isfinite(ratio) and ratio > 0 for ratio in ratios):
        raise UsageError(f"scale ratios must be positive and finite: {list(ratios)}")
    groups = grouped(weight.detach(), grid, name)
    for edge in torch.aminmax(groups):  # both are NaN if any weight is
        if not edge.abs().item() <= LARGEST_FP16:
            raise NumericsError(
                f"{name or 'weight'}: a weight is {edge.item()}, which no fp16 checkpoint can hold",
                hint="look for a diverged training or a damaged weight file",
            )
    block = _BLOCK if weight.device.type == "cpu" else _DEVICE_BLOCK
    rows = max(1, block // weight.shape[1])
    return torch.cat(
        [_search_block(block.float(), grid, ratios) for block in torch.split(groups, rows)]
    )


def sqnr_db(weight: Tensor, approximation: Tensor) -> float:
    """Signal-to-quantization-noise ratio in dB, 10 log10(|w|^2 / |w - a|^2), summed in fp64.

    Returns: inf where both are equal; -inf for an all-zero weight that is not reproduced.
    Raises: ShapeError if the shapes differ or are empty.
    """
    if weight.shape != approximation.shape or not weight.numel():
        raise ShapeError(f"SQNR of {tuple(weight.shape)} against {tuple(approximation.shape)}")
    signal = weight.double().square().sum().item()
    noise = (weight.double() - approximation.double()).square().sum().item()
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf


def _search_block(groups: Tensor, grid: Grid, ratios: Sequence[float]) -> Tensor:
    """search_scales for some rows: groups (rows, groups, inputs) fp32 -> (rows, groups) fp32."""
    full = groups.abs().amax(-1) / grid.qmax
    best = round_scales(full, grid)
    lowest = _squared_error(groups, best, grid)
    for ratio in ratios:  # one after another: a stacked tensor would be |ratios| times the weight
        scales = round_scales(full * ratio, grid)
        error = _squared_error(groups, scales, grid)
        better = error < lowest
        best = torch.where(better, scales, best)
        lowest = torch.where(better, error, lowest)
    return best


def _squared_error(groups: Tensor, scales: Tensor, grid: Grid) -> Tensor:
    """Squared error of each group on the grid: (rows, groups, inputs) -> (rows, groups)."""
    step = scales.unsqueeze(-1)
    rounded = (groups / step).round_().clamp_(grid.qmin, grid.qmax).mul_(step)
    return rounded.sub_(groups).square_().sum(-1)


def _check_scales(scales: Tensor, groups: Tensor, name: str) -> None:
    if scales.shape != groups.shape[:2]:
        raise ShapeError(
            f"{name or 'layer'}: scales {tuple(scales.shape)}, expected {tuple(groups.shape[:2])} "
            "(outputs, groups)"
        )


def _check_positive(scales: Tensor, name: str) -> None:
    if not (torch.isfinite(scales) & (scales > 0)).all():
        raise NumericsError(f"{name or 'layer'}: a scale is not finite and positive")
