"""The arithmetic of group-wise LSQ: weights through the INT grid, and the gradient back.

The formulas are in `qatbench.quant.lsq`. Everything here is a pure function of tensors, so that
the compiler can make one pass over the weights of it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qatbench.errors import NumericsError, PrerequisiteError, ShapeError
from qatbench.quant import grid as grids
from qatbench.quant.grid import Grid

CHUNK = 1 << 24
"""Weights that the eager arithmetic holds in fp32 at a time: at most 64 MiB a temporary."""
# Triton divides to 2 ulp unless told otherwise: a weight half-way between two codes could then be
# trained on one and packed as the other. The option's names, newest torch first.
_EXACT_DIVISION = ("eager_numerics.division_rounding", "emulate_divison_rounding")
_SHAPES = 256  # kernels of different shapes, dtypes and grids in one process


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
        dequantize(quantize(weight, s), s) with s = round_scales(exp(log_scale)); in `out_dtype`
        where that is given: the same value, rounded once.
    Raises: ShapeError if the scales are not one a group; NumericsError if log_scale has a 16-bit
        dtype.
    """
    if log_scale.dtype not in (torch.float32, torch.float64):
        raise NumericsError(
            f"log_scale is {log_scale.dtype}: a scale would be off by percents",
            hint="keep log_scale in float32 and use autocast for 16-bit arithmetic",
        )
    expected = tuple(grids.grouped(weight, grid).shape[:2])
    if log_scale.shape != expected:
        raise ShapeError(f"scales {tuple(log_scale.shape)}, expected {expected} (outputs, groups)")
    dtype = out_dtype or torch.promote_types(weight.dtype, torch.float32)
    if torch.float64 in (weight.dtype, log_scale.dtype):
        kernels = EAGER  # the others are written for what models are trained in
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
        scales = grids.round_scales(log_scale.exp(), grid)
        return kernels.forward(weight.detach(), scales, grid.qmin, grid.qmax, dtype)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, log_scale = ctx.saved_tensors
        grid: Grid = ctx.grid
        scales = grids.round_scales(log_scale.exp(), grid)
        wanted = ctx.needs_input_grad
        grad_weight, per_scale = ctx.kernels.backward(
            grad, weight.detach(), scales, grid.qmin, grid.qmax, wanted[0], wanted[1]
        )
        if per_scale is not None:
            per_scale = (per_scale * scales * ctx.gradient_factor).to(log_scale.dtype)
        return grad_weight, per_scale, None, None, None, None


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


@functools.cache
def compiled() -> Kernels:
    """The same arithmetic through torch.compile: one pass over the weights forward, one backward.

    Codes are those of EAGER to the bit (division is rounded as eager's is; the scales, whose way
    through fp16 the compiler would shorten, are rounded outside); sums of scale gradients differ
    by their order.

    Raises: PrerequisiteError if the compiler cannot divide exactly.
    """
    import torch._inductor.config as inductor

    known = [name for name in _EXACT_DIVISION if name in inductor.get_config_copy()]
    if not known:
        raise PrerequisiteError(
            f"the compiler of torch {torch.__version__} cannot round divisions as eager does",
            hint="use a newer torch, or --no-compile",
        )
    exact: dict[str, Any] = {known[0]: True}
    make = functools.partial(torch.compile, fullgraph=True, dynamic=False, options=exact)
    return Kernels(_unlimited(make(_quantize)), _unlimited(make(_straight_through)))


def _unlimited(function: Callable[..., Any]) -> Callable[..., Any]:
    """Lift dynamo's limit of 8 variants, which the layers of a model or two soon exceed.

    It matters, and is lifted, only where a new variant is compiled.
    """
    seen: set[tuple[Any, ...]] = set()

    def run(*arguments: Any) -> Any:
        key = tuple(
            (x.shape, x.stride(), x.dtype, x.device) if isinstance(x, Tensor) else x
            for x in arguments
        )
        if key in seen:
            return function(*arguments)
        with torch._dynamo.config.patch(
            recompile_limit=_SHAPES, accumulated_recompile_limit=_SHAPES
        ):
            result = function(*arguments)
        seen.add(key)
        return result

    return run


def working(device: torch.device) -> Arithmetic:
    """The fastest arithmetic of a device, once it is sure that it works: Triton's, or `compiled`.

    Raises: PrerequisiteError if there is no compiler, or it computes other codes than eager does.
    """
    weight = torch.linspace(-1, 1, 64, device=device).reshape(4, 16).requires_grad_()
    problem = (weight, torch.full((4, 2), 0.125, device=device).log(), Grid(4, 8), 1.0)
    why = ""
    if torch._dynamo.config.disable:
        why = "it is switched off"
    else:
        made: Arithmetic = EAGER
        try:
            made = _made_for(device)
            got = made(*problem, torch.float32)
            got.sum().backward()  # type: ignore[no-untyped-call]
            if not torch.equal(got, EAGER(*problem, torch.float32)):
                why = "it computes other codes than eager does"
        except PrerequisiteError:
            raise
        except Exception as error:  # noqa: BLE001 - a missing compiler shows in a dozen types
            lines = str(error).strip().splitlines() or [""]
            why = f"{type(error).__name__}: {lines[0][:200]}"
        if not why:
            return made
    raise PrerequisiteError(
        f"torch.compile does not work on {device.type} here: {why}",
        hint="--no-compile; or install a C++ compiler (CPU) or Triton (CUDA)",
    )


def _made_for(device: torch.device) -> Arithmetic:
    if device.type != "cuda":
        return compiled()
    from qatbench.quant.fake_quant_triton import fused

    return fused
