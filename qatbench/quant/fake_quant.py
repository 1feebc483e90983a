"""The arithmetic of group-wise LSQ: weights through the INT grid, and the gradient back.

The formulas are in `qatbench.quant.lsq`. Everything here is a pure function of tensors, so that
the compiler can make one pass over the weights of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qatbench.errors import NumericsError, ShapeError
from qatbench.quant import grid as grids
from qatbench.quant.grid import Grid

CHUNK = 1 << 24
"""Weights that the eager arithmetic holds in fp32 at a time: at most 64 MiB a temporary."""


@dataclass(frozen=True)
class Kernels:
    """The arithmetic of `fake_quant`: pure functions of tensors, eager or compiled."""

    forward: Callable[[Tensor, Tensor, int, int, torch.dtype], Tensor]
    backward: Callable[..., tuple[Tensor | None, Tensor | None]]

    def __call__(
        self,
        weight: Tensor,
        log_scale: Tensor,
        grid: Grid,
        gradient_factor: float,
        dtype: torch.dtype,
    ) -> Tensor:
        """Compute `fake_quant` with these."""
        result: Tensor = _FakeQuant.apply(weight, log_scale, grid, gradient_factor, dtype, self)
        return result

    def values(self, weight: Tensor, log_scale: Tensor, grid: Grid, dtype: torch.dtype) -> Tensor:
        """Codes times scales (out, in), without a gradient."""
        scales = grids.stored_scales(log_scale, grid)
        return self.forward(weight.detach(), scales, grid.qmin, grid.qmax, dtype)

    def gradients(
        self,
        grad: Tensor,
        weight: Tensor,
        log_scale: Tensor,
        grid: Grid,
        gradient_factor: float,
        wanted: Sequence[bool] = (True, True),
    ) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of the weight and of log_scale; None for what is not `wanted`."""
        scales = grids.stored_scales(log_scale, grid)
        by_weight, by_scale = self.backward(
            grad, weight.detach(), scales, grid.qmin, grid.qmax, *wanted
        )
        if by_scale is not None:
            by_scale = (by_scale * scales * gradient_factor).to(log_scale.dtype)
        return by_weight, by_scale


Arithmetic = Callable[[Tensor, Tensor, Grid, float, torch.dtype], Tensor]
"""`fake_quant` for arguments that were checked: Kernels, or those of Triton."""


def fake_quant(
    weight: Tensor,
    log_scale: Tensor,
    grid: Grid,
    *,
    gradient_factor: float = 1.0,
    out_dtype: torch.dtype | None = None,
    kernels: Arithmetic | None = None,
) -> Tensor:
    """Weights on the INT grid, differentiable in the weights and in the log of the scales.

    Keeps the weights and one number a scale for the backward pass and computes the rest again.

    `gradient_factor` multiplies the gradient of log_scale: 1 is GRACE's form,
    `lsq_gradient_factor` LSQ's. `kernels` computes, default EAGER, as always in fp64.

    Shapes: weight (out, in) of any float dtype; log_scale (out, groups) fp32 or fp64.
    Returns: (out, in) fp32 (fp64 for an fp64 weight), equal to
        dequantize(quantize(weight, s), s) with s = grid.stored_scales(log_scale); in `out_dtype`
        where that is given: the same value, rounded once.
    Raises: ShapeError if the scales are not one a group; NumericsError if log_scale has a 16-bit
        dtype.
    """
    if log_scale.dtype not in (torch.float32, torch.float64):
        raise NumericsError(
            f"log_scale is {log_scale.dtype}: a scale would be off by percents",
            hint="keep log_scale in float32 and use autocast for 16-bit arithmetic",
        )
    expected = (weight.shape[0], grid.groups(weight.shape[1]))
    if log_scale.shape != expected:
        raise ShapeError(f"scales {tuple(log_scale.shape)}, expected {expected} (outputs, groups)")
    dtype = out_dtype or torch.promote_types(weight.dtype, torch.float32)
    if torch.float64 in (weight.dtype, log_scale.dtype):
        kernels = EAGER  # the others are written for what models are trained in
    elif torch.compiler.is_compiling():
        operator = _operator
        if weight.is_cuda:
            from qatbench.quant.fake_quant_triton import operator
        settings = grid.bits, grid.group_size, gradient_factor, dtype
        result: Tensor = operator(weight, log_scale, *settings)
        return result
    return (kernels or EAGER)(weight, log_scale, grid, gradient_factor, dtype)


def lsq_gradient_factor(grid: Grid, in_features: int) -> float:
    """LSQ's 1 / sqrt(n * qmax) with n the weights that share a scale (arXiv:1902.08153, 2.2)."""
    return 1 / math.sqrt(in_features // grid.groups(in_features) * grid.qmax)


class _FakeQuant(torch.autograd.Function):
    """The rounding with its straight-through gradient; see the module's docstring."""

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        log_scale: Tensor,
        grid: Grid,
        gradient_factor: float,
        dtype: torch.dtype,
        kernels: Kernels,
    ) -> Tensor:
        ctx.save_for_backward(weight, log_scale)
        ctx.grid, ctx.gradient_factor, ctx.kernels = grid, gradient_factor, kernels
        return kernels.values(weight, log_scale, grid, dtype)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        found = ctx.kernels.gradients(
            grad, *ctx.saved_tensors, ctx.grid, ctx.gradient_factor, ctx.needs_input_grad[:2]
        )
        return *found, None, None, None, None


