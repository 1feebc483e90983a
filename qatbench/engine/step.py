"""One decoding step of a batch on CUDA: its buffers, its launches, its graph."""

from __future__ import annotations

import ctypes
import functools
import itertools
import math
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from qatbench.engine import cuda
from qatbench.engine.decoder import Cache
from qatbench.engine.forms import replay_seconds
from qatbench.engine.fused import Fused, Layer
from qatbench.engine.products import NextNorm, Weights, address, multiprocessors, shared_bytes
from qatbench.engine.weights import CHUNK, TILE, Packed

_CHOOSERS = 32  # blocks a row that look for the likeliest token
_STATIC = 47 << 10  # bytes of shared memory beside what is on its way
_MOST_SPLITS = 16


class _Attention(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in (
            "qkv", "keys", "values", "rope", "filled", "start", "turned", "q_norm", "k_norm", "out",
        )),
        ("eps", ctypes.c_float), ("scale", ctypes.c_float),
        *((name, ctypes.c_int) for name in ("length", "heads", "group")),
    )  # fmt: skip


class _Layer(ctypes.Structure):
    _fields_ = (
        ("weights", Weights * 4), ("bias", ctypes.c_void_p * 4), ("norm", ctypes.c_void_p * 2),
        *((name, ctypes.c_void_p) for name in ("q_norm", "k_norm", "keys", "values")),
    )  # fmt: skip


class _Step(ctypes.Structure):
    _fields_ = (
        ("attention", _Attention),
        *((name, ctypes.c_void_p) for name in (
            "x", "scaled", "qkv", "seen", "inner", "squares", "partial", "arrived", "barrier",
        )),
        ("eps", ctypes.c_float),
        *((name, ctypes.c_int) for name in ("columns", "layers", "splits")),
    )  # fmt: skip


@dataclass(frozen=True)
class Whole:
    """How the kernel of all layers is built: see `layers.cu`."""

    warps: int
    tiles: int
    depth: int


