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
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qatbench import store
from qatbench.engine import cuda
from qatbench.engine.weights import CHUNK, TILE, Packed
from qatbench.errors import PrerequisiteError

STORE, RESIDUAL, SWIGLU, LOGITS = range(4)
MOST_COLUMNS = 64
_SHARED = 200 << 10  # bytes a block may ask for on Hopper; less on older cards: see `fits`
_PLAIN = {"GROUP": 128, "ZEROS": 0}  # for functions that do not look at them
_RSTD = 256  # bytes beside sums and columns


class _Weights(ctypes.Structure):
    _fields_ = (
        ("words", ctypes.c_void_p), ("scales", ctypes.c_void_p), ("zeros", ctypes.c_void_p),
        ("rows", ctypes.c_int), ("width", ctypes.c_int),
    )  # fmt: skip


@dataclass(frozen=True)
class Form:
    """How a product is built and launched."""

    warps: int
    tiles: int  # that a block works on at once
    depth: int  # spans in flight a warp
    stage: bool  # columns are copied into shared memory first
    blocks: int  # a multiprocessor; 0: as many as it holds
    ahead: int = 0  # tiles a block asks for before its input is there


LIBRARY = Form(0, 0, 0, False, 0)
"""torch.mm, with launches of their own for what comes before and after."""


