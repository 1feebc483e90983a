"""The schema of speed.json: what `qatbench speed` measured, and with what. No torch here.

Rates are per second, sizes bytes, durations seconds. A row is one model in one engine at one batch
and context; everything in it was measured in the same run, on the same device.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Literal

from qatbench.records import Record

SPEED_VERSION: Literal[1] = 1

Status = Literal["ok", "out of memory", "not run"]


class Spread(Record):
    """Repeats of one measurement."""

    median: float
    low: float  # the least
    high: float  # the most
    values: tuple[float, ...]  # in the order measured

    @property
    def n(self) -> int:
        """How many repeats."""
        return len(self.values)


def spread(values: Sequence[float]) -> Spread:
    """Sum up repeats; at least one."""
    return Spread(median=median(values), low=min(values), high=max(values), values=tuple(values))


class SpeedRow(Record):
    """One model in one engine at one batch and context."""

    model: str  # as it was given
    fingerprint: str  # of the model
    engine: str
    kernel: str  # of the language model's linears at decoding
    attention: str  # of decoding
    dtype: str  # of activations and weights that are not quantized
    batch: int  # rows
    context: int  # tokens of a prompt, those of its picture included
    images: int  # of a prompt
    status: Status
    reason: str = ""  # of a status that is not ok
    first_token_seconds: Spread | None = None  # from prompts on the host to the first token
    prefill_tokens_per_second: Spread | None = None  # prompt tokens of all rows over that time
    decode_tokens_per_second: Spread | None = None  # of all rows, after the first token
    weight_bytes: int | None = None  # on the device, counted
    cache_bytes: int | None = None  # keys and values of all rows, room included, counted
    peak_bytes: int | None = None  # most that this model and engine held; CUDA only, not of vllm
    moved_bytes: float | None = None  # that a decoding step must move: weights once, cache
    limit_tokens_per_second: float | None = None  # if moving them were all, at `bandwidth`
    share_of_limit: float | None = None  # decoding over that limit
    decode_to_first: float | None = None  # over the first model's in this engine, of medians
    prefill_to_first: float | None = None
    decode_to_plain: float | None = None  # over the same model's in plain transformers
    prefill_to_plain: float | None = None


class EvaluationRow(Record):
    """Questions a second in option mode, as `eval` scores them."""

    model: str
    fingerprint: str
    engine: str
    kernel: str
    dtype: str
    task: str
    protocol: str
    questions: int  # rows, each with all its options
    padded_tokens: int  # at most, of a batch
    status: Status
    reason: str = ""
    questions_per_second: Spread | None = None


class Bandwidth(Record):
    """Of the device's memory, read and written, by a copy in the same run."""

    copied_bytes: int
    bytes_per_second: Spread


class SpeedModel(Record):
    """A model that was measured."""

    model: str
    fingerprint: str
    model_type: str
    bits: int | None  # of the quantized linears; None: 16 bits
    group_size: int | None
    method: str | None  # what made it, where that is known
    checkpoint_bytes: int


class Speed(Record):
    """speed.json."""

    schema_version: Literal[1] = SPEED_VERSION
    device: str
    gpu: str | None
    cpu_threads: int
    dtype: str
    seed: int  # of the prompts' tokens
    warm_up: int  # runs of each case that were not counted
    repeats: int
    tokens: int  # decoded a row and repeat, after the first
    in_turns: bool  # A B A B; else one model after the other
    image: str  # what a prompt of a vision-language model shows: none, mini, grey
    versions: dict[str, str]
    bandwidth: Bandwidth
    models: tuple[SpeedModel, ...]
    rows: tuple[SpeedRow, ...]
    evaluations: tuple[EvaluationRow, ...] = ()
    notes: tuple[str, ...] = ()  # what was left out, and why

    @property
    def on(self) -> str:
        """The device in words."""
        return self.gpu or self.device
