"""The arithmetic of group-wise LSQ as two Triton kernels: one pass over the weights each way.

The formulas are in `qatbench.quant.lsq`. A weight in bf16 moves 2 + 2 bytes forward and 2 + 2 + 2
backward. Against `torch.compile` of the same arithmetic, a kernel is launched in a fraction of the
host's time, which is what a layer of 7B waits for below about 2000 tokens; inside a compiled block
the compiler launches it itself.

Codes are those of the eager arithmetic to the bit: division rounds to nearest (div_rn), and the
scales are found as `grid.stored_scales` finds them, in fp64.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.library import triton_op, wrap_triton

from qatbench.quant import grid as grids
from qatbench.quant.fake_quant import differentiable
from qatbench.quant.grid import Grid

TILE = 4096
"""Weights that a program holds, unless one group is longer."""


def fused(
    weight: Tensor, log_scale: Tensor, grid: Grid, gradient_factor: float, dtype: torch.dtype
) -> Tensor:
    """`fake_quant` in these kernels: weight (out, in), log_scale (out, groups) fp32 -> (out, in).

    The weight is of 16 or 32 bits, on CUDA.
    """
    result: Tensor = _Fused.apply(weight, log_scale, grid, gradient_factor, dtype)
    return result


class _Fused(torch.autograd.Function):
    """The operator below without the dispatcher, which costs the host as much as a launch."""

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        log_scale: Tensor,
        grid: Grid,
        gradient_factor: float,
        dtype: torch.dtype,
    ) -> Tensor:
        ctx.save_for_backward(weight, log_scale)
        ctx.grid, ctx.gradient_factor = grid, gradient_factor
        return _quantized(weight, log_scale, grid, dtype, _quantize)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, log_scale = ctx.saved_tensors
        found = _gradients(
            grad, weight, log_scale, ctx.grid, ctx.gradient_factor, _straight_through
        )
        return *found, None, None, None


def _quantized(
    weight: Tensor, log_scale: Tensor, grid: Grid, dtype: torch.dtype, kernel: Any
) -> Tensor:
    """Codes times scales (out, in)."""
    out = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    launch, constants = _launch(kernel, weight, log_scale, grid)
    with _on(weight):
        launch(weight.contiguous(), log_scale.contiguous(), out, log_scale.numel(), **constants)
    return out


def _gradients(
    grad: Tensor,
    weight: Tensor,
    log_scale: Tensor,
    grid: Grid,
    gradient_factor: float,
    kernel: Any,
) -> tuple[Tensor, Tensor]:
    """Gradients of the weight (out, in) in its dtype and of the scales' logs (out, groups) fp32."""
    weight, log_scale = weight.contiguous(), log_scale.contiguous()
    by_weight, by_scale = torch.empty_like(weight), torch.empty_like(log_scale)
    launch, constants = _launch(kernel, weight, log_scale, grid)
    with _on(weight):
        launch(
            grad.contiguous(), weight, log_scale, by_weight, by_scale, log_scale.numel(),
            gradient_factor, **constants,
        )  # fmt: skip
    return by_weight, by_scale


