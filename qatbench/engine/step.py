"""A decoding step of a batch on CUDA: its kernels, captured as a graph."""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from qatbench.engine import cuda
from qatbench.engine.decoder import Cache
from qatbench.engine.fused import Fused, Layer
from qatbench.engine.products import Card, Form, NextNorm
from qatbench.engine.weights import Packed

_CHOOSERS = 32  # blocks a row that look for the likeliest token
_STAGED = 32  # bytes of shared memory for a key and a value of a lane
_RESERVED = 2 << 10  # bytes of shared memory a block that are the system's, or for a few numbers
_PIECE = 16 << 10  # bytes
_IN_A_ROW = 8  # steps that are a graph of their own: between graphs the device idles


class _Later(ctypes.Structure):
    _fields_ = (("from", ctypes.c_void_p), ("pieces", ctypes.c_uint), ("take", ctypes.c_uint))


@dataclass(frozen=True)
class Attention:
    """How attention is built and launched: see `kernels/attention.cu`."""

    splits: int  # blocks that share the keys of a row and head
    heads: int  # query heads that a block serves
    unroll: int  # keys that a lane takes at once
    staged: int  # keys that a lane asks for before its turn
    blocks: int  # that share a multiprocessor at least
    late: bool = False  # the next kernel may start only when keys and values have come
    near: int = 0  # of 16 KB of what gate and up will read, those that are brought near, in KB


def attentions(fused: Fused, rows: int) -> list[Attention]:
    """All that can run and may be the fastest; the first one is a good guess."""
    s, card = fused.decoder.sizes, Card.current()
    found = []
    for heads in sorted({n for n in (1, 2, 3, 4, 6, 8, s.group) if s.group % n == 0}):
        at_least = rows * s.kv_heads * s.group // heads
        splits = [n for n in (8, 4, 2, 1) if 2 * n * at_least <= 5 * card.multiprocessors] or [1]
        if torch.cuda.get_device_capability() < cuda.OVERLAPS:
            splits = [1]
        shapes = [(2, 4, 4), (2, 8, 3), (4, 8, 2), (4, 12, 2)] if heads == 1 else [
            (2, 4, 2), (1, 4, 2), (2, 4, 1), (1, 4, 1)]  # fmt: skip
        every = [Attention(n, heads, *shape) for n in splits[:2] for shape in shapes]
        sums = 4 * (_warps(heads, s.head) + 1) * heads * s.head
        most = card.shared - _RESERVED - sums
        found += [form for form in every if _staged(form, s.head) <= most]
    return found


def _warps(heads: int, head: int) -> int:
    """Of a block of attention: their sums fit into shared memory."""
    return 8 if heads * head <= 1024 else 4


def _staged(form: Attention, head: int) -> int:
    """Bytes of dynamic shared memory of a block of attention."""
    return form.staged * _warps(form.heads, head) * 32 * _STAGED


@dataclass
class Chosen:
    """The forms of a step's kernels; of products by identity."""

    products: dict[int, Form]
    attention: Attention


