"""Products of a decoding step on CUDA.

`kernels/linear.cu` can be built with more or fewer warps, tiles and reads in flight; torch's dense
product (for INT4 after dequantizing) is one more form. Which is fastest is measured: `forms`.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from qatbench.engine import cuda
from qatbench.engine.weights import CHUNK, TILE, Packed
from qatbench.errors import PrerequisiteError

STORE, RESIDUAL, SWIGLU, LOGITS = range(4)
"""Epilogues."""
MOST_COLUMNS = 64
_STATIC = 47 << 10  # bytes of shared memory for the sums of a block's warps


class Weights(ctypes.Structure):
    """`Weights` of `linear.cu`."""

    _fields_ = (
        ("words", ctypes.c_void_p), ("scales", ctypes.c_void_p), ("zeros", ctypes.c_void_p),
        ("rows", ctypes.c_int), ("width", ctypes.c_int),
    )  # fmt: skip


class _Output(ctypes.Structure):
    _fields_ = (
        ("out", ctypes.c_void_p), ("squares", ctypes.c_void_p), ("eps", ctypes.c_float),
        ("width", ctypes.c_float), ("bias", ctypes.c_void_p), ("weight", ctypes.c_void_p),
        ("scaled", ctypes.c_void_p), ("next", ctypes.c_void_p),
    )  # fmt: skip


@dataclass(frozen=True)
class Form:
    """How a product is built and launched."""

    warps: int
    tiles: int  # that a block works on at once
    depth: int  # spans in flight a warp
    blocks: int  # that share a multiprocessor
    direct: bool = False  # into registers, not through shared memory


LIBRARY = Form(0, 0, 0, 0)
"""torch's dense product, with a launch of its own for what comes after."""


@dataclass(frozen=True)
class NextNorm:
    """What a residual product leaves for the norm that follows.

    weight: (rows,) bf16, of that norm; scaled: (columns, rows) bf16, x times it; squares:
    (columns,) fp64, to which the squares of x are added.
    """

    weight: Tensor
    scaled: Tensor
    squares: Tensor