def _launch(
    kernel: Any, weight: Tensor, log_scale: Tensor, grid: Grid
) -> tuple[Callable[..., Any], dict[str, Any]]:
    """A kernel on its grid of programs, and its constants."""
    groups = log_scale.numel()
    group = weight.numel() // groups
    width = 1 << (group - 1).bit_length()
    rows = max(1, TILE // width)
    constants: dict[str, Any] = {
        "LOW": float(grid.qmin),
        "HIGH": float(grid.qmax),
        "SMALLEST": grids.SMALLEST_SCALE,
        "LARGEST": grids.LARGEST_FP16 / -grid.qmin,
        "GROUP": group,
        "ROWS": rows,
        "WIDTH": width,
    }
    if width > TILE:
        constants["num_warps"] = 16
    return kernel[((groups + rows - 1) // rows,)], constants


def _on(weight: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Launch where the tensor is; a compiler sees to that itself."""
    here = torch.compiler.is_compiling() or not weight.is_cuda
    if here or weight.get_device() == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(weight.device)


# --- operators that a compiler looks into ---------------------------------------------------------


@triton_op("qatbench::fake_quant_triton", mutates_args=())
def operator(
    weight: Tensor,
    log_scale: Tensor,
    bits: int,
    group_size: int,
    gradient_factor: float,
    dtype: torch.dtype,
) -> Tensor:
    """`fused` for a compiled model."""
    return _quantized(weight, log_scale, Grid(bits, group_size), dtype, wrap_triton(_quantize))


@triton_op("qatbench::fake_quant_triton_gradients", mutates_args=())
def _operator_gradients(
    grad: Tensor,
    weight: Tensor,
    log_scale: Tensor,
    bits: int,
    group_size: int,
    gradient_factor: float,
) -> tuple[Tensor, Tensor]:
    kernel = wrap_triton(_straight_through)
    return _gradients(grad, weight, log_scale, Grid(bits, group_size), gradient_factor, kernel)


differentiable(operator, _operator_gradients)


# --- the kernels ----------------------------------------------------------------------------------
# NaN stays NaN in every clamp, hence the two wheres. 12582912 = 1.5 * 2^23: x + it - it rounds
# |x| < 2^22 to an integer, ties to even. No helpers: the compiler above must see what is written.


@triton.jit  # type: ignore[untyped-decorator]
def _quantize(  # type: ignore[no-untyped-def]
    weight, log_scale, out, groups,
    LOW: tl.constexpr, HIGH: tl.constexpr, SMALLEST: tl.constexpr, LARGEST: tl.constexpr,
    GROUP: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, WIDTH)
    here = (rows < groups)[:, None] & (columns < GROUP)[None, :]
    at = rows[:, None] * GROUP + columns[None, :]
    step = tl.load(log_scale + rows, mask=rows < groups, other=0.0)
    step = tl.exp(step.to(tl.float64)).to(tl.float32)
    step = tl.where(step < SMALLEST, SMALLEST, tl.where(step > LARGEST, LARGEST, step))
    step = step.to(tl.float16).to(tl.float32)[:, None]
    place = tl.div_rn(tl.load(weight + at, mask=here, other=0.0).to(tl.float32), step)
    place = tl.where(place < LOW, LOW, tl.where(place > HIGH, HIGH, place))
    codes = (place + 12582912.0) - 12582912.0
    tl.store(out + at, (codes * step).to(out.dtype.element_ty), mask=here)


@triton.jit  # type: ignore[untyped-decorator]
def _straight_through(  # type: ignore[no-untyped-def]
    grad, weight, log_scale, by_weight, by_scale, groups, factor,
    LOW: tl.constexpr, HIGH: tl.constexpr, SMALLEST: tl.constexpr, LARGEST: tl.constexpr,
    GROUP: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, WIDTH)
    here = (rows < groups)[:, None] & (columns < GROUP)[None, :]
    at = rows[:, None] * GROUP + columns[None, :]
    step = tl.load(log_scale + rows, mask=rows < groups, other=0.0)
    step = tl.exp(step.to(tl.float64)).to(tl.float32)
    step = tl.where(step < SMALLEST, SMALLEST, tl.where(step > LARGEST, LARGEST, step))
    step = step.to(tl.float16).to(tl.float32)
    wide = tl.load(weight + at, mask=here, other=0.0).to(tl.float32)
    place = tl.div_rn(wide, step[:, None])
    upstream = tl.load(grad + at, mask=here, other=0.0).to(tl.float32)
    inside = ((place >= LOW) & (place <= HIGH)).to(tl.float32)
    tl.store(by_weight + at, (upstream * inside).to(by_weight.dtype.element_ty), mask=here)
    held = tl.where(place < LOW, LOW, tl.where(place > HIGH, HIGH, place))
    codes = (held + 12582912.0) - 12582912.0
    summed = tl.sum(upstream * (codes - place * inside), axis=1)
    tl.store(by_scale + rows, summed * step * factor, mask=rows < groups)