def _quantize(weight: Tensor, scales: Tensor, low: int, high: int, dtype: torch.dtype) -> Tensor:
    """(out, in), (out, groups) -> code * scale (out, in): exact in fp32, rounded to `dtype`."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    step = scales.to(wide).unsqueeze(-1)
    place = weight.reshape(*scales.shape, -1).to(wide) / step
    return place.round_().clamp_(low, high).mul_(step).flatten(1).to(dtype)


def _straight_through(
    grad: Tensor,
    weight: Tensor,
    scales: Tensor,
    low: int,
    high: int,
    for_weight: bool,
    for_scales: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the weight (out, in) in its dtype, and of the scales (out, groups) in fp32."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    place = weight.reshape(*scales.shape, -1).to(wide) / scales.to(wide).unsqueeze(-1)
    inside = (place >= low) & (place <= high)
    upstream = grad.reshape(place.shape)
    grad_weight = (upstream * inside).flatten(1).to(weight.dtype) if for_weight else None
    if not for_scales:
        return grad_weight, None
    codes = place.round().clamp_(low, high)
    return grad_weight, (upstream * codes.sub_(place * inside)).sum(-1)


def _eager_forward(
    weight: Tensor, scales: Tensor, low: int, high: int, dtype: torch.dtype
) -> Tensor:
    if weight.numel() <= CHUNK:
        return _quantize(weight, scales, low, high, dtype)
    out = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    for rows in _chunks(weight):
        out[rows] = _quantize(weight[rows], scales[rows], low, high, dtype)
    return out


def _eager_backward(
    grad: Tensor, weight: Tensor, scales: Tensor, *rest: Any
) -> tuple[Tensor | None, Tensor | None]:
    if weight.numel() <= CHUNK:
        return _straight_through(grad, weight, scales, *rest)
    parts = [
        _straight_through(grad[rows], weight[rows], scales[rows], *rest) for rows in _chunks(weight)
    ]
    by_weight, by_scale = ([x for x in some if x is not None] for some in zip(*parts, strict=True))
    return (torch.cat(by_weight) if by_weight else None, torch.cat(by_scale) if by_scale else None)


def _chunks(weight: Tensor) -> list[slice]:
    rows = max(1, CHUNK // weight.shape[1])
    return [slice(start, start + rows) for start in range(0, weight.shape[0], rows)]


EAGER = Kernels(_eager_forward, _eager_backward)


# --- one operator, for whoever compiles the model around it ---------------------------------------
# Inside a larger graph the compiler would leave the scales' way through fp16 out. This one is for
# the CPU; CUDA has that of `fake_quant_triton`.


@torch.library.custom_op("qatbench::fake_quant", mutates_args=())
def _operator(
    weight: Tensor,
    log_scale: Tensor,
    bits: int,
    group_size: int,
    gradient_factor: float,
    dtype: torch.dtype,
) -> Tensor:
    return EAGER.values(weight, log_scale, Grid(bits, group_size), dtype)


@_operator.register_fake
def _(
    weight: Tensor,
    log_scale: Tensor,
    bits: int,
    group_size: int,
    gradient_factor: float,
    dtype: torch.dtype,
) -> Tensor:
    return torch.empty(weight.shape, dtype=dtype, device=weight.device)


@torch.library.custom_op("qatbench::fake_quant_gradients", mutates_args=())
def _gradients(
    grad: Tensor,
    weight: Tensor,
    log_scale: Tensor,
    bits: int,
    group_size: int,
    gradient_factor: float,
) -> tuple[Tensor, Tensor]:
    found = EAGER.gradients(grad, weight, log_scale, Grid(bits, group_size), gradient_factor)
    return cast("tuple[Tensor, Tensor]", found)  # both are wanted


@_gradients.register_fake
def _(
    grad: Tensor,
    weight: Tensor,
    log_scale: Tensor,
    bits: int,
    group_size: int,
    gradient_factor: float,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(weight), torch.empty_like(log_scale)


def differentiable(operator: Any, gradients: Callable[..., tuple[Tensor, Tensor]]) -> None:
    """Give an operator like these two, or Triton's, its backward pass."""

    def keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        weight, log_scale, *ctx.rest, _ = inputs
        ctx.save_for_backward(weight, log_scale)

    def back(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        by_weight, by_scale = gradients(grad, *ctx.saved_tensors, *ctx.rest)
        return by_weight, by_scale, None, None, None, None

    operator.register_autograd(back, setup_context=keep)


differentiable(_operator, _gradients)
