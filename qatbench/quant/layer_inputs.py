"""What a model hands its decoder layers, sample by sample."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
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


@torch.no_grad()
def capture(
    model: nn.Module,
    layers: nn.ModuleList,
    batches: Sequence[Mapping[str, Tensor]],
    dtype: torch.dtype,
) -> LayerInputs:
    """Run every sample through the model and keep what its decoder layers get.

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

    def after(layer: nn.Module, args: Any, output: Any) -> None:
        left[:] = [output[0] if isinstance(output, tuple) else output]

    with contextlib.ExitStack() as hooks:
        for index, layer in enumerate(layers):
            hooks.callback(layer.register_forward_pre_hook(before(index), with_kwargs=True).remove)
            hooks.callback(layer.register_forward_hook(after).remove)
        device = next(model.parameters()).device
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
