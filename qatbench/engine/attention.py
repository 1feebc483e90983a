"""Attention of a decoding step on CUDA, in several forms of two kernels.

`kernels/attention.cu` multiplies number by number, and runs any model; `kernels/grouped.cu` uses
the tensor cores where a key-value head serves several query heads. Either has a cluster of blocks
for a head and row.
"""

from __future__ import annotations

import ctypes
import itertools
from dataclasses import dataclass

import torch

from qatbench.engine import cuda
from qatbench.engine.form import Card
from qatbench.engine.fused import Fused, Layer
from qatbench.engine.weights import Packed

RESTS = (0, 1000, 2000, 3000)  # cycles
_STAGED = 32  # bytes of shared memory for a key and a value of a lane
_RESERVED = 2 << 10  # bytes of shared memory a block that are the system's, or for a few numbers
_PIECE = 16 << 10  # bytes
_KEYS = 16  # of a tile
_MOST_HEADS = 8  # of queries, of a block of grouped.cu


@dataclass(frozen=True)
class Attention:
    """How attention is built and launched: see the kernels."""

    splits: int  # blocks that share the keys of a row and head
    heads: int  # query heads that a block serves
    unroll: int  # keys that a lane takes at once; attention.cu
    staged: int  # keys that a lane asks for before its turn; grouped.cu: tiles, a warp
    blocks: int  # that share a multiprocessor at least
    late: bool = False  # the next kernel may start only when keys and values have come
    near: int = 0  # of 16 KB of what gate and up will read, those that are brought near, in KB
    warps: int = 0  # of a block of grouped.cu; 0: it is attention.cu
    rest: int = 0  # cycles before keys are asked for; grouped.cu

    @property
    def source(self) -> tuple[str, str]:
        """File and function."""
        return ("grouped.cu", "grouped") if self.warps else ("attention.cu", "attention")

    def all_warps(self, head: int) -> int:
        """Of a block; those of attention.cu are so few that their sums fit into shared memory."""
        return self.warps or (8 if self.heads * head <= 1024 else 4)

    def shared(self, head: int) -> int:
        """Bytes of dynamic shared memory of a block."""
        if self.warps:
            return self.staged * self.warps * _KEYS * head * 4
        return self.staged * self.all_warps(head) * 32 * _STAGED

    def defines(self, group: int, head: int, norms: bool) -> dict[str, int]:
        """What the source is compiled with, for so many query heads of a key-value head."""
        return {
            "D": head, "G": self.heads, "HEADS": group, "WARPS": self.all_warps(head),
            "SPLITS": self.splits, "STAGED": self.staged, "BLOCKS": self.blocks,
            "HEADNORM": int(norms), **({} if self.warps else {"UNROLL": self.unroll}),
        }  # fmt: skip

    def fits(self, head: int, card: Card) -> bool:
        """Whether a block fits into a multiprocessor; of grouped.cu, so many as shall share it."""
        if not self.warps:
            fixed, many = 4 * (self.all_warps(head) + 1) * self.heads * head, 1
        else:
            ready = (self.heads + 2) * (2 * head + 64) + self.warps * 320 + 128
            fixed, many = ready + 4 * head * (self.heads + 1) + 8 * self.splits * 8, self.blocks
        return many * (self.shared(head) + fixed + _RESERVED) <= card.shared


class Later(ctypes.Structure):
    """What attention brings near for a kernel to come."""

    _fields_ = (("from", ctypes.c_void_p), ("pieces", ctypes.c_uint), ("take", ctypes.c_uint))


def later(layer: Layer, near: int) -> Later:
    """The beginnings of the weights of gate and up, `near` KB of 16."""
    weight = layer.gate_up.weight
    words = weight.words if isinstance(weight, Packed) else weight
    pieces = words.numel() * words.element_size() // _PIECE if near else 0
    return Later(words.data_ptr(), pieces, near << 10)


def attentions(fused: Fused, rows: int) -> list[Attention]:
    """All that can run and may be the fastest; the first one is a good guess."""
    s, card = fused.decoder.sizes, Card.current()
    overlaps = torch.cuda.get_device_capability() >= cuda.OVERLAPS
    found: list[Attention] = []

    def splits(heads: int, most: int) -> list[int]:
        at_least = rows * s.kv_heads * s.group // heads
        every = [2**n for n in range(most.bit_length() - 1, -1, -1)]
        some = [n for n in every if 2 * n * at_least <= 5 * card.multiprocessors] or [1]
        return some[:2] if overlaps else [1]

    for heads in sorted({n for n in (1, 2, 3, 4, 6, 8, s.group) if s.group % n == 0}):
        shapes = [(2, 4, 4), (2, 8, 3), (4, 8, 2), (4, 12, 2)] if heads == 1 else [
            (2, 4, 2), (1, 4, 2), (2, 4, 1), (1, 4, 1)]  # fmt: skip
        found += [Attention(n, heads, *shape) for n in splits(heads, 8) for shape in shapes]
    for heads in [n for n in range(_MOST_HEADS, 1, -1) if s.group % n == 0][:2]:
        for n, warps, staged, blocks in itertools.product(
            splits(heads, 16), (8, 4), (1, 2), (2, 1)
        ):
            found.append(Attention(n, heads, 1, staged, blocks, warps=warps))
    return [form for form in found if form.fits(s.head, card)]
