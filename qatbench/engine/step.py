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
from qatbench.engine.arguments import NextNorm, Row, Top, address
from qatbench.engine.attention import Attention, attentions, later
from qatbench.engine.decoder import Cache
from qatbench.engine.form import Card, Form
from qatbench.engine.fused import Fused, Layer

_CHOOSERS = 32  # blocks a row that look for the likeliest token
_IN_A_ROW = 8  # steps that are a graph of their own: between graphs the device idles


@dataclass
class Chosen:
    """The forms of a step's kernels; of products by identity.

    screened: logits are those of `Fused.screen`, but for the tokens that may be the likeliest.
    """

    products: dict[int, Form]
    attention: Attention
    screened: bool = False


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
        self.count, self.left = zeros(rows), zeros(rows)  # left: blocks that have looked
        self.best = torch.zeros(rows, dtype=torch.int64, device=device)
        self.top = torch.zeros_like(self.best)  # of a screen, see `decide` in `kernels/small.cu`
        self.chosen = chosen or first_guess(fused, rows)
        cos, sin = fused.decoder.rope(cache.length + 1)
        half = s.head // 2
        self.rope = torch.stack((cos[:, :half], sin[:, :half]), -1).float().contiguous()
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}  # by steps

    def launch(self) -> None:
        """All kernels of a step, on the current stream."""
        self.launch_layers(range(self.fused.decoder.sizes.layers))
        cache = self.cache
        self._choose(self.token, self.told, self.count, cache.filled, cache.turned)

    def launch_for_nothing(self, indices: Iterable[int]) -> None:
        """The same through some of the layers; nothing goes on."""
        self.launch_layers(indices)
        self._choose(*self._idle)

    @functools.cached_property
    def _idle(self) -> tuple[Tensor, ...]:
        cache = self.cache
        state = (self.token, self.told, self.count, cache.filled, cache.turned)
        return tuple(tensor.clone() for tensor in state)

    def _choose(self, token: Tensor, *state: Tensor) -> None:
        """The likeliest tokens, into what tells where rows stand."""
        fused, s = self.fused, self.fused.decoder.sizes
        addresses = map(address, (self.best, self.left, token, *state))
        row, tokens = Row(*addresses, self.room), ctypes.c_int(s.vocabulary)
        if not self.chosen.screened:
            choose = cuda.kernel("small.cu", "choose")
            stride = ctypes.c_int(self.logits.shape[1])
            choose((_CHOOSERS, len(token)), 256, self.logits, tokens, stride, row)
            return
        screen, head = fused.screen, fused.head.weight
        decide = cuda.kernel("small.cu", "decide", shared=2 * s.hidden)
        decide(
            (Card.current().multiprocessors,), 256, self.logits, tokens, self.top, screen.errors,
            ctypes.c_float(screen.most), head, self.scaled, ctypes.c_int(s.hidden // 8),
            self.squares[-1], ctypes.c_float(s.eps), row,
        )  # fmt: skip

    def launch_layers(self, indices: Iterable[int]) -> None:
        """A step from the token to its logits through some of the layers; nothing goes on."""
        fused, s = self.fused, self.fused.decoder.sizes
        rows, forms = len(self.token), self.chosen.products
        table = fused.decoder.inner.embed_tokens.weight
        embed = cuda.kernel("small.cu", "embed")
        embed(
            (rows,), 256, self.token, table, fused.layers[0].first_norm, self.x, self.scaled,
            self.squares, self.top, ctypes.c_int(s.hidden // 8), ctypes.c_int(len(self.squares)),
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
        head = fused.screen.product if self.chosen.screened else fused.head
        top = Top(self.top, s.vocabulary) if self.chosen.screened else None
        head(forms[id(head)], self.scaled, self.logits, squares=last, eps=s.eps, top=top)

    def attention_kernel(self, form: Attention, norms: bool) -> cuda.Kernel:
        """Attention in a form."""
        sizes = self.fused.decoder.sizes
        source, name = form.source
        defines = form.defines(sizes.group, sizes.head, norms)
        return cuda.kernel(source, name, shared=form.shared(sizes.head), **defines)

    def _attend(self, index: int, layer: Layer) -> None:
        s, cache, form = self.fused.decoder.sizes, self.cache, self.chosen.attention
        kernel = self.attention_kernel(form, layer.q_norm is not None)
        grid = (form.splits, s.kv_heads * s.group // form.heads, len(self.token))
        kernel(
            grid, 32 * form.all_warps(s.head), self.qkv, cache.keys[index], cache.values[index],
            self.rope, cache.filled, cache.start, cache.turned, layer.q_norm, layer.k_norm,
            ctypes.c_float(s.eps), self.seen, ctypes.c_int(cache.length),
            ctypes.c_float(math.log2(math.e) / math.sqrt(s.head)), ctypes.c_int(form.late),
            later(layer, form.near), *([ctypes.c_uint(form.rest)] if form.warps else []),
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


def first_guess(fused: Fused, rows: int) -> Chosen:
    """Forms that run, from which a better choice is looked for."""
    card = Card.current()
    products: dict[int, Form] = {}
    for alike in fused.kinds(rows).values():
        forms = [form for form in alike[0].forms(rows, card) if not form.kept]
        wished = (form for form in forms if (form.warps, form.tiles, form.blocks) == (16, 1, 2))
        products |= dict.fromkeys(map(id, alike), next(wished, forms[-1]))
    return Chosen(products, attentions(fused, rows)[0], rows == 1)
