"""Group-wise LSQ: linears whose weights pass through the INT grid, with learned scales.

q = clamp(round(w / s), qmin, qmax), the layer computes with q * s, and s = exp(log_scale).
Gradients pass the rounding unchanged (straight-through):

    d(q s)/dw = 1 inside the clip range, 0 outside        d(q s)/ds = q - w/s inside, q outside
    d(q s)/d log_scale = s * d(q s)/ds

Source: LSQ, arXiv:1902.08153, Sec. 2.1; the log form without LSQ's gradient factor is GRACE's,
arXiv:2601.22709. Ours: the forward rounds s as a checkpoint stores it (grid.round_scales; the
gradient ignores that rounding), so the layer that is trained is bit for bit the one that is packed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from qatbench.errors import NumericsError, UsageError
from qatbench.quant import grid as grids
from qatbench.quant.grid import Grid


def fake_quant(
    weight: Tensor, log_scale: Tensor, grid: Grid, *, gradient_factor: float = 1.0
) -> Tensor:
    """Weights on the INT grid, differentiable in the weights and in the log of the scales.

    Keeps only its two inputs for the backward pass and computes the rest again.

    `gradient_factor` multiplies the gradient of log_scale: 1 is GRACE's form,
    `lsq_gradient_factor` LSQ's.

    Shapes: weight (out, in) of any float dtype; log_scale (out, groups) fp32 or fp64.
    Returns: (out, in) fp32 (fp64 for an fp64 weight), equal to
        dequantize(quantize(weight, s), s) with s = round_scales(exp(log_scale)).
    Raises: ShapeError if the scales are not one a group; NumericsError if log_scale has a 16-bit
        dtype.
    """
    if log_scale.dtype not in (torch.float32, torch.float64):
        raise NumericsError(
            f"log_scale is {log_scale.dtype}: a scale would be off by percents",
            hint="keep log_scale in float32 and use autocast for 16-bit arithmetic",
        )
    result: Tensor = _FakeQuant.apply(weight, log_scale, grid, gradient_factor)
    return result


def lsq_gradient_factor(grid: Grid, in_features: int) -> float:
    """LSQ's 1 / sqrt(n * qmax) with n the weights that share a scale (arXiv:1902.08153, 2.2)."""
    return 1 / math.sqrt(in_features // grid.groups(in_features) * grid.qmax)


class _FakeQuant(torch.autograd.Function):
    """The rounding with its straight-through gradient; see the module's docstring."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, log_scale: Tensor, grid: Grid, gradient_factor: float
    ) -> Tensor:
        ctx.save_for_backward(weight, log_scale)
        ctx.grid, ctx.gradient_factor = grid, gradient_factor
        scales = grids.round_scales(log_scale.exp(), grid)
        place = grids.over_scales(weight, scales, grid)
        codes = place.round_().clamp_(grid.qmin, grid.qmax)
        return codes.mul_(scales.to(codes.dtype).unsqueeze(-1)).flatten(1)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        weight, log_scale = ctx.saved_tensors
        grid: Grid = ctx.grid
        scales = grids.round_scales(log_scale.exp(), grid)
        place = grids.over_scales(weight, scales, grid)
        inside = (place >= grid.qmin) & (place <= grid.qmax)
        upstream = grad.reshape(place.shape)
        grad_weight = grad_scale = None
        if ctx.needs_input_grad[0]:
            grad_weight = (upstream * inside).flatten(1).to(weight.dtype)
        if ctx.needs_input_grad[1]:
            codes = place.round().clamp_(grid.qmin, grid.qmax)
            per_scale = (upstream * codes.sub_(place * inside)).sum(-1)
            grad_scale = (per_scale * scales * ctx.gradient_factor).to(log_scale.dtype)
        return grad_weight, grad_scale, None, None


class FakeQuantLinear(nn.Module):
    """A linear layer that computes with its weights on the INT grid and learns their scales.

    Parameters: `weight` and `bias`, the very objects of the wrapped layer, and `log_scale`
    (out, groups) fp32. `state_dict` has the wrapped layer's keys and "log_scale".
    `gradient_factor` (1.0) may be set: see `fake_quant`.
    """

    def __init__(
        self, weight: nn.Parameter, bias: nn.Parameter | None, grid: Grid, log_scale: nn.Parameter
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.grid = grid
        self.gradient_factor = 1.0
        self.weight = weight
        self.bias = bias
        self.log_scale = log_scale

    @classmethod
    def from_linear(cls, linear: nn.Linear, grid: Grid, name: str = "") -> FakeQuantLinear:
        """Wrap `linear`, with scales of least squared error among GRACE's 20 ratios and 1.

        Raises: ShapeError if the group size does not divide the inputs; the message has `name`;
            NumericsError if a weight is not finite; UsageError if it is no parameter.
        """
        weight = linear.weight
        if not isinstance(weight, nn.Parameter):
            raise UsageError(f"{name or 'layer'}: its weight is computed, not a parameter")
        scales = grids.search_scales(weight, grid, ratios=grids.LSQ_RATIOS, name=name)
        layer = cls(weight, linear.bias, grid, nn.Parameter(scales.log()))
        return layer.train(linear.training)

    def forward(self, inputs: Tensor) -> Tensor:
        """(..., in) -> (..., out) in the dtype of the inputs, or of autocast where it is on."""
        weight = fake_quant(
            self.weight, self.log_scale, self.grid, gradient_factor=self.gradient_factor
        )
        bias = None if self.bias is None else self.bias.to(inputs.dtype)
        return F.linear(inputs, weight.to(inputs.dtype), bias)

    @torch.no_grad()
    def codes_and_scales(self) -> tuple[Tensor, Tensor]:
        """Codes (out, in) int8 and scales (out, groups) fp32: exactly what `forward` uses.

        Raises: NumericsError if a weight or a scale is not finite.
        """
        scales = grids.round_scales(self.log_scale.exp(), self.grid)
        return grids.quantize(self.weight, scales, self.grid), scales

    def extra_repr(self) -> str:
        """Sizes and grid, for print(model)."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, bits={self.grid.bits}, "
            f"group_size={self.grid.group_size}"
        )


