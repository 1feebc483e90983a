"""Group-wise LSQ: linears whose weights pass through the INT grid, with learned scales.

q = clamp(round(w / s), qmin, qmax), the layer computes with q * s, and s = exp(log_scale).
Gradients pass the rounding unchanged (straight-through):

    d(q s)/dw = 1 inside the clip range, 0 outside        d(q s)/ds = q - w/s inside, q outside
    d(q s)/d log_scale = s * d(q s)/ds

Source: LSQ, arXiv:1902.08153, Sec. 2.1; the log form without LSQ's gradient factor is GRACE's,
arXiv:2601.22709. Ours: the forward rounds s as a checkpoint stores it (grid.stored_scales; the
gradient ignores that rounding), so the layer that is trained is bit for bit the one that is packed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qatbench.errors import UsageError
from qatbench.quant import grid as grids
from qatbench.quant.fake_quant import EAGER, Arithmetic, fake_quant, lsq_gradient_factor
from qatbench.quant.grid import Grid
from qatbench.quant.kernels import working

__all__ = [
    "FakeQuantLinear", "attach", "compile_layers", "detach", "fake_quant", "lsq_gradient_factor",
    "quantized_layers",
]  # fmt: skip


class FakeQuantLinear(nn.Module):
    """A linear layer that computes with its weights on the INT grid and learns their scales.

    Parameters: `weight` and `bias`, the very objects of the wrapped layer, and `log_scale`
    (out, groups) fp32. `state_dict` has the wrapped layer's keys and "log_scale".
    `gradient_factor` (1.0) and `kernels` (EAGER) may be set: see `fake_quant`.
    """

    def __init__(
        self, weight: nn.Parameter, bias: nn.Parameter | None, grid: Grid, log_scale: nn.Parameter
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.grid = grid
        self.gradient_factor = 1.0
        self.kernels: Arithmetic = EAGER
        self.weight = weight
        self.bias = bias
        self.log_scale = log_scale

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, grid: Grid, name: str = "", scales: Tensor | None = None
    ) -> FakeQuantLinear:
        """Wrap `linear`, with the given scales (out, groups), or else those of least squared error
        among GRACE's 20 ratios and 1.

        Raises: ShapeError if the group size does not divide the inputs; the message has `name`;
            NumericsError if a weight is not finite; UsageError if it is no parameter.
        """  # noqa: D205
        weight = linear.weight
        if not isinstance(weight, nn.Parameter):
            raise UsageError(f"{name or 'layer'}: its weight is computed, not a parameter")
        if scales is None:
            scales = grids.search_scales(weight, grid, ratios=grids.LSQ_RATIOS, name=name)
        log_scale = nn.Parameter(scales.to(weight.device, torch.float32).log())
        layer = cls(weight, linear.bias, grid, log_scale)
        return layer.train(linear.training)

    def forward(self, inputs: Tensor) -> Tensor:
        """(..., in) -> (..., out) in the dtype of the inputs, or of autocast where it is on."""
        kind, dtype = inputs.device.type, inputs.dtype
        if torch.is_autocast_enabled(kind) and dtype != torch.float64:
            dtype = torch.get_autocast_dtype(kind)
        weight = self.on_grid(dtype)
        bias = None if self.bias is None else self.bias.to(inputs.dtype)
        return F.linear(inputs, weight, bias)

    def on_grid(self, dtype: torch.dtype) -> Tensor:
        """The weight on the grid, differentiable: (out, in) in `dtype`."""
        return fake_quant(
            self.weight,
            self.log_scale,
            self.grid,
            gradient_factor=self.gradient_factor,
            out_dtype=dtype,
            kernels=self.kernels,
        )

    @torch.no_grad()
    def codes_and_scales(self) -> tuple[Tensor, Tensor]:
        """Codes (out, in) int8 and scales (out, groups) fp32: exactly what `forward` uses.

        Raises: NumericsError if a weight or a scale is not finite.
        """
        scales = grids.stored_scales(self.log_scale, self.grid)
        return grids.quantize(self.weight, scales, self.grid), scales

    def extra_repr(self) -> str:
        """Sizes and grid, for print(model)."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, bits={self.grid.bits}, "
            f"group_size={self.grid.group_size}"
        )


def attach(
    model: nn.Module,
    names: Iterable[str],
    grid: Grid,
    scales: Mapping[str, Tensor] | None = None,
) -> dict[str, FakeQuantLinear]:
    """Replace the named nn.Linear submodules by FakeQuantLinear, in place.

    `scales` are those to start from, by layer; a layer without any gets searched ones.

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
        layers[name] = FakeQuantLinear.from_linear(linear, grid, name, (scales or {}).get(name))
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


def compile_layers(model: nn.Module, device: torch.device) -> None:
    """Let every FakeQuantLinear below `model` compute with the fastest kernels of the device.

    Whoever compiles the model around them finds one operator there.

    Raises: PrerequisiteError if there is no working compiler for the device.
    """
    kernels = working(device)
    for layer in quantized_layers(model).values():
        layer.kernels = kernels


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
