"""AutoRound through auto-round: rounding and clipping tuned by signed gradients, layer by layer.

The library tunes one decoder layer at a time; this module gives it the inputs of that layer just as
the model is asked, one unpadded sample each, images included, and takes the integers and scales of
the tuned layer. Its own walk through a model is not used: it cuts samples to one length, and knows
nothing of what a model adds between layers (Qwen3-VL's visual features).

Its symmetric grid uses all codes: a group whose largest weight is positive gets a negative scale,
so that this weight lies on -2^(bits-1). The GPTQ layout holds such scales like any others.

Source: arXiv:2309.05516 and the library, version 0.16.1.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import random
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from qatbench.errors import NumericsError, PrerequisiteError, QatbenchError
from qatbench.quant.backends import enough_memory, quiet
from qatbench.quant.grid import Grid, round_scales
from qatbench.quant.layer_inputs import capture
from qatbench.quant.layer_tuning import Tuner
from qatbench.quant.result import Quantized, QuantizedLinear

ITERATIONS = 200
"""Steps a layer: the library's default; its learning rate is 1 / steps."""


def solve(
    model: nn.Module,
    names: Sequence[str],
    grid: Grid,
    batches: Sequence[Mapping[str, Tensor]],
    *,
    iterations: int = ITERATIONS,
    samples_a_step: int = 8,
    device: str,
    dtype: torch.dtype = torch.float32,
    progress: Callable[[int, int], None],
) -> Quantized:
    """Tune the decoder layers that hold the named linears; the model is left as it is.

    Args:
        model: dense, in any float dtype, anywhere: parts of it visit `device`.
        names: every linear to quantize, all linears of all decoder layers.
        grid: bits and group size; symmetric.
        batches: model inputs, one unpadded calibration sample each.
        iterations: steps a layer.
        samples_a_step: samples whose gradients a step adds up.
        device: torch device name.
        dtype: of weights and activations while tuning, float32 or bfloat16.
        progress: called as (layers done, layers in all).

    Raises: PrerequisiteError when the library, a compiler for CUDA or memory is missing; UsageError
        for a dtype it does not tune in; NumericsError when it fails, diverges or leaves one out.
    """
    if not batches:
        raise PrerequisiteError("no calibration samples", hint="--calib TASK:SPLIT")
    prefix = names[0].partition(".0.")[0]
    layers = model.get_submodule(prefix)
    assert isinstance(layers, nn.ModuleList)
    found: dict[str, QuantizedLinear] = {}
    with contextlib.ExitStack() as around:
        for one in (quiet(), _own_randomness(device), _quick_collections(), _our_errors()):
            around.enter_context(one)
        settings = (grid, iterations, samples_a_step, len(batches), device, dtype)
        tuner = around.enter_context(contextlib.closing(Tuner(*settings)))
        inputs = capture(model, layers, batches, dtype, device)
        exact = rounded = inputs.first
        for index, layer in enumerate(layers):
            exact, rounded = inputs.entering(index, exact), inputs.entering(index, rounded)
            tuned = copy.deepcopy(layer).to(device, dtype).requires_grad_(False)
            exact, rounded = tuner.tune(tuned, index, exact, rounded, inputs)
            found |= _linears(tuned, grid, f"{prefix}.{index}")
            progress(index + 1, len(layers))
    missing = sorted(set(names) - set(found))
    if missing or set(found) - set(names):
        raise NumericsError(f"autoround left out {len(missing)} linears, e.g. {missing[:2]}")
    return Quantized("autoround", "gptq", {name: found[name] for name in names})


def _linears(layer: nn.Module, grid: Grid, prefix: str) -> dict[str, QuantizedLinear]:
    """Integers and scales of a tuned layer's linears, by their names in the model."""
    found = {}
    for name, module in layer.named_modules():
        scale = getattr(module, "scale", None)  # what the library leaves at a linear
        if isinstance(module, nn.Linear) and isinstance(scale, Tensor):
            found[f"{prefix}.{name}"] = take(module.weight, scale, grid, f"{prefix}.{name}")
    return found


@torch.no_grad()
def take(weight: Tensor, scale: Tensor, grid: Grid, name: str) -> QuantizedLinear:
    """Codes of a tuned weight, which lies on its grid up to the rounding of its own dtype.

    Shapes: weight (out, in); scale (out, groups) or fewer dimensions, of either sign.
    Raises: NumericsError if the weight is off the grid, or the scales are not one a group.
    """
    out, width = weight.shape
    groups = grid.groups(width, name)
    if scale.numel() != out * groups:
        raise NumericsError(f"{name}: scales {tuple(scale.shape)}, expected {(out, groups)}")
    scales = scale.detach().to(weight.device, torch.float32).reshape(out, groups)
    place = weight.detach().float().reshape(out, groups, -1) / scales[..., None]
    codes = place.round()
    # Half a unit in the last place of `weight`, in steps: 0.25 at 8 bits in bfloat16, and below a
    # half the nearest code is the right one.
    slack = torch.finfo(weight.dtype).eps / 2 * -grid.qmin + 1e-4
    off = (place - codes).abs().max().item()
    inside = codes.min().item() >= grid.qmin and codes.max().item() <= grid.qmax
    if not off <= slack or not inside:
        raise NumericsError(f"{name}: tuned weights are {off:.3f} of a step off the grid")
    stored = round_scales(scales.abs(), grid).copysign(scales)
    return QuantizedLinear.from_codes(codes.to(torch.int8).flatten(1), stored, grid).to("cpu")


@contextlib.contextmanager
def _own_randomness(device: str) -> Iterator[None]:
    """The library seeds the generators of the whole process; afterwards they are as they were."""
    state = random.getstate()
    used = [torch.device(device)] if device.startswith("cuda") else []
    try:
        with torch.random.fork_rng(used):
            yield
    finally:
        random.setstate(state)


@contextlib.contextmanager
def _quick_collections() -> Iterator[None]:
    """The library collects garbage four times a layer: only what came since then is searched."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextlib.contextmanager
def _our_errors() -> Iterator[None]:
    try:
        with enough_memory("tuning"):
            yield
    except QatbenchError:
        raise
    except Exception as error:
        raise NumericsError(f"auto-round failed: {type(error).__name__}: {error}") from error
