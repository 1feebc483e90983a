"""What an engine does: read prompts once, then tell tokens one by one, greedily."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from qatbench.vlm.batch import Encoded
from qatbench.vlm.load import Loaded


@dataclass
class Started:
    """A batch whose prompts were read.

    `first` are the tokens that the prompts lead to, (B,) int64 on the device; `room` is how many
    tokens, that one included, can be told; `state` belongs to the engine.
    """

    first: Tensor
    room: int
    state: Any


class Room(NamedTuple):
    """The most that will be asked of an engine at once."""

    rows: int
    prompt: int  # tokens of a row's prompt
    tokens: int  # told after it


class Runner(Protocol):
    """An engine with a model in it. All of its work is greedy; a row's padding changes nothing."""

    loaded: Loaded
    engine: str  # "transformers", "qatbench" or "vllm"
    kernel: str  # of the language model's linears at decoding: a class or a kernel's name
    attention: str  # of decoding
    at_once: int  # tokens that are best asked for at a time
    shrinks_at: float  # share of a batch's rows at which it pays to go on with those alone
    ahead: bool  # whether the device is at the next step already when tokens are told
    reserves: bool  # whether the cache's memory is taken at loading, for the most that is asked

    def prepare(self, prompts: Sequence[Encoded]) -> None:
        """Do what can be done for a `start` with these prompts before a clock runs."""

    def start(self, prompts: Sequence[Encoded], room: int) -> Started:
        """Read a batch of prompts, pictures included, and make room for `room` tokens a row."""

    def step(self, started: Started, count: int) -> Tensor:
        """The next `count` tokens of every row, ended or not: (B, count) int64 on the device.

        Called again it goes on. Raises: UsageError beyond the room.
        """

    def grow(self, started: Started, more: int) -> None:
        """Make room for more tokens a row."""

    def keep(self, started: Started, rows: Sequence[int]) -> None:
        """Go on with these rows of the batch alone, in this order."""

    def weight_bytes(self) -> int:
        """Bytes of all weights on the device: language model, embeddings, vision, scales."""

    def head_bytes(self, rows: int) -> int | None:
        """Bytes that a step of so many rows reads of the head, if not all; once it has run."""

    def cache_bytes(self, started: Started) -> int:
        """Bytes of keys and values that a batch holds, room included."""

    def close(self) -> None:
        """Give up the model; nothing can be asked after it."""


class Direct:
    """An engine that this process calls itself: nothing to prepare, nothing to close."""

    ahead = reserves = False

    def prepare(self, prompts: Sequence[Encoded]) -> None:
        """Nothing: `start` takes prompts as they are."""

    def head_bytes(self, rows: int) -> int | None:
        """None: all of it."""

    def close(self) -> None:
        """Nothing: what nobody refers to is given up."""
