"""Round to nearest on the symmetric grid, with scales searched for least squared error."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn

from qatbench.quant.grid import Grid, quantize, search_scales
from qatbench.quant.result import Quantized, QuantizedLinear


def round_to_nearest(
    model: nn.Module,
    names: Iterable[str],
    grid: Grid,
    progress: Callable[[int, int], None],
    device: torch.device | str | None = None,
) -> Quantized:
    """Quantize the named linears of a dense model, on `device`; the model is left as it is.

    Returns: integers and scales on the CPU.

    Raises: ShapeError when the group size does not divide a layer; NumericsError on NaN.
    """
    linears = {}
    wanted = list(names)
    for done, name in enumerate(wanted, start=1):
        weight = model.get_submodule(name).get_parameter("weight").detach().to(device)
        scales = search_scales(weight, grid, name=name)
        codes = quantize(weight, scales, grid, name=name)
        linears[name] = QuantizedLinear.from_codes(codes, scales, grid).to("cpu")
        progress(done, len(wanted))
    return Quantized("rtn", "gptq", linears)
