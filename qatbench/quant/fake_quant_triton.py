"""The arithmetic of group-wise LSQ as two Triton kernels: one pass over the weights each way.

The formulas are in `qatbench.quant.lsq`. Against `torch.compile` of the same arithmetic, a kernel
is launched in a fraction of the host's time, which is what a layer of 7B waits for below about
2000 tokens; and it is one operator to whoever compiles the model around it.

Weights of 2 + 2 bytes a pass forward, 2 + 2 + 2 backward in bf16. Codes are those of the eager
arithmetic to the bit: division rounds to nearest (div_rn), scales are clamped and go through fp16
as `grid.round_scales` has it, and their exp is torch's own.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from qatbench.quant import grid as grids
from qatbench.quant.grid import Grid

TILE = 4096
"""Weights that a program holds, unless one group is longer."""
_ROUNDER = tl.constexpr(1.5 * 2**23)  # x + it - it rounds |x| < 2^22 to an integer, ties to even


def fused(
    weight: Tensor, log_scale: Tensor, grid: Grid, gradient_factor: float, dtype: torch.dtype
) -> Tensor:
    """`fake_quant` in these kernels: weight (out, in), log_scale (out, groups) fp32 -> (out, in).

    The weight is of 16 or 32 bits, on CUDA.
    """
    result: Tensor = _Fused.apply(weight, log_scale, grid, gradient_factor, dtype)
    return result


class _Fused(torch.autograd.Function):
    """One pass over the weights each way; keeps them and one number a scale."""

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        log_scale: Tensor,
        grid: Grid,
        gradient_factor: float,
        dtype: torch.dtype,
    ) -> Tensor:
        scales = log_scale.exp()
        ctx.save_for_backward(weight, scales)
        ctx.grid, ctx.gradient_factor = grid, gradient_factor
        return quantized(weight, scales, grid, dtype)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, scales = ctx.saved_tensors
        return *gradients(grad, weight, scales, ctx.grid, ctx.gradient_factor), None, None, None


def quantized(weight: Tensor, scales: Tensor, grid: Grid, dtype: torch.dtype) -> Tensor:
    """Codes times scales: weight (out, in), scales (out, groups) fp32 as they are learned."""
    weight, scales = weight.contiguous(), scales.contiguous()
    out = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    group, rows, width, warps = _tile(weight, scales)
    with _on(weight):
        _quantize[(triton.cdiv(scales.numel(), rows),)](
            weight, scales, out, scales.numel(), *_bounds(grid), group, rows, width,
            num_warps=warps,
        )  # fmt: skip
    return out


def gradients(
    grad: Tensor, weight: Tensor, scales: Tensor, grid: Grid, gradient_factor: float
) -> tuple[Tensor, Tensor]:
    """Gradients of the weight (out, in) in its dtype and of the scales' logs (out, groups) fp32."""
    grad, weight, scales = grad.contiguous(), weight.contiguous(), scales.contiguous()
    by_weight, by_scale = torch.empty_like(weight), torch.empty_like(scales)
    group, rows, width, warps = _tile(weight, scales)
    with _on(weight):
        _straight_through[(triton.cdiv(scales.numel(), rows),)](
            grad, weight, scales, by_weight, by_scale, scales.numel(), gradient_factor,
            *_bounds(grid), group, rows, width, num_warps=warps,
        )  # fmt: skip
    return by_weight, by_scale


def _tile(weight: Tensor, scales: Tensor) -> tuple[int, int, int, int]:
    """Weights of a group, groups of a tile, its width (a power of two) and warps."""
    group = weight.numel() // scales.numel()
    width = 1 << (group - 1).bit_length()
    rows = max(1, TILE // width)
    return group, rows, width, 4 if rows * width <= TILE else 16


def _bounds(grid: Grid) -> tuple[float, float, float, float]:
    """Lowest and highest code, smallest and largest scale."""
    largest = grids.LARGEST_FP16 / -grid.qmin
    return float(grid.qmin), float(grid.qmax), grids.SMALLEST_SCALE, largest


def _on(weight: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Launch where the tensor is."""
    if weight.is_cuda and weight.get_device() != torch.cuda.current_device():
        return torch.cuda.device(weight.device)
    return contextlib.nullcontext()


# --- the kernels ----------------------------------------------------------------------------------


@triton.jit  # type: ignore[untyped-decorator]
def _held(values, low, high):  # type: ignore[no-untyped-def]
    """Clamp as torch does: NaN stays NaN."""
    return tl.where(values < low, low, tl.where(values > high, high, values))


@triton.jit  # type: ignore[untyped-decorator]
def _steps(scales, rows, groups, SMALLEST: tl.constexpr, LARGEST: tl.constexpr):  # type: ignore[no-untyped-def]
    """Load scales as a checkpoint stores them."""
    learned = tl.load(scales + rows, mask=rows < groups, other=1.0)
    return _held(learned, SMALLEST, LARGEST).to(tl.float16).to(tl.float32)


@triton.jit  # type: ignore[untyped-decorator]
def _quantize(  # type: ignore[no-untyped-def]
    weight, scales, out, groups,
    LOW: tl.constexpr, HIGH: tl.constexpr, SMALLEST: tl.constexpr, LARGEST: tl.constexpr,
    GROUP: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, WIDTH)
    here = (rows < groups)[:, None] & (columns < GROUP)[None, :]
    at = rows[:, None] * GROUP + columns[None, :]
    step = _steps(scales, rows, groups, SMALLEST, LARGEST)[:, None]
    place = tl.div_rn(tl.load(weight + at, mask=here, other=0.0).to(tl.float32), step)
    codes = (_held(place, LOW, HIGH) + _ROUNDER) - _ROUNDER
    tl.store(out + at, (codes * step).to(out.dtype.element_ty), mask=here)


@triton.jit  # type: ignore[untyped-decorator]
def _straight_through(  # type: ignore[no-untyped-def]
    grad, weight, scales, by_weight, by_scale, groups, factor,
    LOW: tl.constexpr, HIGH: tl.constexpr, SMALLEST: tl.constexpr, LARGEST: tl.constexpr,
    GROUP: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, WIDTH)
    here = (rows < groups)[:, None] & (columns < GROUP)[None, :]
    at = rows[:, None] * GROUP + columns[None, :]
    step = _steps(scales, rows, groups, SMALLEST, LARGEST)
    place = tl.div_rn(tl.load(weight + at, mask=here, other=0.0).to(tl.float32), step[:, None])
    upstream = tl.load(grad + at, mask=here, other=0.0).to(tl.float32)
    inside = ((place >= LOW) & (place <= HIGH)).to(tl.float32)
    tl.store(by_weight + at, (upstream * inside).to(by_weight.dtype.element_ty), mask=here)
    codes = (_held(place, LOW, HIGH) + _ROUNDER) - _ROUNDER
    summed = tl.sum(upstream * (codes - place * inside), axis=1)
    tl.store(by_scale + rows, summed * step * factor, mask=rows < groups)
