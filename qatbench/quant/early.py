"""Codes of GPTQ's linears, made on the device as soon as each is solved.

Left alone, gptqmodel moves every solved weight to the CPU, to be packed there. Nobody needs it
there but for its codes, and those are half as large: they are made where the weight lies, copied to
the CPU beside the work on the next linears, and the weight is left behind.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from qatbench.errors import NumericsError
from qatbench.quant.grid import Grid
from qatbench.quant.result import QuantizedLinear

PARTS = ("fields", "zeros", "scales")


def codes(weight: Tensor, scales: Tensor, zeros: Tensor, grid: Grid, name: str) -> QuantizedLinear:
    """Integers of a weight (out, in) as the library hands it over, on the weight's device.

    Raises: NumericsError unless scales and zero points are (out, groups), as GPTQ's and AWQ's are,
        or when the weight lies off the grid.
    """
    out, width = weight.shape
    shape = (out, grid.groups(width, name))
    if scales.shape != shape or zeros.shape != shape:
        raise NumericsError(f"{name}: scales {tuple(scales.shape)} instead of {shape}")
    device = weight.device
    return QuantizedLinear.from_affine(weight, scales.to(device), zeros.to(device), grid, name)


class Solved:
    """Linears solved and not handed over yet, by full name; filled by the library's threads."""

    def __init__(self, grid: Grid) -> None:
        self._grid = grid
        self._lock = threading.Lock()
        self._linears: dict[str, Any] = {}  # the library's wrappers of linears

    def keeping(self, quantize: Callable[..., Any]) -> Callable[..., Any]:
        """The library's `GPTQ.quantize`, whose result's codes begin their way to the CPU.

        Raises: NumericsError from `codes`, on the thread that solves.
        """

        def keep(task: Any, *args: Any, **kwargs: Any) -> Any:
            result = quantize(task, *args, **kwargs)
            linear = task._named_module
            weight, scales, zeros = (part.detach() for part in result[:3])
            found = codes(weight, scales, zeros, self._grid, linear.full_name)
            # Into page-locked memory, on a stream of its own; the library waits for it.
            linear.stream_state_payload_to_cpu({part: getattr(found, part) for part in PARTS})
            with self._lock:
                self._linears[linear.full_name] = linear
            return result

        return keep

    def attach(self, model: Any, device: str) -> None:
        """Have the library's model leave weights behind, and keep its inputs on the device.

        What enters the first layer, with masks and positions, would else lie on the CPU and travel
        anew with each sample of each pass. What enters later layers is on the device in any case.
        """
        model.post_quantize = self.leaving(model.post_quantize)
        model.quantize_config.calibration_data_device = torch.device(device)

    def leaving(self, post_quantize: Callable[[nn.Module], nn.Module]) -> Callable[..., Any]:
        """The library's move of a done layer to the CPU, without the weights of solved linears."""

        def leave(layer: nn.Module) -> nn.Module:
            with self._lock:
                solved = list(self._linears.values())
            inside = set(layer.modules())
            for weight in (linear.module.weight for linear in solved if linear.module in inside):
                weight.data = torch.zeros((), dtype=weight.dtype).expand(weight.shape)
            return post_quantize(layer)

        return leave

    def pop(self, name: str) -> QuantizedLinear:
        """The codes of a linear, on the CPU and out of page-locked memory.

        Raises: NumericsError if it was not solved.
        """
        with self._lock:
            linear = self._linears.pop(name, None)
        if linear is None:
            raise NumericsError(f"{name}: packed, but never solved")
        linear.stream_sync()
        parts = (linear.state.pop(part) for part in PARTS)
        fields, zeros, scales = (part.clone() if part.is_pinned() else part for part in parts)
        return QuantizedLinear(fields, zeros, scales, self._grid)
