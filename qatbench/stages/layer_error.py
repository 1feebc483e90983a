"""Output error of each decoder layer on calibration data: the method against RTN.

Each layer gets the 16-bit model's own input. Substituting a whole layer's weights (norms included)
makes methods comparable that move scales between neighbouring modules, as AWQ does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from qatbench.quant.grid import Grid
from qatbench.quant.result import Quantized
from qatbench.quant.rtn import round_to_nearest
from qatbench.vlm.load import Loaded

SAMPLES = 16
KEPT = 4 << 30  # bytes of dense weights of a method, on the device


def compare_layers(
    loaded: Loaded,
    quantized: Quantized,
    names: Sequence[str],
    grid: Grid,
    batches: Sequence[Mapping[str, Tensor]],
) -> dict[str, Any]:
    """Relative squared output error of every decoder layer, for the method and for RTN.

    Uses the first 16 calibration samples. Relative to the squared size of the layer's update
    (output minus input), summed over samples.

    Returns: `samples`, `method` and `rtn` (one figure a layer), `above_rtn`: the layers whose
        error is not below RTN's, and a `reason` where there are any.
    """
    rtn = round_to_nearest(loaded.model, names, grid, lambda done, total: None)
    sums = _layer_errors(loaded, {"method": quantized, "rtn": rtn}, batches[:SAMPLES])
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
    loaded: Loaded, variants: Mapping[str, Quantized], batches: Sequence[Mapping[str, Tensor]]
) -> dict[str, list[float]]:
    layers = loaded.model.get_submodule(loaded.arch.layers)
    assert isinstance(layers, nn.ModuleList)
    weights = {kind: _Dense(variant, loaded) for kind, variant in variants.items()}
    errors = {kind: [0.0] * len(layers) for kind in variants}
    sizes = [0.0] * len(layers)
    busy = False

    def watch(index: int) -> Any:
        def hook(layer: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            nonlocal busy
            if busy:
                return
            busy = True
            wanted = _first(output).float()
            entered = _first(args[0] if args else kwargs["hidden_states"]).float()
            sizes[index] += (wanted - entered).square().sum().item()
            for kind, by_layer in weights.items():
                got = functional_call(layer, by_layer.of(index), args, kwargs)
                errors[kind][index] += (_first(got).float() - wanted).square().sum().item()
            busy = False

        return hook

    handles = [
        layer.register_forward_hook(watch(index), with_kwargs=True)
        for index, layer in enumerate(layers)
    ]
    try:
        for batch in batches:
            loaded.model(
                **{key: value.to(loaded.device) for key, value in batch.items()}, use_cache=False
            )
    finally:
        for handle in handles:
            handle.remove()
    return {
        kind: [error / size for error, size in zip(some, sizes, strict=True)]
        for kind, some in errors.items()
    }


def _first(value: Any) -> Tensor:
    tensor: Tensor = value[0] if isinstance(value, tuple) else value
    return tensor


class _Dense:
    """Dense weights of a decoder layer, kept for the next sample as long as `KEPT` bytes hold them.

    Of a 7B all of them would be 26 GB; its later layers are computed anew from their integers.
    """

    def __init__(self, variant: Quantized, loaded: Loaded) -> None:
        self.variant, self.prefix, self.device = variant, loaded.arch.layers, loaded.device
        self.kept: dict[int, dict[str, Tensor]] = {}
        self.room = KEPT

    def of(self, index: int) -> dict[str, Tensor]:
        """By name inside the layer."""
        if index in self.kept:
            return self.kept[index]
        inside = f"{self.prefix}.{index}."
        linears, changed = self.variant.linears, self.variant.changed
        found = {f"{name}.weight": linear for name, linear in linears.items()}
        weights = {
            name.removeprefix(inside): value.dense().to(self.device)
            for name, value in found.items()
            if name.startswith(inside)
        }
        weights |= {
            name.removeprefix(inside): value.to(self.device)
            for name, value in changed.items()
            if name.startswith(inside)
        }
        size = sum(value.numel() * value.element_size() for value in weights.values())
        if size <= self.room:
            self.kept[index] = weights
            self.room -= size
        return weights
