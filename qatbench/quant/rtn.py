"""Round to nearest on the symmetric grid, with scales searched for least squared error."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import nn

from qatbench.quant.grid import Grid, quantize, search_scales
from qatbench.quant.result import Quantized, QuantizedLinear


def round_to_nearest(
    model: nn.Module, names: Iterable[str], grid: Grid, progress: Callable[[int, int], None]
) -> Quantized:
    """Quantize the named linears of a dense model; the model is left as it is.

    Raises: ShapeError when the group size does not divide a layer; NumericsError on NaN.
    """
    linears = {}
    wanted = list(names)
    for done, name in enumerate(wanted, start=1):
        weight = model.get_submodule(name).get_parameter("weight").detach()
        scales = search_scales(weight, grid, name=name)
        codes = quantize(weight, scales, grid, name=name)
        linears[name] = QuantizedLinear.from_codes(codes.cpu(), scales.cpu(), grid)
        progress(done, len(wanted))
    return Quantized("rtn", "gptq", linears)
