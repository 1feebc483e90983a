"""What a model hands its decoder layers, sample by sample."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from qatbench.errors import PrerequisiteError

IGNORED = -100  # a token that the loss leaves out


@dataclass
class LayerInputs:
    """What a model hands its decoder layers, by sample.

    Shapes: first (1, tokens, width); added likewise; tokens (1, tokens) int64.
    """

    dtype: torch.dtype
    first: list[Tensor] = field(default_factory=list)  # input of the first layer
    others: list[list[dict[str, Any]]] = field(default_factory=list)  # keywords, by layer
    added: list[list[Tensor | None]] = field(default_factory=list)  # between a layer and the last
    tokens: list[Tensor] = field(default_factory=list)  # ids, IGNORED where the loss looks away

    def entering(self, index: int, left: Sequence[Tensor]) -> list[Tensor]:
        """What goes into a layer when `left` came out of the one before."""
        pairs = zip(left, self.added[index], strict=True)
        return [value if more is None else value + more for value, more in pairs]

    def keywords(self, index: int) -> dict[str, list[Any]]:
        """Keyword arguments of a layer, a list over samples each, floats in `dtype`."""
        rows = self.others[index]
        return {key: [_cast(row[key], self.dtype) for row in rows] for key in rows[0]}


class _Relay(nn.Module):
    """In a decoder layer's place: hands zeros on, so that what a model adds stands alone."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        object.__setattr__(self, "layer", layer)  # no part of the model: it stays where it is

    def __getattr__(self, name: str) -> Any:
        """What a model asks a layer for, e.g. the kind of its attention."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.layer, name)

    def forward(self, hidden_states: Tensor, **_: Any) -> Tensor:
        """Nothing of its own."""
        return torch.zeros_like(hidden_states)


@contextlib.contextmanager
def visiting(module: nn.Module, device: torch.device | str) -> Iterator[None]:
    """Have a module's tensors copied to `device`; those it had are put back, not copied back.

    What is written to the copies is lost.
    """
    kept = [(tensor, tensor.data) for tensor in (*module.parameters(), *module.buffers())]
    try:
        for tensor, value in kept:
            tensor.data = value.to(device)
        yield
    finally:
        for tensor, value in kept:
            tensor.data = value


@contextlib.contextmanager
def without_layers(model: nn.Module, layers: nn.ModuleList, device: torch.device) -> Iterator[None]:
    """Put all of a model but its decoder layers on `device`, where relays stand for them."""
    originals = list(layers)
    try:
        for index, layer in enumerate(originals):
            layers[index] = _Relay(layer)
        with visiting(model, device):
            yield
    finally:
        for index, layer in enumerate(originals):
            layers[index] = layer


@torch.no_grad()
def capture(
    model: nn.Module,
    layers: nn.ModuleList,
    batches: Sequence[Mapping[str, Tensor]],
    dtype: torch.dtype,
    device: torch.device | str,
) -> LayerInputs:
    """Run every sample through what surrounds the decoder layers, and keep what these are handed.

    Layers are neither computed nor moved to `device`; the model is left as it was.

    Raises: PrerequisiteError when this transformers hands over more than one thing by position.
    """
    got = LayerInputs(dtype, others=[[] for _ in layers], added=[[] for _ in layers])
    left: list[Tensor] = []

    def before(index: int) -> Callable[..., None]:
        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if len(args) > 1:
                raise PrerequisiteError("decoder layers get more than one input by position")
            entered = args[0] if args else kwargs["hidden_states"]
            if index == 0:
                got.first.append(entered.to(dtype))
            same = index == 0 or entered is left[0]
            got.added[index].append(None if same else (entered - left[0]).to(dtype))
            got.others[index].append({k: v for k, v in kwargs.items() if k != "hidden_states"})

        return hook

    def after(layer: nn.Module, args: Any, output: Tensor) -> None:
        left[:] = [output]

    with contextlib.ExitStack() as around:
        around.enter_context(without_layers(model, layers, torch.device(device)))
        for index, layer in enumerate(layers):
            around.callback(layer.register_forward_pre_hook(before(index), with_kwargs=True).remove)
            around.callback(layer.register_forward_hook(after).remove)
        for batch in batches:
            model(**{key: value.to(device) for key, value in batch.items()}, use_cache=False)
            ids = batch["input_ids"].clone()
            ids[:, -1] = IGNORED  # nothing is predicted from it: the library leaves it out too
            got.tokens.append(ids)
    return got


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, tuple):
        return tuple(_cast(part, dtype) for part in value)
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
