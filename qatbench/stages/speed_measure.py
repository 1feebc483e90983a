"""One case of a speed measurement: all that are loaded, in turns, and what their repeats make."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from qatbench.engine import pick
from qatbench.engine.runner import Runner
from qatbench.records_speed import SpeedRow, spread
from qatbench.stages.common import Progress
from qatbench.stages.meter import Meter, is_out_of_memory
from qatbench.stages.speed_prompts import Shown, prompts
from qatbench.stages.speed_questions import Asked
from qatbench.vlm.batch import Encoded, Encoder
from qatbench.vlm.counts import decode_bytes
from qatbench.vlm.load import ModelFolder


@dataclass(frozen=True)
class SpeedSettings:
    """What is measured."""

    engines: tuple[str, ...] = pick.ENGINES
    required: bool = False  # whether an engine that cannot run ends it, instead of a row
    batches: tuple[int, ...] = (1, 8, 32)
    contexts: tuple[int, ...] = (512, 2048)
    tokens: int = 64  # decoded a row, after the first
    repeats: int = 5
    warm_up: int = 1
    image: Shown = "none"
    in_turns: bool = True
    seed: int = 0
    device: str | None = None
    dtype: str | None = None
    asked: Asked | None = None


class Case(NamedTuple):
    """One batch at one context."""

    context: int
    batch: int


class Entrant:
    """A model in an engine, with what it alone holds of the device's memory."""

    def __init__(self, folder: ModelFolder, runner: Runner, held: int) -> None:
        self.folder, self.runner, self.held = folder, runner, held
        self.encoder = Encoder(runner.loaded)

    def facts(self) -> dict[str, Any]:
        """What names its rows."""
        return {
            **named(self.folder, self.runner.engine),
            "kernel": self.runner.kernel,
            "attention": self.runner.attention,
        }


class _Time(NamedTuple):
    """One repeat: seconds and bytes."""

    first: float
    decoding: float
    cache: int
    peak: int


@dataclass
class Count:
    """Repeats done, for the ETA."""

    progress: Progress
    total: int
    done: int = 0

    def add(self, count: int = 1) -> None:
        """Count and tell."""
        self.done += count
        self.progress("Measuring", self.done, self.total)


@dataclass(frozen=True)
class How:
    """What all measurements of a run share."""

    settings: SpeedSettings
    meter: Meter
    dtype: torch.dtype
    device: str
    bandwidth: float  # bytes/s


def named(folder: ModelFolder, engine: str) -> dict[str, Any]:
    """Model and engine of a row."""
    return {"model": folder.name, "fingerprint": folder.fingerprint(), "engine": engine}


def case_facts(folder: ModelFolder, case: Case, how: How) -> dict[str, Any]:
    """What a row says of its case."""
    return {
        "dtype": str(how.dtype).removeprefix("torch."),
        "batch": case.batch,
        "context": case.context,
        "images": int(how.settings.image != "none" and folder.arch.is_vlm),
    }


def measure(entrants: Sequence[Entrant], case: Case, how: How, count: Count) -> Iterator[SpeedRow]:
    """One case of all that are loaded, in turns; memory that runs out takes one out of them."""
    settings, rounds = how.settings, how.settings.warm_up + how.settings.repeats
    given = {id(entrant): _prompts(entrant, case, settings) for entrant in entrants}
    times: dict[int, list[_Time]] = {id(entrant): [] for entrant in entrants}
    full: set[int] = set()
    for turn in range(rounds):
        for entrant in entrants:
            mine = id(entrant)
            if mine not in full:
                time = _once(entrant, given[mine], settings.tokens, how.meter)
                if time is None:
                    full.add(mine)
                    how.meter.release()
                elif turn >= settings.warm_up:
                    times[mine].append(time)
            count.add()
    for entrant in entrants:
        mine = id(entrant)
        facts = entrant.facts() | case_facts(entrant.folder, case, how)
        facts["weight_bytes"] = entrant.runner.weight_bytes()
        if mine in full:
            why = f"a batch of {case.batch} at {case.context} tokens does not fit"
            yield SpeedRow(**facts, status="out of memory", reason=why)
        else:
            yield SpeedRow(**facts, status="ok", **_figures(entrant, case, times[mine], how))


def _prompts(entrant: Entrant, case: Case, settings: SpeedSettings) -> list[Encoded]:
    return prompts(
        entrant.encoder, case.batch, case.context, image=settings.image, seed=settings.seed
    )


def _once(entrant: Entrant, given: Sequence[Encoded], tokens: int, meter: Meter) -> _Time | None:
    """Read the prompts, decode, and look at the clock after each; None out of memory."""
    meter.collect()  # else what is left over of another's run would count, or not, by chance
    before = meter.held()
    meter.watch()
    try:
        first, decoding, cache = _timed(entrant.runner, given, tokens, meter)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return None
    peak = meter.peak() - before + entrant.held
    meter.collect()
    entrant.held += meter.held() - before  # what an engine keeps from the first run on
    return _Time(first, decoding, cache, peak)


def _timed(
    runner: Runner, given: Sequence[Encoded], tokens: int, meter: Meter
) -> tuple[float, float, int]:
    runner.prepare(given)
    begun = meter.now()
    started = runner.start(given, tokens + 1)
    read = meter.moment() if runner.ahead else meter.now()  # else its next step counts as reading
    runner.step(started, tokens)
    done = meter.now()
    return read - begun, done - read, runner.cache_bytes(started)


def _figures(entrant: Entrant, case: Case, times: Sequence[_Time], how: How) -> dict[str, Any]:
    """The figures of a row from its repeats."""
    settings = how.settings
    decode = spread([case.batch * settings.tokens / time.decoding for time in times])
    length = case.context + settings.tokens / 2  # of a row's cache, on the way
    head = entrant.runner.head_bytes(case.batch)
    moved = decode_bytes(entrant.folder.config, how.dtype.itemsize, case.batch, length, head)
    limit = None if moved is None else case.batch * how.bandwidth / moved
    counted = how.meter.counts_memory and not entrant.runner.reserves
    return {
        "first_token_seconds": spread([time.first for time in times]),
        "prefill_tokens_per_second": spread(
            [case.batch * case.context / time.first for time in times]
        ),
        "decode_tokens_per_second": decode,
        "cache_bytes": max(time.cache for time in times),
        "peak_bytes": max(time.peak for time in times) if counted else None,
        "moved_bytes": moved,
        "limit_tokens_per_second": limit,
        "share_of_limit": None if limit is None else decode.median / limit,
    }
