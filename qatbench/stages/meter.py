"""What speed is measured with: a clock that waits for the device, its memory, its bandwidth."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable

import torch

COPIED = {"cuda": 1 << 30, "cpu": 1 << 27}  # bytes of the tensor whose copy measures bandwidth


class Meter:
    """Clock and memory of one device; `clock` gives seconds."""

    def __init__(self, device: str, clock: Callable[[], float] = time.perf_counter) -> None:
        self.device = torch.device(device)
        self.counts_memory = self.device.type == "cuda"
        self._clock = clock

    def now(self) -> float:
        """Seconds, once all that was given to the device is done."""
        if self.counts_memory:
            torch.cuda.synchronize(self.device)
        return self._clock()

    def moment(self) -> float:
        """Seconds, whatever the device is doing: for what is on the host already."""
        return self._clock()

    def held(self) -> int:
        """Bytes of all tensors on the device; 0 on the CPU, where nobody counts them."""
        return torch.cuda.memory_allocated(self.device) if self.counts_memory else 0

    def watch(self) -> None:
        """Forget the peak so far."""
        if self.counts_memory:
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak(self) -> int:
        """Most bytes held since `watch`."""
        return torch.cuda.max_memory_allocated(self.device) if self.counts_memory else 0

    def collect(self) -> None:
        """Where memory is counted, drop what nobody refers to; the allocator keeps its memory."""
        if self.counts_memory:
            gc.collect()

    def release(self) -> None:
        """Drop it, and give its memory back to the device."""
        gc.collect()
        if self.counts_memory:
            torch.cuda.empty_cache()

    def bandwidth(self, repeats: int, size: int | None = None) -> tuple[int, list[float]]:
        """Copy a large tensor: (its bytes, bytes/s read and written, of each copy).

        Raises: torch.OutOfMemoryError.
        """
        size = size or COPIED[self.device.type]
        source = torch.ones(size, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        target.copy_(source)
        rates = []
        for _ in range(repeats):
            begun = self.now()
            target.copy_(source)
            rates.append(2 * size / (self.now() - begun))
        return size, rates


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a GPU or in torch's own words on a CPU."""
    words = ("can't allocate memory", "not enough memory")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    )
