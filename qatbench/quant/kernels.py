"""Which arithmetic of `fake_quant` a device has: Triton's on CUDA, compiled code elsewhere."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qatbench.errors import PrerequisiteError
from qatbench.quant.fake_quant import EAGER, Arithmetic, Kernels, _quantize, _straight_through
from qatbench.quant.grid import Grid

# Triton divides to 2 ulp unless told otherwise: a weight half-way between two codes could then be
# trained on one and packed as the other. The option's names, newest torch first.
_EXACT_DIVISION = ("eager_numerics.division_rounding", "emulate_divison_rounding")
_SHAPES = 256  # kernels of different shapes, dtypes and grids in one process


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
