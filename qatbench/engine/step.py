"""One decoding step of a batch on CUDA: its buffers, its launches, its graph."""

from __future__ import annotations

import ctypes
import functools
import math

import torch
from torch import Tensor

from qatbench.engine import cuda
from qatbench.engine.decoder import Cache
from qatbench.engine.fused import Fused, Layer
from qatbench.engine.products import NextNorm, address, multiprocessors

_CHOOSERS = 32  # blocks a row that look for the likeliest token


class _Attention(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in (
            "qkv", "keys", "values", "rope", "filled", "start", "turned", "q_norm", "k_norm", "out",
        )),
        ("eps", ctypes.c_float), ("scale", ctypes.c_float),
        *((name, ctypes.c_int) for name in ("length", "heads", "group")),
    )  # fmt: skip


class Step:
    """One decoding step of a batch, captured; replayed, every row is a token further."""

    def __init__(self, fused: Fused, cache: Cache, token: Tensor, room: int) -> None:
        s, device = fused.decoder.sizes, token.device
        rows = len(token)
        self.fused, self.cache, self.token, self.room = fused, cache, token, room
        new = functools.partial(torch.empty, dtype=torch.bfloat16, device=device)
        zeros = functools.partial(torch.zeros, dtype=torch.int32, device=device)
        self.x, self.scaled = new(rows, s.hidden), new(rows, s.hidden)
        self.squares = torch.zeros(2 * s.layers + 1, rows, dtype=torch.float64, device=device)
        self.qkv = new(rows, (s.heads + 2 * s.kv_heads) * s.head)
        self.seen = new(rows, s.heads * s.head)
        self.inner = new(rows, max(layer.gate_up.outputs for layer in fused.layers))
        self.logits = torch.empty(rows, fused.head.rows, dtype=torch.float32, device=device)
        self.told = torch.zeros(rows, room, dtype=torch.int64, device=device)
        self.count, self.left = zeros(rows), zeros(rows)
        self.best = torch.zeros(rows, dtype=torch.int64, device=device)
        cos, sin = fused.decoder.rope(cache.length + 1)
        half = s.head // 2
        self.rope = torch.stack((cos[:, :half], sin[:, :half]), -1).float().contiguous()
        # Query heads that a block takes at a time: what its registers hold.
        self.heads = max(n for n in range(1, 5) if s.group % n == 0 and n * s.head <= 512)
        self.parts = s.group // self.heads
        items = rows * s.kv_heads * self.parts
        self.clusters = _clusters(items)
        self.graph: torch.cuda.CUDAGraph | None = None

    # --- launches ---------------------------------------------------------------------------------

    def launch(self) -> None:
        """All kernels of a step, on the current stream."""
        fused, s = self.fused, self.fused.decoder.sizes
        rows = len(self.token)
        table = fused.decoder.inner.embed_tokens.weight
        embed = cuda.kernel("small.cu", "embed")
        embed(
            (rows,), 256, self.token, table, fused.layers[0].first_norm, self.x, self.scaled,
            self.squares, ctypes.c_int(s.hidden // 8),
            ctypes.c_int(len(self.squares)),
        )  # fmt: skip
        self._layers()
        form = fused.by_columns[rows][id(fused.head)]
        fused.head(form, self.scaled, self.logits, squares=self.squares[-1], eps=s.eps)
        choose = cuda.kernel("small.cu", "choose")
        choose(
            (_CHOOSERS, rows), 256, self.logits, ctypes.c_int(s.vocabulary),
            ctypes.c_int(self.logits.shape[1]), self.best, self.left, self.token, self.told,
            self.count, self.cache.filled, self.cache.turned, ctypes.c_int(self.room),
        )  # fmt: skip

    def _following(self) -> list[Tensor]:
        """Weight of the norm after each layer."""
        return [*(layer.first_norm for layer in self.fused.layers[1:]), self.fused.norm]

    def _layers(self) -> None:
        fused, eps = self.fused, self.fused.decoder.sizes.eps
        forms = fused.by_columns[len(self.token)]
        for i, (layer, norm) in enumerate(zip(fused.layers, self._following(), strict=True)):
            first, second, third = self.squares[2 * i : 2 * i + 3]
            layer.qkv(forms[id(layer.qkv)], self.scaled, self.qkv, squares=first, eps=eps)
            self._attend(i, layer)
            after = NextNorm(layer.second_norm, self.scaled, second)
            layer.out(forms[id(layer.out)], self.seen, self.x, after=after)
            gate_up = forms[id(layer.gate_up)]
            layer.gate_up(gate_up, self.scaled, self.inner, squares=second, eps=eps)
            after = NextNorm(norm, self.scaled, third)
            layer.down(forms[id(layer.down)], self.inner, self.x, after=after)

    def _attend(self, index: int, layer: Layer) -> None:
        s = self.fused.decoder.sizes
        unroll = 2 if self.heads > 1 else 8 if self.clusters == 1 else 4
        warps = 8 if self.heads * s.head <= 512 else 4
        function = cuda.kernel(
            "attention.cu", "attention", D=s.head, HEADS=self.heads, WARPS=warps, UNROLL=unroll,
            SPLITS=self.clusters, HEADNORM=int(layer.q_norm is not None),
        )  # fmt: skip
        grid = (self.clusters, s.kv_heads * self.parts, len(self.token))
        function(grid, warps * 32, self._attention(index))

    def _attention(self, index: int) -> _Attention:
        s, cache, layer = self.fused.decoder.sizes, self.cache, self.fused.layers[index]
        pointers = (
            self.qkv, cache.keys[index], cache.values[index], self.rope, cache.filled, cache.start,
            cache.turned, layer.q_norm, layer.k_norm, self.seen,
        )  # fmt: skip
        scale = math.log2(math.e) / math.sqrt(s.head)
        return _Attention(*map(address, pointers), s.eps, scale, cache.length, s.kv_heads, s.group)

    def _undone(self) -> _Undone:
        return _Undone([self.token, self.count, self.cache.filled, self.cache.turned])

    def _captured(self) -> torch.cuda.CUDAGraph:
        self.launch()  # every kernel is loaded before the capture
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.launch()
        return graph

    def replay(self, steps: int) -> None:
        """Go on by some tokens; the first call captures."""
        if self.graph is None:
            with self._undone():
                self.graph = self._captured()
        for _ in range(steps):
            self.graph.replay()


class _Undone:
    """What is launched inside is taken back: tensors have their values of before."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self.tensors = tensors

    def __enter__(self) -> None:
        self.before = [tensor.clone() for tensor in self.tensors]

    def __exit__(self, *_: object) -> None:
        for tensor, value in zip(self.tensors, self.before, strict=True):
            tensor.copy_(value)


def _clusters(items: int) -> int:
    """Blocks that share the keys of a row and head: enough for the card, at most a cluster's 8."""
    if torch.cuda.get_device_capability() < cuda.OVERLAPS:
        return 1
    return next((n for n in (1, 2, 4) if n * items >= 2 * multiprocessors()), 8)