class Step:
    """One decoding step of a batch, captured; replayed, every row is a token further.

    All layers are one kernel (`layers.cu`) or five a layer, whichever was measured to be faster.
    """

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
        self.count, self.left, self.barrier = zeros(rows), zeros(rows), zeros(1)
        self.best = torch.zeros(rows, dtype=torch.int64, device=device)
        cos, sin = fused.decoder.rope(cache.length + 1)
        half = s.head // 2
        self.rope = torch.stack((cos[:, :half], sin[:, :half]), -1).float().contiguous()
        # Query heads that a block takes at a time: what its registers hold.
        self.heads = max(n for n in range(1, 5) if s.group % n == 0 and n * s.head <= 512)
        self.parts = s.group // self.heads
        items = rows * s.kv_heads * self.parts
        self.clusters = _clusters(items)
        self.splits = max(1, min(_MOST_SPLITS, multiprocessors() // items))
        self.partial = torch.empty(
            items * self.splits * self.heads * (s.head + 2), dtype=torch.float32, device=device
        )
        self.arrived = zeros(items)
        self.table = self._table()
        self.graph: torch.cuda.CUDAGraph | None = None
        self.whole = self._fastest()

    # --- launches ---------------------------------------------------------------------------------

    def launch(self, whole: Whole | None) -> None:
        """All kernels of a step, on the current stream."""
        fused, s = self.fused, self.fused.decoder.sizes
        rows = len(self.token)
        table = fused.decoder.inner.embed_tokens.weight
        embed = cuda.kernel("small.cu", "embed")
        embed(
            (rows,), 256, self.token, table, fused.layers[0].first_norm, self.x, self.scaled,
            self.squares, self.barrier, ctypes.c_int(s.hidden // 8),
            ctypes.c_int(len(self.squares)),
        )  # fmt: skip
        if whole:
            self._layers(whole)
        else:
            self._one_by_one()
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

    def _one_by_one(self) -> None:
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

    def _layers(self, whole: Whole) -> None:
        s, fused = self.fused.decoder.sizes, self.fused
        rows = len(self.token)
        function = cuda.kernel(
            "layers.cu", "layers", shared=self._shared(whole), **self._defines(whole)
        )
        pointers = (
            self.x, self.scaled, self.qkv, self.seen, self.inner, self.squares, self.partial,
            self.arrived, self.barrier,
        )  # fmt: skip
        step = _Step(
            self._attention(0), *map(address, pointers), s.eps, rows, len(fused.layers), self.splits
        )
        function((multiprocessors(),), whole.warps * 32, self.table, step)

    def _defines(self, whole: Whole) -> dict[str, int]:
        s, layer = self.fused.decoder.sizes, self.fused.layers[0]
        defines = layer.qkv.defines(len(self.token)) | {
            "MT": whole.tiles, "WARPS": whole.warps, "DEPTH": whole.depth, "D": s.head,
            "HEADS": self.heads, "UNROLL": 4 if self.heads == 1 else 2,
            "HEADNORM": int(layer.q_norm is not None),
        }  # fmt: skip
        return defines

    def _table(self) -> Tensor:
        """What the kernel of all layers has to know of each, on the device."""
        fused, cache = self.fused, self.cache
        rows = []
        for i, (layer, norm) in enumerate(zip(fused.layers, self._following(), strict=True)):
            products = layer.products()
            rows.append(_Layer(
                (Weights * 4)(*(product.c_weights() for product in products)),
                (ctypes.c_void_p * 4)(*(address(product.bias) for product in products)),
                (ctypes.c_void_p * 2)(address(layer.second_norm), address(norm)),
                address(layer.q_norm), address(layer.k_norm), address(cache.keys[i]),
                address(cache.values[i]),
            ))  # fmt: skip
        data = b"".join(bytes(row) for row in rows)
        return torch.frombuffer(bytearray(data), dtype=torch.uint8).to(self.token.device)

    # --- which form -------------------------------------------------------------------------------

    def _shared(self, whole: Whole) -> int:
        return whole.warps * whole.depth * self.fused.layers[0].qkv.slot_bytes(whole.tiles)

    def _candidates(self) -> list[Whole]:
        """Forms of the kernel of all layers that can run; [] where it cannot."""
        products = [p for layer in self.fused.layers for p in layer.products()]
        kinds = {(p.weight.group, p.weight.zeros is None) if isinstance(p.weight, Packed) else None
                 for p in products}  # fmt: skip
        columns = products[0].defines(len(self.token))["NT"]
        if len(kinds) > 1 or columns > 2:
            return []
        size = self.fused.decoder.sizes.head
        found = []
        for warps, tiles, depth in itertools.product((8, 12, 16), (1, 2), (2, 3, 4, 6, 8)):
            whole = Whole(warps, tiles, depth)
            static = warps * max(tiles * columns * 512, self.heads * (size + 2) * 4)
            fits = static + self.heads * (size + 2) * 4 < _STATIC
            room = shared_bytes() - 1024 - static - 4096
            shapes = all(
                p.rows % (TILE * tiles) == 0 and p.width // max(CHUNK, p.span) >= warps
                for p in products
            )
            if fits and shapes and self._shared(whole) <= room:
                found.append(whole)
        return found

    def _fastest(self) -> Whole | None:
        """The measured choice, for the model's shapes and the size of the batch."""
        forms, layer = self.fused.forms, self.fused.layers[0]
        rows = len(self.token)
        kinds = ", ".join(product.kind(rows) for product in layer.products())
        kind = f"{len(self.fused.layers)} layers of {kinds}, {rows} rows"
        if kind not in forms.table:
            candidates = self._candidates()
            cuda.compile_all([("layers.cu", self._defines(whole)) for whole in candidates])
            times = {whole: self._seconds(whole) for whole in (None, *candidates)}
            best = min(times, key=lambda whole: times[whole])
            forms.keep(kind, asdict(best) if best else {})
        known = forms.table[kind]
        return Whole(**known) if known else None

    def _seconds(self, whole: Whole | None) -> float:
        with self._undone():
            return replay_seconds(self._captured(whole), 4)

    def _undone(self) -> _Undone:
        return _Undone([self.token, self.count, self.cache.filled, self.cache.turned])

    def _captured(self, whole: Whole | None) -> torch.cuda.CUDAGraph:
        self.launch(whole)  # every kernel is loaded before the capture
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.launch(whole)
        return graph

    def replay(self, steps: int) -> None:
        """Go on by some tokens; the first call captures."""
        if self.graph is None:
            with self._undone():
                self.graph = self._captured(self.whole)
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
