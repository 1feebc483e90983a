"""Where the time of quantizing with gptqmodel goes, by the verb and by the library alike.

`watched` wraps the same places in both ways. Seconds that the library's main thread spends, which
add up to `quantize` with `elsewhere`:

capture_inputs         what enters the first layer: vision tower, projector, embeddings
to_device, to_cpu      a layer's way there before, and back after it is solved
pre_quant_forward      layers on the samples, gathering Hessians; one pass for each group of linears
waiting_for_solver     until the solver's threads are done with a group of linears
post_quant_forward     a solved layer on the samples, for what enters the next one
waiting_for_packing    at the end, until the threads are done that pack (ours: take codes)

and sums over threads, which work beside each other and the main one: `process_quant` (the solver),
`submodule_finalize` (all that is done with a solved linear), of which `submodule_finalize_pack`
(the library's packing; ours: taking codes) and `submodule_finalize_create`; `forward_hook` is a
part of `pre_quant_forward`. Kernels run on behind the main thread: what starts them is not always
what waits for them. `garbage_collection` is Python's, in whatever thread, of the whole run.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from qatbench.quant import backends

MAIN = (
    "capture_inputs", "to_device", "to_cpu", "pre_quant_forward", "waiting_for_solver",
    "post_quant_forward", "waiting_for_packing",
)  # fmt: skip
OF_THE_MODEL = {"quantize": "quantize", "pre_quantize": "to_device", "post_quantize": "to_cpu"}


class Clock:
    """Seconds by name."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = {}

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, its seconds added up under the name."""

        def run(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.add(name, time.perf_counter() - started)

        return run

    def add(self, name: str, seconds: float) -> None:
        """To what is there."""
        self.spent[name] = self.spent.get(name, 0.0) + seconds


@contextlib.contextmanager
def collections(clock: Clock) -> Iterator[None]:
    """Seconds of Python's garbage collector."""
    started = [0.0]

    def tell(phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            started[0] = time.perf_counter()
        else:
            clock.add("garbage_collection", time.perf_counter() - started[0])

    gc.callbacks.append(tell)
    try:
        yield
    finally:
        gc.callbacks.remove(tell)


def _places() -> list[tuple[Any, str, str]]:
    """What waits in the library's main thread: owner, attribute, name."""
    looper = importlib.import_module("gptqmodel.looper.module_looper")
    subset = importlib.import_module("gptqmodel.looper.stage_subset")
    return [
        (subset, "_collect_worker_results", "waiting_for_solver"),
        (looper.DEVICE_THREAD_POOL, "wait", "waiting_for_packing"),
        (looper.ModuleLooper, "wait_dangling_threads", "waiting_for_packing"),
    ]


@contextlib.contextmanager
def watched(into: dict[str, Any]) -> Iterator[None]:
    """`loading_seconds`, which the library takes to read the model, and `regions` of `quantize`."""
    clock, load = Clock(), backends._load
    timers: list[Any] = []  # the library's own

    def loaded(*args: Any, **kwargs: Any) -> Any:
        model = clock.timed("loading", load)(*args, **kwargs)
        into["loading_seconds"] = round(clock.spent.pop("loading"), 2)
        timers.append(model.quant_region_timer)
        for attribute, name in OF_THE_MODEL.items():
            setattr(model, attribute, clock.timed(name, getattr(model, attribute)))
        return model

    with contextlib.ExitStack() as undo:
        backends._load = loaded
        undo.callback(setattr, backends, "_load", load)
        backends._library()
        for owner, attribute, name in _places():
            original = getattr(owner, attribute)
            setattr(owner, attribute, clock.timed(name, original))
            undo.callback(setattr, owner, attribute, original)
        undo.enter_context(collections(clock))
        yield
    for timer in timers:
        into["regions"] = _regions(clock, timer)


def _regions(clock: Clock, timer: Any) -> dict[str, float]:
    stats = {name: stat["total"] for name, stat in timer.snapshot().items() if stat["count"]}
    seconds = stats | clock.spent
    seconds["elsewhere"] = seconds["quantize"] - sum(seconds.get(name, 0.0) for name in MAIN)
    order = ["quantize", *MAIN, "elsewhere"]
    names = [name for name in order if name in seconds] + sorted(seconds.keys() - set(order))
    return {name: round(seconds[name], 2) for name in names}


def touch(gigabytes: int) -> None:
    """Write to so much host memory, and give it back."""
    blocks = [torch.ones(1 << 30, dtype=torch.uint8) for _ in range(gigabytes)]
    del blocks


@contextlib.contextmanager
def measured(into: dict[str, Any]) -> Iterator[None]:
    """Seconds and peak GB (1e9 bytes) of what is done inside."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    started = time.monotonic()
    yield
    into["seconds"] = round(time.monotonic() - started, 1)
    if torch.cuda.is_available():
        into["peak_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)


class Phases:
    """When each thing that the verb tells of itself began."""

    def __init__(self) -> None:
        self.started = {"reading": time.monotonic()}

    def __call__(self, what: str, done: int, total: int) -> None:
        """Told by the verb."""
        self.started.setdefault(what, time.monotonic())

    def seconds(self) -> dict[str, float]:
        """Of each, until the next began."""
        ends = [*list(self.started.values())[1:], time.monotonic()]
        spans = zip(self.started.items(), ends, strict=True)
        return {what: round(end - start, 1) for (what, start), end in spans}