@dataclass(frozen=True)
class Product:
    """A linear, or several joined: W x for columns x.

    weight: `Packed`, or (rows, width) bf16. `epilogue`: what becomes of y, see `linear.cu`.
    """

    weight: Packed | Tensor
    epilogue: int = STORE
    norm: Tensor | None = None  # RMS norm of x before: its weight (width,) bf16
    eps: float = 0.0
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
    def span(self) -> int:
        """Inputs that a warp takes at a time."""
        return max(self.weight.group, CHUNK) if isinstance(self.weight, Packed) else CHUNK

    def kind(self, columns: int) -> str:
        """What decides which form is fastest."""
        w = self.weight
        grid = (
            f"int4g{w.group}{'' if w.zeros is None else 'z'}" if isinstance(w, Packed) else "bf16"
        )
        normed = "" if self.norm is None else " normed"
        return f"{grid} {self.rows}x{self.width}{normed} {self.epilogue} x{_tiles_of(columns)}"

    def forms(self, columns: int) -> list[Form]:
        """All that can run."""
        found = [LIBRARY] if columns > 1 or not isinstance(self.weight, Packed) else []
        if columns > MOST_COLUMNS:
            return found
        for warps, tiles, depth in itertools.product((4, 8, 12, 16), (1, 2), (2, 3, 4)):
            for stage in (True, False) if columns > 1 else (True,):
                if self._fits(form := Form(warps, tiles, depth, stage, 0), columns):
                    pairs = itertools.product((0, 1, 2), (0, 2, 4))
                    found += [replace(form, blocks=n, ahead=ahead) for n, ahead in pairs]
        return found

    def _fits(self, form: Form, columns: int) -> bool:
        ring = form.depth * form.tiles * (self.span // CHUNK) * 4  # registers
        ring *= 1 if isinstance(self.weight, Packed) else 4
        sums = form.tiles * _column_tiles(columns) * (8 if isinstance(self.weight, Packed) else 4)
        return (
            self.width // self.span >= form.warps
            and self.rows % (TILE * form.tiles) == 0
            and self.shared(form, columns) <= (_SHARED if columns > 1 else 100 << 10)
            and ring + sums <= 96
            and (ring + sums + 32) * form.warps * 32 <= 65536
        )

    def shared(self, form: Form, columns: int) -> int:
        """Bytes of shared memory a block needs."""
        sums = form.warps * form.tiles * _column_tiles(columns) * 32 * 16
        return sums + _RSTD + (columns * (self.width * 2 + 64) if form.stage else 0)

    def build(self, form: Form, columns: int) -> cuda.Kernel:
        """A form, ready to be launched."""
        defines = self._defines(form, columns)
        return cuda.kernel("linear.cu", "linear", self.shared(form, columns), **defines)

    def compile(self, form: Form, columns: int) -> None:
        """Compile a form into the cache."""
        cuda.binary("linear.cu", self._defines(form, columns), torch.cuda.get_device_capability())

    def _defines(self, form: Form, columns: int) -> dict[str, int]:
        w = self.weight
        group, zeros = (w.group, w.zeros) if isinstance(w, Packed) else (0, None)
        return dict(
            BITS=4 if group else 16, GROUP=group, ZEROS=int(zeros is not None),
            NT=_column_tiles(columns), MT=form.tiles,
            WARPS=form.warps, DEPTH=form.depth, STAGE=int(form.stage),
            NORM=int(self.norm is not None and form.stage), SINGLE=int(columns == 1),
            BIAS=int(self.bias is not None), EPILOGUE=self.epilogue,
        )  # fmt: skip

    def __call__(
        self, form: Form, x: Tensor, out: Tensor, *, residual: Tensor | None = None
    ) -> None:
        """Launch on the current stream: x (columns, width) bf16 -> out.

        A form that does not stage its columns leaves the norm to a launch of its own.
        """
        columns = x.shape[0]
        norm = self.norm
        if norm is not None and not form.stage:
            x, norm = rmsnorm(x, norm, self.eps, torch.empty_like(x)), None
        if form == LIBRARY:
            self._by_library(x, out, residual)
            return
        shared = self.shared(form, columns)
        function = self.build(form, columns)
        function(
            (self.grid(form, function, shared),), form.warps * 32, self._c_weights(), x, norm,
            ctypes.c_float(self.eps), self.bias, residual, out, ctypes.c_int(columns),
            ctypes.c_int(form.ahead), shared=shared,
        )  # fmt: skip

    def _by_library(self, x: Tensor, out: Tensor, residual: Tensor | None) -> None:
        """Dense product of the normalised x, then the epilogue."""
        w = self.weight
        if isinstance(w, Packed):
            room = torch.empty(w.rows, w.width, dtype=torch.bfloat16, device=x.device)
            w = dequantize(w, room)
        y = F.linear(x, w, self.bias)
        function = cuda.kernel("small.cu", "finish", **_PLAIN)
        rows = self.rows // 2 if self.epilogue == SWIGLU else self.rows
        function(
            (-(-rows // 256), x.shape[0]), 256, y, residual, out, ctypes.c_int(self.rows),
            ctypes.c_int(self.epilogue),
        )  # fmt: skip

    def grid(self, form: Form, function: cuda.Kernel, shared: int) -> int:
        """Blocks that stay on the device at a time, no more than there is work for."""
        held = function.blocks(form.warps * 32, shared)
        blocks = min(held, form.blocks) if form.blocks else held
        return min(blocks * multiprocessors(), self.rows // (TILE * form.tiles))

    def _c_weights(self) -> _Weights:
        w = self.weight
        if not isinstance(w, Packed):
            return _Weights(w.data_ptr(), None, None, *w.shape)
        zeros = None if w.zeros is None else w.zeros.data_ptr()
        return _Weights(w.words.data_ptr(), w.scales.data_ptr(), zeros, w.rows, w.width)


def _column_tiles(columns: int) -> int:
    """Eights of columns a kernel is built for: 1, 2, 4 or 8."""
    for tiles in (1, 2, 4, 8):
        if columns <= 8 * tiles:
            return tiles
    raise PrerequisiteError(
        f"{columns} rows in a batch: the engine's kernels take {MOST_COLUMNS}",
        hint=f"--batch-size {MOST_COLUMNS}",
    )


def _tiles_of(columns: int) -> str:
    """Columns that share a form."""
    if columns == 1 or columns > MOST_COLUMNS:
        return "1" if columns == 1 else "many"
    return str(8 * _column_tiles(columns))


@functools.cache
def multiprocessors() -> int:
    """Of the current device."""
    return torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count


def rmsnorm(x: Tensor, weight: Tensor, eps: float, out: Tensor) -> Tensor:
    """Launch: out = x / rms(x) * weight, by rows; bf16."""
    function = cuda.kernel("small.cu", "rmsnorm", **_PLAIN)
    function((x.shape[0],), 256, x, weight, ctypes.c_float(eps), out, ctypes.c_int(x.shape[1] // 8))
    return out


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
        self.file = store.cache_folder() / "kernels" / f"forms-{name}.json"
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
            self.file.parent.mkdir(parents=True, exist_ok=True)
            store.write_json(self.file, self.table)
        return Form(**self.table[kind])


def measured(products: Sequence[Product], columns: int, repeats: int = 3) -> dict[Form, float]:
    """Seconds a product of each form, as a graph of all products in turn."""
    first = products[0]
    device = torch.device("cuda", torch.cuda.current_device())
    x = torch.randn(columns, first.width, device=device).bfloat16()
    rows = first.rows // (2 if first.epilogue == SWIGLU else 1)
    dtype = torch.float32 if first.epilogue == LOGITS else torch.bfloat16
    out = torch.zeros(columns, rows, device=device, dtype=dtype)
    times: dict[Form, float] = {}
    forms = first.forms(columns)
    with ThreadPoolExecutor() as pool:  # compiling lets other threads run
        list(
            pool.map(
                lambda form: first.compile(form, columns),
                {replace(f, blocks=0, ahead=0) for f in forms} - {LIBRARY},
            )
        )
    for form in forms:

        def run(form: Form = form) -> None:
            for product in products:
                product(form, x, out, residual=out)

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
