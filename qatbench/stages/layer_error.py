"""Output error of each decoder layer on calibration data: the method against RTN.

Each layer gets the 16-bit model's own input. Substituting a whole layer's weights (norms included)
makes methods comparable that move scales between neighbouring modules, as AWQ does. Layers are
looked at one after another, each on the device only meanwhile.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from qatbench.quant.grid import Grid
from qatbench.quant.layer_inputs import LayerInputs, capture, visiting
from qatbench.quant.result import Quantized
from qatbench.quant.rtn import round_to_nearest
from qatbench.vlm.load import Loaded

SAMPLES = 16


def compare_layers(
    loaded: Loaded,
    quantized: Quantized,
    grid: Grid,
    batches: Sequence[Mapping[str, Tensor]],
    device: str,
) -> dict[str, Any]:
    """Relative squared output error of every decoder layer, for the method and for RTN.

    Uses the first 16 calibration samples. Relative to the squared size of the layer's update
    (output minus input), summed over samples.

    Args:
        loaded: the dense model in fp32, anywhere; it is left as it was.
        quantized: the method's integers.
        grid: of RTN.
        batches: model inputs, one unpadded calibration sample each.
        device: where layers are computed.

    Returns: `samples`, `method` and `rtn` (one figure a layer), `above_rtn`: the layers whose
        error is not below RTN's, and a `reason` where there are any.
    """
    sums = _layer_errors(loaded, quantized, grid, batches[:SAMPLES], device)
    above = [i for i, (m, r) in enumerate(zip(sums["method"], sums["rtn"], strict=True)) if m >= r]
    report: dict[str, Any] = {
        "samples": len(batches[:SAMPLES]),
        "method": [float(f"{value:.4g}") for value in sums["method"]],
        "rtn": [float(f"{value:.4g}") for value in sums["rtn"]],
        "above_rtn": above,
    }
    if above:
        report["reason"] = (
            "the method minimises the error of one linear (GPTQ), one norm's linears (AWQ) or one "
            "layer (AutoRound) on inputs that come from layers already quantized; here each layer "
            "gets the 16-bit model's input and its whole output counts, so RTN can be level or "
            "ahead"
        )
    return report


@torch.inference_mode()
def _layer_errors(
    loaded: Loaded,
    quantized: Quantized,
    grid: Grid,
    batches: Sequence[Mapping[str, Tensor]],
    device: str,
) -> dict[str, list[float]]:
    layers = loaded.model.get_submodule(loaded.arch.layers)
    assert isinstance(layers, nn.ModuleList)
    inputs = capture(loaded.model, layers, batches, torch.float32, device)
    errors: dict[str, list[float]] = {"method": [], "rtn": []}
    states: Sequence[Tensor] = inputs.first
    for index, layer in enumerate(layers):
        own = _of_layer(quantized, f"{loaded.arch.layers}.{index}.")
        linears = [name for name, module in layer.named_modules() if name in own.linears]
        entered = inputs.entering(index, states)
        with visiting(layer, device):
            rtn = round_to_nearest(layer, linears, grid, lambda done, total: None)
            states = _outputs(layer, {}, entered, inputs, index)
            size = _distance(states, entered)
            for kind, variant in (("method", own), ("rtn", rtn)):
                got = _outputs(layer, _weights(variant, device), entered, inputs, index)
                errors[kind].append(_distance(got, states) / size)
    return errors


def _of_layer(quantized: Quantized, prefix: str) -> Quantized:
    """What belongs to one decoder layer, by its name inside it."""

    def inside(named: Mapping[str, Any]) -> dict[str, Any]:
        return {k.removeprefix(prefix): v for k, v in named.items() if k.startswith(prefix)}

    linears, changed = inside(quantized.linears), inside(quantized.changed)
    return Quantized(quantized.method, quantized.layout, linears, changed)


def _weights(variant: Quantized, device: str) -> dict[str, Tensor]:
    """Dense weights of a layer, made where they are used."""
    linears = {f"{name}.weight": linear.to(device) for name, linear in variant.linears.items()}
    dense = {name: linear.dense() for name, linear in linears.items()}
    return dense | {name: value.to(device) for name, value in variant.changed.items()}


def _outputs(
    layer: nn.Module,
    weights: Mapping[str, Tensor],
    entered: Sequence[Tensor],
    inputs: LayerInputs,
    index: int,
) -> list[Tensor]:
    """What a layer makes of each sample, with some of its weights replaced."""
    keywords = inputs.keywords(index)
    found = []
    for sample, state in enumerate(entered):
        given = {key: values[sample] for key, values in keywords.items()}
        out = functional_call(layer, dict(weights), (state,), given)
        found.append(out[0] if isinstance(out, tuple) else out)
    return found


def _distance(some: Sequence[Tensor], others: Sequence[Tensor]) -> float:
    """Squared difference, summed over samples."""
    return sum((a - b).square().sum().item() for a, b in zip(some, others, strict=True))
