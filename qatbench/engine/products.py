"""Products of a decoding step on CUDA, each in the form that was measured to be fastest.

`kernels/linear.cu` can be built with more or fewer warps, tiles and reads in flight; torch's dense
product (for INT4 after dequantizing) is one more form. Which is best depends on the shape, the
number of columns and the card, so it is measured on the model's own weights at first use and kept
in the cache folder by device name.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qatbench import store
from qatbench.engine import cuda
from qatbench.engine.weights import CHUNK, TILE, Packed
from qatbench.errors import PrerequisiteError

STORE, RESIDUAL, SWIGLU, LOGITS = range(4)
"""Epilogues."""
MOST_COLUMNS = 64
_SHARED = 47 << 10  # bytes a block may use without asking


class _Weights(ctypes.Structure):
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
        for warps, tiles, depth in itertools.product((8, 12, 16), (1, 2), (2, 3, 4)):
            for blocks in (1, 2, 3, 4):
                form = Form(warps, tiles, depth, blocks)
                if self._fits(form, columns):
                    found.append(form)
        return found

    def _fits(self, form: Form, columns: int) -> bool:
        packed = isinstance(self.weight, Packed)
        span = max(self.weight.group, CHUNK) if isinstance(self.weight, Packed) else 4 * CHUNK
        ring = form.depth * form.tiles * (span // CHUNK) * 4  # registers
        sums = form.tiles * _column_tiles(columns) * (8 if packed else 4)
        threads = form.warps * 32 * form.blocks
        shared = form.warps * form.tiles * _column_tiles(columns) * 32 * 16
        return (
            self.rows % (TILE * form.tiles) == 0
            and shared <= _SHARED
            and 384 <= threads <= 1024
            and ring + sums + 24 <= 65536 // threads
        )

    def build(self, form: Form, columns: int) -> cuda.Kernel:
        """A form, ready to be launched."""
        return cuda.kernel("linear.cu", "linear", **self._defines(form, columns))

    def compile(self, form: Form, columns: int) -> None:
        """Compile a form into the cache."""
        cuda.binary("linear.cu", self._defines(form, columns), torch.cuda.get_device_capability())

    def _defines(self, form: Form, columns: int) -> dict[str, int]:
        w = self.weight
        group, zeros = (w.group, w.zeros) if isinstance(w, Packed) else (0, None)
        return {
            "BITS": 4 if group else 16, "GROUP": group, "ZEROS": int(zeros is not None),
            "NT": _column_tiles(columns), "MT": form.tiles, "WARPS": form.warps,
            "DEPTH": form.depth, "BLOCKS": form.blocks, "SINGLE": int(columns == 1),
            "EPILOGUE": self.epilogue,
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
            out.data_ptr(), _address(squares), eps, self.width, _address(self.bias),
            *((_address(t) for t in (after.weight, after.scaled, after.squares)) if after else ()),
        )  # fmt: skip
        if form == LIBRARY:
            self._by_library(x, output)
            return
        function = self.build(form, x.shape[0])
        blocks = min(form.blocks * multiprocessors(), self.rows // (TILE * form.tiles))
        columns = ctypes.c_int(x.shape[0])
        function((blocks,), form.warps * 32, self._c_weights(), x, output, columns)

    def _by_library(self, x: Tensor, output: _Output) -> None:
        w = self.weight
        if isinstance(w, Packed):
            room = torch.empty(w.rows, w.width, dtype=torch.bfloat16, device=x.device)
            w = dequantize(w, room)
        y = F.linear(x, w)
        function = cuda.kernel("small.cu", "after", EPILOGUE=self.epilogue)
        grid = (-(-self.rows // (32 * TILE)), x.shape[0])
        function(grid, 256, y, output, ctypes.c_int(self.rows))

    def _c_weights(self) -> _Weights:
        w = self.weight
        if not isinstance(w, Packed):
            return _Weights(w.data_ptr(), None, None, *w.shape)
        return _Weights(_address(w.words), _address(w.scales), _address(w.zeros), w.rows, w.width)


def _address(tensor: Tensor | None) -> int | None:
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


# --- the measured table ---------------------------------------------------------------------------


class Forms:
    """The fastest form of each kind of product on this device, measured when first asked for."""

    def __init__(self) -> None:
        name = torch.cuda.get_device_name().lower().replace(" ", "-")
        file = f"forms-{name}-{cuda.digest('linear.cu')}.json"
        self.file = store.cache_folder() / "kernels" / file
        self.table: dict[str, Any] = store.read_json(self.file) if self.file.exists() else {}

    def of(self, products: Sequence[Product], columns: int) -> Form:
        """For products of one kind, of as many layers as there are.

        What is measured is one after the other, so that no weight is read from a cache.
        """
        kind = products[0].kind(columns)
        if kind not in self.table:
            times = measured(products, columns)
            best = min(times, key=lambda form: times[form])
            known = store.read_json(self.file) if self.file.exists() else {}  # of other processes
            self.table = known | self.table | {kind: asdict(best)}
            store.write_json(self.file, self.table)
        return Form(**self.table[kind])


def measured(products: Sequence[Product], columns: int, repeats: int = 3) -> dict[Form, float]:
    """Seconds a product of each form, as a graph of all products in turn."""
    first = products[0]
    device = torch.device("cuda", torch.cuda.current_device())
    x = torch.randn(columns, first.width, device=device).bfloat16()
    dtype = torch.float32 if first.epilogue == LOGITS else torch.bfloat16
    out = torch.zeros(columns, first.outputs, device=device, dtype=dtype)
    squares = torch.ones(columns, device=device, dtype=torch.float64)
    after = None
    if first.epilogue == RESIDUAL:
        after = NextNorm(torch.ones_like(out[0]), torch.empty_like(out), torch.zeros_like(squares))
    times: dict[Form, float] = {}
    forms = first.forms(columns)
    compile_all([(first, form) for form in forms], columns)
    for form in forms:

        def run(form: Form = form) -> None:
            for product in products:
                product(form, x, out, squares=squares, eps=1e-6, after=after)

        times[form] = graph_seconds(run, repeats) / len(products)
    return times


def compile_all(wanted: Sequence[tuple[Product, Form]], columns: int) -> None:
    """Compile several forms at once into the cache: the compiler lets other threads run."""
    built = {str(sorted(p._defines(form, columns).items())): (p, form)
             for p, form in wanted if form != LIBRARY}  # fmt: skip
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda one: one[0].compile(one[1], columns), built.values()))


def graph_seconds(run: Any, repeats: int) -> float:
    """Seconds of the fastest of some replays of what a function launches."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    best = float("inf")
    for _ in range(repeats + 1):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        best = min(best, begin.elapsed_time(end) / 1e3)
    return best
