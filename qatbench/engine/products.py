"""Products of a decoding step on CUDA, each in several forms.

`kernels/linear.cu` can be built with more or fewer warps, tiles and reads on their way, and so can
`kernels/kept.cu`, whose warps keep their part of the input in registers; torch's dense product (for
INT4 after dequantizing) is one more form. Which is the fastest depends on the shape, the number of
columns, the card and the kernels around it: `forms` measures.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from qatbench.engine import cuda
from qatbench.engine.arguments import NextNorm, Output, Top, Weights, address
from qatbench.engine.form import AT_ONCE, LIBRARY, WITH_INPUT, Card, Form
from qatbench.engine.weights import CHUNK, TILE, Packed
from qatbench.errors import PrerequisiteError

STORE, RESIDUAL, SWIGLU, LOGITS, SCREEN = range(5)
"""Epilogues."""
MOST_COLUMNS = 64
_SUMS = 18 << 10  # bytes of sums that a block is meant to hold at once
_KEPT = 80  # registers that a lane keeps inputs in at most
_UNEVEN = 1.15  # of the mean, what a warp may have more to do than others
_SCALES = 128  # bytes of a tile and group on their way
_MORE = 4 << 10  # bytes that a block takes beyond half of a multiprocessor's, or less
_RESERVED = 2 << 10  # bytes of shared memory a block that are the system's, or the kernel's own


@dataclass(frozen=True)
class Product:
    """A linear, or several joined: y = W x for columns x.

    weight: `Packed`, or (rows, width) bf16. epilogue: what becomes of y, see `common.cuh`. alone: a
    multiprocessor shall never take two blocks of it. Blocks of 2 kernels that follow one another
    share it; where a kernel has a block on each, the next one's are spread alike, but where one has
    not, the next could crowd, unless its blocks take more than half. So of two that follow one
    another one is alone: the one behind kernels that may leave multiprocessors out.
    """

    weight: Packed | Tensor
    epilogue: int = STORE
    bias: Tensor | None = None
    alone: bool = True

    @property
    def rows(self) -> int:
        """Outputs, gate and up counted both."""
        return self.weight.rows if isinstance(self.weight, Packed) else self.weight.shape[0]

    @property
    def width(self) -> int:
        """Inputs."""
        return self.weight.width if isinstance(self.weight, Packed) else self.weight.shape[1]

    @property
    def bits(self) -> int:
        """Of a weight."""
        return self.weight.bits if isinstance(self.weight, Packed) else 16

    @property
    def outputs(self) -> int:
        """Numbers that come out for a column."""
        return self.rows // 2 if self.epilogue == SWIGLU else self.rows

    @property
    def leads(self) -> int:
        """The earliest start that it may give the next kernel.

        A residual reads what it adds to as soon as it starts. Who writes that has to have ended by
        then: so gate and up, which come between, give no start before their input is there.
        """
        return WITH_INPUT if self.epilogue == SWIGLU else AT_ONCE

    def bytes(self) -> int:
        """Of the weight."""
        w = self.weight
        return w.bytes() if isinstance(w, Packed) else w.numel() * w.element_size()

    def kind(self, columns: int) -> str:
        """What decides which form is fastest."""
        w = self.weight
        grid = f"{self.rows}x{self.width}"
        if isinstance(w, Packed):
            grid = f"int{w.bits} g{w.group}{'' if w.zeros is None else ' zeros'} {grid}"
        return f"{grid} epilogue {self.epilogue} columns {shared_by(columns)}"

    def forms(self, columns: int, card: Card) -> list[Form]:
        """All that can run."""
        if isinstance(self.weight, Packed) and self.weight.bits == 8 and columns > 1:
            return []
        found = [LIBRARY] if columns > 1 or not isinstance(self.weight, Packed) else []
        if columns > MOST_COLUMNS:
            return found
        packed, spans = isinstance(self.weight, Packed), self._spans()
        most_tiles = 4 if packed and 1 < columns <= 8 else 2
        for warps, tiles, blocks, span in itertools.product((8, 12, 16), (1, 2, 4), (1, 2), spans):
            if self.rows % (TILE * tiles) or tiles > most_tiles or warps * 32 * blocks > 1024:
                continue
            form = Form(warps, tiles, 0, blocks, span)
            # Where kernels share a multiprocessor, to ask for less early can be better.
            half = packed and blocks == 2 and span == spans[0]
            found += self._deep(form, columns, card, half)
        return found + self._keeping(columns, card)

    def _deep(self, form: Form, columns: int, card: Card, half: bool) -> list[Form]:
        """A form with as many spans on their way as there is room for, and with half of them."""
        free = self._most(form, card) - self._taken(form, columns, card)
        most = min(free // self._spans_bytes(form), 16)
        depths = (most, most // 2) if half else (most,)
        return [replace(form, depth=depth) for depth in depths if depth > 1]

    def _keeping(self, columns: int, card: Card) -> list[Form]:
        """Forms whose warps keep their share of the input in registers."""
        found = []
        for span, warps, tiles, blocks, splits in itertools.product(
            self._spans(), range(6, 17), (1, 2), (1, 2), (1, 2) if card.clusters else (1,)
        ):
            spans, sharers = self.width // span, warps * splits
            kept = -(-spans // sharers)
            form = Form(warps, tiles, 0, blocks, span, kept=kept, splits=splits)
            if spans % sharers and (warps % 4 or kept * sharers > _UNEVEN * spans):
                continue
            if self.rows % (TILE * tiles) or warps * 32 * blocks > 1024:
                continue
            one_round = self._round(form, columns, card) == self._each(form, card)
            if self._registers(form, columns) <= _KEPT and (splits == 1 or one_round):
                found += self._deep(form, columns, card, blocks == 2)
        return found

    def _registers(self, form: Form, columns: int) -> int:
        """That hold a lane's share of the input, and what groups of it need."""
        w, inputs, eights = self.weight, form.kept * form.span, _column_tiles(columns)
        if not isinstance(w, Packed):
            return inputs // 8 * eights
        zeros, groups = w.zeros is not None, inputs // w.group
        if columns == 1:
            return inputs // 16 + groups * (5 + zeros)
        return (inputs // 8 + groups * (2 + 2 * zeros)) * eights

    def _spans(self) -> list[int]:
        w = self.weight
        if not isinstance(w, Packed):
            return [] if self.width % CHUNK else [CHUNK]  # torch's takes any width
        least = max(w.group, CHUNK)
        return [span for span in (least, 2 * least) if self.width % span == 0]

    def _most(self, form: Form, card: Card) -> int:
        """Bytes of dynamic shared memory that a block may take."""
        if form.blocks == 1:
            return card.shared - _RESERVED
        half = card.shared // 2
        return half + (_MORE if self.alone else -_MORE) - _RESERVED

    def shared(self, form: Form, columns: int, card: Card) -> int:
        """Bytes of dynamic shared memory of a block, with what keeps a second one out."""
        taken = self._taken(form, columns, card)
        return self._most(form, card) if self.alone or form.blocks == 1 else taken

    def _taken(self, form: Form, columns: int, card: Card) -> int:
        """Bytes of dynamic shared memory of a block: spans on their way, sums, inputs."""
        units, ring = self._round(form, columns, card), form.depth * self._spans_bytes(form)
        pairs = units + form.warps
        if form.kept:
            rounds = 1 if units == self._each(form, card) else 2
            pairs = rounds * -(-units // form.splits) * form.splits * form.warps
        sums = pairs * _sums(form, columns, self.bits) + (0 if form.kept else -(-units // 4) * 16)
        staged = columns == 1 and (not form.kept or isinstance(self.weight, Packed))
        return ring + sums + (self._bytes_of_x() if staged else 0)

    def _bytes_of_x(self) -> int:
        """Of one column in shared memory: bf16, or three digits and a group's two numbers."""
        w = self.weight
        groups = self.width // w.group if isinstance(w, Packed) else 0
        return (3 if groups else 2) * self.width + 8 * groups

    def _spans_bytes(self, form: Form) -> int:
        """Bytes of a span of every warp of a block, in shared memory."""
        w, slot = self.weight, 4 * 512
        if isinstance(w, Packed):
            scales = (1 if w.zeros is None else 2) * form.span // w.group * _SCALES
            slot = form.span // CHUNK * 128 * w.bits + scales
        return form.warps * form.tiles * slot

    def _units(self, form: Form) -> int:
        return self.rows // (TILE * form.tiles)

    def _clusters(self, form: Form, card: Card) -> int:
        return min(card.multiprocessors // form.splits, self._units(form))

    def _each(self, form: Form, card: Card) -> int:
        """Units that a block has at most, or a cluster."""
        return -(-self._units(form) // self._clusters(form, card))

    def _round(self, form: Form, columns: int, card: Card) -> int:
        """Units that a block has sums for at once: all of its own, or equal parts of them."""
        units, sums = self._each(form, card), _sums(form, columns, self.bits)
        most = _SUMS // sums - form.warps
        if form.kept:  # each warp leaves sums of each unit
            most = 2 * _SUMS // sums // form.warps
            if form.splits > 1:  # which have one round alone
                most *= 2 if form.blocks == 2 else 4
            most = most if units <= most else most // 2
        most = max(1, min(most, 32 * form.warps))  # a thread looks up who shares a unit
        return -(-units // -(-units // most))

    def build(self, form: Form, columns: int) -> cuda.Kernel:
        """A form, ready to be launched."""
        shared = self.shared(form, columns, Card.current())
        return cuda.kernel(form.source, "linear", shared=shared, **self._defines(form, columns))

    def _defines(self, form: Form, columns: int) -> dict[str, int]:
        w = self.weight
        group, zeros = (w.group, w.zeros) if isinstance(w, Packed) else (0, None)
        return {
            "BITS": self.bits, "GROUP": group, "ZEROS": int(zeros is not None),
            "NT": _column_tiles(columns), "MT": form.tiles, "WARPS": form.warps,
            "DEPTH": form.depth, "BLOCKS": form.blocks, "SPAN": form.span,
            "SINGLE": int(columns == 1), "EPILOGUE": self.epilogue, "KEPT": form.kept,
            "UNEVEN": int(self.width // form.span % (form.warps * form.splits) > 0),
            "SPLITS": form.splits,
        }  # fmt: skip

    def __call__(
        self, form: Form, x: Tensor, out: Tensor, *, squares: Tensor | None = None,
        eps: float = 0.0, after: NextNorm | None = None, top: Top | None = None,
    ) -> None:  # fmt: skip
        """Launch on the current stream.

        Args:
            form: from `forms`.
            x: (columns, width) bf16; with `squares` times the weight of its norm.
            out: (columns, outputs) bf16, fp32 for LOGITS and SCREEN; RESIDUAL adds to it.
            squares: (columns,) fp64: of the input before that; its norm is still to be applied.
            eps: of that norm.
            after: RESIDUAL only.
            top: SCREEN only.
        """
        output = Output(
            out.data_ptr(), address(squares), eps, 1 / self.width, address(self.bias),
            *(after.addresses() if after else (None, None, None)),
            *(top.arguments() if top else ()),
        )  # fmt: skip
        if form == LIBRARY:
            self._by_library(x, output)
            return
        columns, card = len(x), Card.current()
        function = self.build(form, columns)
        clusters = self._clusters(form, card)
        function(
            (form.splits * clusters,), form.warps * 32, self._c_weights(), x, output,
            ctypes.c_int(columns), ctypes.c_int(self._units(form) // clusters),
            ctypes.c_int(self._round(form, columns, card)), ctypes.c_int(form.lead),
            ctypes.c_int(form.held_back),
        )  # fmt: skip

    def _by_library(self, x: Tensor, output: Output) -> None:
        w = self.weight
        if isinstance(w, Packed):
            w = dequantize(w, torch.empty(w.rows, w.width, dtype=torch.bfloat16, device=x.device))
        y = F.linear(x, w)
        function = cuda.kernel("small.cu", "after", EPILOGUE=self.epilogue)
        grid = (-(-self.rows // (32 * TILE)), x.shape[0])
        function(grid, 256, y, output, ctypes.c_int(self.rows))

    def _c_weights(self) -> Weights:
        w = self.weight
        if not isinstance(w, Packed):
            return Weights(w.data_ptr(), None, None, *w.shape)
        return Weights(address(w.words), address(w.scales), address(w.zeros), w.rows, w.width)


def _sums(form: Form, columns: int, bits: int) -> int:
    """Bytes of a warp's sums of a unit: of 16 outputs a tile, or 32 lanes' four a tile."""
    if columns == 1:
        return form.tiles * (128 if form.kept and bits == 4 else 64)
    return form.tiles * _column_tiles(columns) * 512


def _column_tiles(columns: int) -> int:
    """Eights of columns a kernel is built for: 1, 2, 4 or 8."""
    for tiles in (1, 2, 4, 8):
        if columns <= 8 * tiles:
            return tiles
    raise PrerequisiteError(
        f"{columns} rows in a batch: the engine's kernels take {MOST_COLUMNS}",
        hint=f"--batch-size {MOST_COLUMNS}",
    )


def shared_by(columns: int) -> str:
    """Columns that share forms: what a step of so many rows is measured as."""
    if columns == 1 or columns > MOST_COLUMNS:
        return "1" if columns == 1 else "many"
    return str(8 * _column_tiles(columns))


def dequantize(packed: Packed, out: Tensor) -> Tensor:
    """Launch: packed words -> out (rows, width) bf16, outputs in their own order."""
    assert packed.bits == 4
    zeros = int(packed.zeros is not None)
    function = cuda.kernel("small.cu", "dequantize", GROUP=packed.group, ZEROS=zeros)
    function(
        (packed.rows // TILE,), 256, packed.words, packed.scales, packed.zeros, out,
        ctypes.c_int(packed.rows), ctypes.c_int(packed.width), ctypes.c_int(packed.paired),
    )  # fmt: skip
    return out


def compile_all(wanted: Sequence[tuple[Product, Form]], columns: int) -> None:
    """Compile several forms into the cache."""
    own = [(product, form) for product, form in wanted if form != LIBRARY]
    cuda.compile_all((form.source, p._defines(form, columns)) for p, form in own)