class Step:
    """One decoding step of a batch, captured; replayed, every row is a token further."""

    def __init__(
        self, fused: Fused, cache: Cache, token: Tensor, room: int, chosen: Chosen | None = None
    ) -> None:
        s, device = fused.decoder.sizes, token.device
        rows = len(token)
        self.fused, self.cache, self.token, self.room = fused, cache, token, room
        new = functools.partial(torch.empty, dtype=torch.bfloat16, device=device)
        zeros = functools.partial(torch.zeros, dtype=torch.int32, device=device)
        inner = max(layer.gate_up.rows // 2 for layer in fused.layers)
        self.x, self.scaled = new(rows, s.hidden), new(rows, s.hidden)
        self.squares = torch.zeros(2 * s.layers + 1, rows, dtype=torch.float64, device=device)
        self.qkv = new(rows, (s.heads + 2 * s.kv_heads) * s.head)
        self.seen = new(rows, s.heads * s.head)
        self.inner = new(rows, inner)
        self.logits = torch.empty(rows, fused.head.rows, dtype=torch.float32, device=device)
        self.told = torch.zeros(rows, room, dtype=torch.int64, device=device)
        self.count, self.left = zeros(rows), zeros(rows)
        self.best = torch.zeros(rows, dtype=torch.int64, device=device)
        self.chosen = chosen or first_guess(fused, rows)
        cos, sin = fused.decoder.rope(cache.length + 1)
        half = s.head // 2
        self.rope = torch.stack((cos[:, :half], sin[:, :half]), -1).float().contiguous()
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}  # by steps

    def launch(self) -> None:
        """All kernels of a step, on the current stream."""
        s, rows = self.fused.decoder.sizes, len(self.token)
        self.launch_layers(range(s.layers))
        choose = cuda.kernel("small.cu", "choose")
        choose(
            (_CHOOSERS, rows), 256, self.logits, ctypes.c_int(s.vocabulary),
            ctypes.c_int(self.logits.shape[1]), self.best, self.left, self.token, self.told,
            self.count, self.cache.filled, self.cache.turned, ctypes.c_int(self.room),
        )  # fmt: skip

    def launch_layers(self, indices: Iterable[int]) -> None:
        """A step from the token to its logits through some of the layers; nothing goes on."""
        fused, s = self.fused, self.fused.decoder.sizes
        rows, forms = len(self.token), self.chosen.products
        table = fused.decoder.inner.embed_tokens.weight
        embed = cuda.kernel("small.cu", "embed")
        embed(
            (rows,), 256, self.token, table, fused.layers[0].first_norm, self.x, self.scaled,
            self.squares, ctypes.c_int(s.hidden // 8), ctypes.c_int(len(self.squares)),
        )  # fmt: skip
        following = [layer.first_norm for layer in fused.layers[1:]] + [fused.norm]
        for i in indices:
            layer, norm = fused.layers[i], following[i]
            first, second, third = self.squares[2 * i : 2 * i + 3]
            layer.qkv(forms[id(layer.qkv)], self.scaled, self.qkv, squares=first, eps=s.eps)
            self._attend(i, layer)
            after = NextNorm(layer.second_norm, self.scaled, second)
            layer.out(forms[id(layer.out)], self.seen, self.x, after=after)
            gate_up = forms[id(layer.gate_up)]
            layer.gate_up(gate_up, self.scaled, self.inner, squares=second, eps=s.eps)
            after = NextNorm(norm, self.scaled, third)
            layer.down(forms[id(layer.down)], self.inner, self.x, after=after)
        last = self.squares[-1]
        fused.head(forms[id(fused.head)], self.scaled, self.logits, squares=last, eps=s.eps)

    def attention_kernel(self, form: Attention, norms: bool) -> cuda.Kernel:
        """Attention in a form."""
        shared = _staged(form, self.fused.decoder.sizes.head)
        defines = self.attention_defines(form, norms)
        return cuda.kernel("attention.cu", "attention", shared=shared, **defines)

    def attention_defines(self, form: Attention, norms: bool) -> dict[str, int]:
        """What its source is compiled with."""
        s = self.fused.decoder.sizes
        return {
            "D": s.head, "G": form.heads, "HEADS": s.group, "WARPS": _warps(form.heads, s.head),
            "SPLITS": form.splits, "UNROLL": form.unroll, "STAGED": form.staged,
            "BLOCKS": form.blocks, "HEADNORM": int(norms),
        }  # fmt: skip

    def _attend(self, index: int, layer: Layer) -> None:
        s, cache, form = self.fused.decoder.sizes, self.cache, self.chosen.attention
        kernel = self.attention_kernel(form, layer.q_norm is not None)
        grid = (form.splits, s.kv_heads * s.group // form.heads, len(self.token))
        kernel(
            grid, 32 * _warps(form.heads, s.head), self.qkv, cache.keys[index], cache.values[index],
            self.rope, cache.filled, cache.start, cache.turned, layer.q_norm, layer.k_norm,
            ctypes.c_float(s.eps), self.seen, ctypes.c_int(cache.length),
            ctypes.c_float(math.log2(math.e) / math.sqrt(s.head)), ctypes.c_int(form.late),
            _later(layer, form.near),
        )  # fmt: skip

    def replay(self, steps: int) -> None:
        """Go on by some tokens; the first calls capture."""
        for many in (_IN_A_ROW, 1):
            for _ in range(steps // many):
                self._graph(many).replay()
            steps %= many

    def _graph(self, steps: int) -> torch.cuda.CUDAGraph:
        """Of some steps; the first call captures it."""
        if steps not in self.graphs:
            state = (self.token, self.count, self.cache.filled, self.cache.turned)
            before = [tensor.clone() for tensor in state]
            self.launch()  # for kernels to be loaded
            for tensor, value in zip(state, before, strict=True):
                tensor.copy_(value)

            def run() -> None:
                for _ in range(steps):
                    self.launch()

            self.graphs[steps] = cuda.capture(run)
        return self.graphs[steps]


def _later(layer: Layer, near: int) -> _Later:
    """What attention brings near for gate and up."""
    weight = layer.gate_up.weight
    words = weight.words if isinstance(weight, Packed) else weight
    pieces = words.numel() * words.element_size() // _PIECE if near else 0
    return _Later(words.data_ptr(), pieces, near << 10)


def first_guess(fused: Fused, rows: int) -> Chosen:
    """Forms that run, from which a better choice is looked for."""
    card = Card.current()
    products: dict[int, Form] = {}
    for alike in fused.kinds(rows).values():
        forms = alike[0].forms(rows, card)
        wished = (form for form in forms if (form.warps, form.tiles, form.blocks) == (16, 1, 2))
        products |= dict.fromkeys(map(id, alike), next(wished, forms[-1]))
    return Chosen(products, attentions(fused, rows)[0])