def attach(model: nn.Module, names: Iterable[str], grid: Grid) -> dict[str, FakeQuantLinear]:
    """Replace the named nn.Linear submodules by FakeQuantLinear, in place.

    Returns: the new layers by name. Nothing is replaced if one of them cannot be.
    Raises: UsageError if a name is not that of an nn.Linear inside the model. ShapeError,
        NumericsError from `FakeQuantLinear.from_linear`, with the layer's name.
    """
    inside = dict(model.named_modules())
    layers: dict[str, FakeQuantLinear] = {}
    for name in dict.fromkeys(names):
        linear = inside.get(name) if name else None
        if not isinstance(linear, nn.Linear):
            found = type(linear).__name__ if linear is not None else "nothing"
            raise UsageError(f"cannot quantize {name!r}: expected an nn.Linear, found {found}")
        layers[name] = FakeQuantLinear.from_linear(linear, grid, name)
    for name, layer in layers.items():
        _replace(model, name, layer)
    return layers


@torch.no_grad()
def detach(model: nn.Module) -> list[str]:
    """Replace every FakeQuantLinear by an nn.Linear with the dequantized weights (fp32), in place.

    The weight is a new parameter, so one that was tied to another layer keeps its old values there.

    Returns: the names of the replaced layers.
    """
    layers = quantized_layers(model)
    for name, layer in layers.items():
        codes, scales = layer.codes_and_scales()
        linear = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        weight = grids.dequantize(codes, scales, layer.grid, name=name)
        linear.weight = nn.Parameter(weight, requires_grad=layer.weight.requires_grad)
        linear.bias = layer.bias  # type: ignore[assignment]  # None where there is none
        _replace(model, name, linear.train(layer.training))
    return list(layers)


def quantized_layers(model: nn.Module) -> dict[str, FakeQuantLinear]:
    """Find the FakeQuantLinear layers below `model` by name, in the order of the model."""
    return {
        name: module
        for name, module in model.named_modules()
        if name and isinstance(module, FakeQuantLinear)
    }


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
