"""Plain transformers as an engine: the library's kernels, one eager forward a token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from qatbench.engine.runner import Direct, Started
from qatbench.errors import UsageError
from qatbench.vlm import load as models
from qatbench.vlm.batch import Encoded
from qatbench.vlm.generate import Decoding, begin, keep, tell
from qatbench.vlm.load import Loaded, ModelFolder


class PlainRunner(Direct):
    """What `from_pretrained` gives and nothing else; its tokens are those of `vlm.generate`."""

    engine = "transformers"
    at_once, shrinks_at = 1, 1.0

    def __init__(self, loaded: Loaded) -> None:
        self.loaded = loaded
        self.kernel = models.kernel_name(loaded)
        self.attention = str(loaded.model.config.get_text_config()._attn_implementation)

    def start(self, prompts: Sequence[Encoded], room: int) -> Started:
        """Read a batch of prompts, pictures included, and make room for `room` tokens a row."""
        batch = begin(self.loaded, prompts, room)
        return Started(tell(self.loaded, batch), room, batch)

    def step(self, started: Started, count: int) -> Tensor:
        """The next `count` tokens of every row, ended or not: (B, count) int64 on the device.

        Raises: UsageError beyond the room.
        """
        batch: Decoding = started.state
        left = batch.positions.shape[-1] - batch.mask.shape[1]
        if count > left:
            raise UsageError(f"{count} more tokens asked for, and there is room for {left}")
        told = [tell(self.loaded, batch) for _ in range(count)]
        return torch.stack(told, 1) if told else started.first.new_empty(len(started.first), 0)

    def grow(self, started: Started, more: int) -> None:
        """Make room for more tokens a row."""
        batch: Decoding = started.state
        further = torch.arange(1, more + 1, device=batch.positions.device)
        after = batch.positions[..., -1:] + further  # text counts alike on all axes
        batch.positions = torch.cat((batch.positions, after), -1)
        started.room += more

    def keep(self, started: Started, rows: Sequence[int]) -> None:
        """Go on with these rows of the batch alone."""
        keep(started.state, rows)

    def weight_bytes(self) -> int:
        """Bytes of all weights on the device."""
        return held_bytes(self.loaded.model)

    def cache_bytes(self, started: Started) -> int:
        """Bytes of keys and values that a batch holds, when its room is used."""
        batch: Decoding = started.state
        held = [tensor for layer in batch.cache.layers for tensor in (layer.keys, layer.values)]
        position = sum(int(tensor.nbytes) // int(tensor.shape[-2]) for tensor in held)
        return position * int(batch.positions.shape[-1])


def held_bytes(model: Any) -> int:
    """Bytes of a model's parameters and buffers; what two modules share counts once."""
    held = (*model.parameters(), *model.buffers())
    return sum({(tensor.data_ptr(), tensor.nbytes): tensor.nbytes for tensor in held}.values())


def load(
    folder: ModelFolder,
    *,
    device: str,
    dtype: torch.dtype,
    progress: Callable[[str, int, int], None] | None = None,
) -> PlainRunner:
    """Load a model into the engine.

    Raises: as `vlm.load.load`.
    """
    return PlainRunner(models.load(folder, device=device, dtype=dtype))
