"""Which kernel multiplies packed linears where nobody said: in `eval`, and in the engine."""

from __future__ import annotations

import os

import torch

from qatbench.vlm.load import ModelFolder

_ROOM = 0.25  # of the machine's memory that an unpacked model may take; `--jobs` loads several
_UNPACKED = 12  # bytes in memory for a byte of a 4-bit checkpoint: in fp32, and room to unpack it


def pick_kernel(folder: ModelFolder, device: str, dtype: torch.dtype) -> str:
    """`library` or `dense`: the library where it multiplies packed integers, else dense.

    The library has no such kernel at 3 and 2 bits, and at 4 bits on a CPU in fp32: there it would
    dequantize at every forward, through fp16 (`benchmarks/cpu_int4.py`). On a CPU `dense` is taken
    as long as the unpacked model takes at most a quarter of the memory. In bf16 the library's
    kernel decodes faster, and dense weights are rounded once more.
    """
    bits = (folder.quantization or {}).get("bits", 4)
    if bits not in (4, 8):
        return "dense"
    unpacks = device == "cpu" and bits == 4 and dtype == torch.float32
    fits = _UNPACKED * folder.weight_bytes() <= _ROOM * _memory()
    return "dense" if unpacks and fits else "library"


def _memory() -> int:
    """Bytes of memory that the machine has."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