@dataclass(frozen=True)
class Product:
    """A linear, or several joined: y = W x for columns x.

    weight: `Packed`, or (rows, width) bf16. `epilogue`: what becomes of y, see `common.cuh`.
    """

    weight: Packed | Tensor
    epilogue: int = STORE
    bias: Tensor | None = None

    @property
    def rows(self) -> int:
        """Outputs, gate and up counted both."""
        return self.weight.rows if isinstance(self.weight, Packed) else self.weight.shape[0]

    @property
    def width(self) -> int:
        """Inputs."""
        return self.weight.width if isinstance(self.weight, Packed) else self.weight.shape[1]

    @property
    def outputs(self) -> int:
        """Numbers that come out for a column."""
        return self.rows // 2 if self.epilogue == SWIGLU else self.rows

    def bytes(self) -> int:
        """Of the weight."""
        w = self.weight
        return w.bytes() if isinstance(w, Packed) else w.numel() * w.element_size()

    def kind(self, columns: int) -> str:
        """What decides which form is fastest."""
        w = self.weight
        grid = f"{self.rows}x{self.width}"
        if isinstance(w, Packed):
            grid = f"int4 g{w.group}{'' if w.zeros is None else ' zeros'} {grid}"
        return f"{grid} epilogue {self.epilogue} columns {_shared_by(columns)}"

    def forms(self, columns: int) -> list[Form]:
        """All that can run."""
        found = [LIBRARY] if columns > 1 or not isinstance(self.weight, Packed) else []
        if columns > MOST_COLUMNS:
            return found
        sizes = itertools.product(((8, 2), (8, 3), (16, 1), (16, 2)), (1, 2), (2, 4), (False, True))
        forms = [Form(warps, tiles, depth, blocks, direct)
                 for (warps, blocks), tiles, depth, direct in sizes]  # fmt: skip
        return [*found, *(form for form in forms if self._fits(form, columns))]

    def _fits(self, form: Form, columns: int) -> bool:
        packed = isinstance(self.weight, Packed)
        sums = form.tiles * _column_tiles(columns) * (8 if packed else 4)  # registers
        ring = form.depth * self.slot_bytes(form.tiles) // 128 if form.direct else 0
        threads = form.warps * 32 * form.blocks
        shared = 2 * form.warps * form.tiles * _column_tiles(columns) * 32 * 16
        shared = shared if columns > 1 else shared // 8
        most = shared_bytes() // form.blocks - 1024
        return (
            self.rows % (TILE * form.tiles) == 0
            and shared <= _STATIC
            and shared + self.shared(form) <= most
            and sums + ring + (28 if form.direct else 40) <= 65536 // threads
        )

    @property
    def span(self) -> int:
        """Inputs that a warp takes at a time."""
        return max(self.weight.group, CHUNK) if isinstance(self.weight, Packed) else CHUNK

    def slot_bytes(self, tiles: int) -> int:
        """Bytes of a span on its way, `Slot` of `linear.cu`."""
        w = self.weight
        if not isinstance(w, Packed):
            return tiles * 4 * 512
        scales = (1 if w.zeros is None else 2) * self.span // w.group * 32
        return tiles * (self.span // CHUNK * 512 + scales)

    def build(self, form: Form, columns: int) -> cuda.Kernel:
        """A form, ready to be launched."""
        shared = self.shared(form)
        return cuda.kernel("linear.cu", "linear", shared=shared, **self.built(form, columns))

    def shared(self, form: Form) -> int:
        """Bytes of dynamic shared memory: spans on their way, sums of x by groups."""
        groups = self.width // self.weight.group * 32 if isinstance(self.weight, Packed) else 0
        spans = 0 if form.direct else form.warps * form.depth
        return spans * self.slot_bytes(form.tiles) + groups

    def built(self, form: Form, columns: int) -> dict[str, int]:
        """What `linear.cu` is compiled with."""
        return self.defines(columns) | {
            "MT": form.tiles, "WARPS": form.warps, "DEPTH": form.depth, "BLOCKS": form.blocks,
            "EPILOGUE": self.epilogue, "DIRECT": int(form.direct),
        }  # fmt: skip

    def defines(self, columns: int) -> dict[str, int]:
        """What `linear.cu` has to know of the weight and the batch."""
        w = self.weight
        group, zeros = (w.group, w.zeros) if isinstance(w, Packed) else (0, None)
        return {
            "BITS": 4 if group else 16, "GROUP": group, "ZEROS": int(zeros is not None),
            "NT": _column_tiles(columns), "SINGLE": int(columns == 1),
        }  # fmt: skip

    def __call__(
        self, form: Form, x: Tensor, out: Tensor, *, squares: Tensor | None = None,
        eps: float = 0.0, after: NextNorm | None = None,
    ) -> None:  # fmt: skip
        """Launch on the current stream.

        Args:
            form: from `forms`.
            x: (columns, width) bf16; with `squares` times the weight of its norm.
            out: (columns, outputs) bf16, fp32 for LOGITS; RESIDUAL adds to it.
            squares: (columns,) fp64: of the input before that; its norm is still to be applied.
            eps: of that norm.
            after: RESIDUAL only.
        """
        output = _Output(
            out.data_ptr(), address(squares), eps, self.width, address(self.bias),
            *((address(t) for t in (after.weight, after.scaled, after.squares)) if after else ()),
        )  # fmt: skip
        if form == LIBRARY:
            self._by_library(x, output)
            return
        function = self.build(form, x.shape[0])
        blocks = min(form.blocks * multiprocessors(), self.rows // (TILE * form.tiles))
        columns = ctypes.c_int(x.shape[0])
        function((blocks,), form.warps * 32, self.c_weights(), x, output, columns)

    def _by_library(self, x: Tensor, output: _Output) -> None:
        w = self.weight
        if isinstance(w, Packed):
            room = torch.empty(w.rows, w.width, dtype=torch.bfloat16, device=x.device)
            w = dequantize(w, room)
        y = F.linear(x, w)
        function = cuda.kernel("small.cu", "after", EPILOGUE=self.epilogue)
        grid = (-(-self.rows // (32 * TILE)), x.shape[0])
        function(grid, 256, y, output, ctypes.c_int(self.rows))

    def c_weights(self) -> Weights:
        """For the kernels."""
        w = self.weight
        if not isinstance(w, Packed):
            return Weights(w.data_ptr(), None, None, *w.shape)
        return Weights(address(w.words), address(w.scales), address(w.zeros), w.rows, w.width)


def address(tensor: Tensor | None) -> int | None:
    """Of its first number, None for none."""
    return None if tensor is None else tensor.data_ptr()


def _column_tiles(columns: int) -> int:
    """Eights of columns a kernel is built for: 1, 2, 4 or 8."""
    for tiles in (1, 2, 4, 8):
        if columns <= 8 * tiles:
            return tiles
    raise PrerequisiteError(
        f"{columns} rows in a batch: the engine's kernels take {MOST_COLUMNS}",
        hint=f"--batch-size {MOST_COLUMNS}",
    )


def _shared_by(columns: int) -> str:
    """Columns that share a form."""
    if columns == 1 or columns > MOST_COLUMNS:
        return "1" if columns == 1 else "many"
    return str(8 * _column_tiles(columns))


@functools.cache
def shared_bytes() -> int:
    """Shared memory of a multiprocessor of the current device."""
    device = torch.cuda.get_device_properties(torch.cuda.current_device())
    return int(device.shared_memory_per_multiprocessor)


@functools.cache
def multiprocessors() -> int:
    """Of the current device."""
    return torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count


def dequantize(packed: Packed, out: Tensor) -> Tensor:
    """Launch: packed words -> out (rows, width) bf16, outputs in their own order."""
    zeros = int(packed.zeros is not None)
    function = cuda.kernel("small.cu", "dequantize", GROUP=packed.group, ZEROS=zeros)
    function(
        (packed.rows // TILE,), 256, packed.words, packed.scales, packed.zeros, out,
        ctypes.c_int(packed.rows), ctypes.c_int(packed.width), ctypes.c_int(packed.paired),
    )  # fmt: skip
    return out
