"""INT4 weights in the kernels' order: undone exactly, and multiplied right by the PTX ISA's rules.

There is no GPU here: `Warp` does what `kernels/linear.cu` does, lane by lane, with the fragments of
`mma.m16n8k16` as the PTX ISA lays them out: g = lane / 4, t = lane % 4.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from qatbench.engine import cuda
from qatbench.engine.weights import Packed, pack, unpack
from qatbench.errors import ShapeError
from qatbench.quant.packing import Affine

U32 = NDArray[np.uint32]
LANES = np.arange(32)
G, T = LANES // 4, LANES % 4
SHAPES = [(32, 64, 32), (96, 192, 64), (64, 384, 128)]  # outputs, inputs, group


def affine(out: int, width: int, group: int, zeros: bool, seed: int = 0) -> Affine:
    generator = torch.Generator().manual_seed(seed)
    groups = (out, width // group)
    fields = torch.randint(0, 16, (out, width), dtype=torch.uint8, generator=generator)
    zero = torch.randint(0, 16, groups, dtype=torch.uint8, generator=generator)
    scales = (torch.rand(groups, generator=generator) / 100 + 0.001).half()
    return Affine(fields, zero if zeros else torch.full_like(zero, 8), scales)


def dense(a: Affine) -> Tensor:
    """(out, in) fp64."""
    fields = a.fields.double().view(*a.scales.shape, -1)
    return ((fields - a.zeros.double()[..., None]) * a.scales.double()[..., None]).flatten(1)


@pytest.mark.parametrize(("out", "width", "group"), SHAPES)
@pytest.mark.parametrize("paired", [False, True], ids=["", "paired"])
@pytest.mark.parametrize("zeros", [False, True], ids=["symmetric", "zeros"])
def test_packing_is_undone_exactly(
    out: int, width: int, group: int, zeros: bool, paired: bool
) -> None:
    a = affine(out, width, group, zeros)
    packed = pack(a, paired=paired)
    assert (packed.rows, packed.width, packed.group) == (out, width, group)
    assert (packed.zeros is not None) == zeros
    for got, want in zip(unpack(packed), a, strict=True):
        assert got.dtype == want.dtype
        assert torch.equal(got, want)
    other = unpack(replace(packed, paired=not paired))
    assert not torch.equal(other.fields, a.fields)  # pairing moves rows


@pytest.mark.parametrize("zeros", [False, True], ids=["symmetric", "zeros"])
def test_bytes_are_four_bits_a_weight_with_scales_and_zeros(zeros: bool) -> None:
    packed = pack(affine(64, 384, 128, zeros))
    groups = 64 * 384 // 128
    assert packed.bytes() == 64 * 384 // 2 + groups * 2 * (2 if zeros else 1)


REFUSED = [  # outputs, inputs, group, paired, what is told
    (40, 64, 32, False, "40 x 64 in groups of 32"),  # half a tile is left
    (48, 64, 32, True, "48 x 64 in groups of 32"),  # a tile of gate and up is not
    (32, 96, 32, False, "32 x 96"),  # a lane's read has 64 inputs
    (32, 64, 16, False, "groups of 16"),
    (32, 192, 96, False, "groups of 96"),  # groups and reads do not meet
]


@pytest.mark.parametrize(("out", "width", "group", "paired", "told"), REFUSED)
def test_other_shapes_are_refused(
    out: int, width: int, group: int, paired: bool, told: str
) -> None:
    with pytest.raises(ShapeError, match=told) as error:
        pack(affine(out, width, group, zeros=False), paired=paired)
    need = 32 if paired else 16
    assert error.value.hint == f"outputs: a multiple of {need}; inputs: of 64; groups: of 32"


# --- the kernel, lane by lane ---------------------------------------------------------------------


def bf16(words: U32) -> tuple[NDArray[Any], NDArray[Any]]:
    """The two numbers of each word, low half first, as fp64."""
    low, high = (words << np.uint32(16)), (words & np.uint32(0xFFFF0000))
    return low.view(np.float32).astype(np.float64), high.view(np.float32).astype(np.float64)


def lop3(a: U32, b: int, c: int, table: int) -> U32:
    """PTX ISA, `lop3`: bit (a, b, c) of the result is that bit of the table."""
    found = np.zeros_like(a)
    masks = (np.uint32(b), np.uint32(c))
    for index in range(8):
        if table >> index & 1:
            bits = [a if index & 4 else ~a]
            bits += [m if index & s else ~m for m, s in zip(masks, (2, 1), strict=True)]
            found |= bits[0] & bits[1] & bits[2]
    return found


def raised(words: U32) -> U32:
    return lop3(words, 0x000F000F, 0x43004300, 0xEA)


def integers(words: U32, minus: U32) -> U32:
    """One fused multiply-add of both halves; what comes out has to be exact in bf16."""
    found = np.zeros((2, 32), np.uint32)
    for i, (value, less) in enumerate(zip(bf16(raised(words)), bf16(minus), strict=True)):
        bits = (value + less).astype(np.float32).view(np.uint32)
        assert not (bits & np.uint32(0xFFFF)).any()
        found[i] = bits >> np.uint32(16)
    return np.asarray(found[0] | found[1] << np.uint32(16))


def mma(c: NDArray[Any], a: list[U32], b: list[U32]) -> None:
    """c (32, 4) += A B in fp64; registers of all 32 lanes, fragments by the PTX ISA."""
    left, right = np.full((16, 16), np.nan), np.full((16, 8), np.nan)
    for i, words in enumerate(a):
        row, k = G + 8 * (i % 2), 2 * T + 8 * (i // 2)
        left[row, k], left[row, k + 1] = bf16(words)
    for i, words in enumerate(b):
        right[2 * T + 8 * i, G], right[2 * T + 8 * i + 1, G] = bf16(words)
    product = left @ right
    for i in range(4):
        c[:, i] += product[G + 8 * (i // 2), 2 * T + i % 2]


@dataclass
class Warp:
    """What one warp of `linear.cu` adds up over all spans of a tile, for up to eight columns."""

    packed: Packed
    x: Tensor  # (columns, width) bf16
    shifts: tuple[int, ...] = (0, 4, 8, 12)

    def __post_init__(self) -> None:
        p = self.packed
        self.words = p.words.numpy().view(np.uint32).reshape(-1, 4)  # uint4
        self.scales = p.scales.numpy().view(np.uint32).reshape(-1)
        self.zeros = None if p.zeros is None else p.zeros.numpy().view(np.uint32).reshape(-1)
        self.inputs = self.x.view(torch.int16).numpy().view(np.uint32).reshape(len(self.x), -1, 4)
        self.span = max(64, p.group)

    def minus(self, at: U32) -> tuple[U32, U32]:
        """-(128 + zero) of rows g and of rows g + 8, twice a word."""
        if self.zeros is None:
            eight = np.full(32, 0xC308C308, np.uint32)
            return eight, eight
        pair, sign = self.zeros[at], np.uint32(0x80008000)
        low, high = pair & np.uint32(0xFFFF), pair >> np.uint32(16)  # __byte_perm 0x1010, 0x3232
        twice = np.uint32(0x00010001)
        return low * twice | sign, high * twice | sign

    def tile(self, tile: int, raise_alone: bool) -> NDArray[Any]:
        """Sums (32, 4). `raise_alone`: the zero points go by a product of their own (NT == 1)."""
        group, acc = self.packed.group, np.zeros((32, 4))
        column = np.minimum(G, len(self.x) - 1)
        chunks, groups = self.packed.width // 64, self.packed.width // group
        for span in range(self.packed.width // self.span):
            for part in range(self.span // group):
                sums = np.zeros((32, 4))
                at = (tile * groups + span * (self.span // group) + part) * 8 + G
                upper, lower = self.minus(at)
                for k in range(group // 32):
                    i = part * (group // 32) + k
                    b = self.inputs[column, span * (self.span // 8) + T + i * 4]
                    place = (tile * chunks + span * (self.span // 64) + i // 2) * 32 + LANES
                    for j in range(2):
                        w = self.words[place, 2 * (i % 2) + j]
                        moved = [w >> np.uint32(shift) for shift in self.shifts]
                        less, two = [upper, lower] * 2, [b[:, 2 * j], b[:, 2 * j + 1]]
                        if raise_alone:
                            mma(sums, [raised(m) for m in moved], two)
                            mma(sums, less, two)
                        else:
                            both = zip(moved, less, strict=True)
                            mma(sums, [integers(m, z) for m, z in both], two)
                pair = self.scales[at]
                for c in range(4):
                    half = (pair >> np.uint32(16 * (c // 2)) & np.uint32(0xFFFF)).astype(np.uint16)
                    acc[:, c] += half.view(np.float16).astype(np.float64) * sums[:, c]
        return acc

    def product(self, raise_alone: bool) -> NDArray[Any]:
        """W x, (columns, rows), each number taken from the lane that `finish` takes it from."""
        columns, rows = len(self.x), self.packed.rows
        found = np.full((columns, rows), np.nan)
        for tile in range(rows // 16):
            acc = self.tile(tile, raise_alone)
            for g in range(8):
                row = tile * 16 + g
                upper, lower = row, row + 8
                if self.packed.paired:  # SWIGLU: gate, up
                    upper = tile * 8 + g
                    lower = rows // 2 + upper
                for n in range(columns):
                    lane = acc[g * 4 + n // 2]
                    found[n, upper], found[n, lower] = lane[n % 2], lane[n % 2 + 2]
        return found


def columns_of(count: int, width: int) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(1)).bfloat16()


def wrong(got: NDArray[Any], want: Tensor) -> float:
    """The largest error, relative to the largest number."""
    assert got.shape == want.shape
    return float(np.abs(got - want.numpy()).max() / want.abs().max())


@pytest.mark.parametrize(("out", "width", "group"), SHAPES)
@pytest.mark.parametrize("zeros", [False, True], ids=["symmetric", "zeros"])
@pytest.mark.parametrize("paired", [False, True], ids=["", "swiglu"])
@pytest.mark.parametrize("columns", [1, 3, 8])
def test_the_layout_is_that_of_the_tensor_cores(
    out: int, width: int, group: int, zeros: bool, paired: bool, columns: int
) -> None:
    a, x = affine(out, width, group, zeros), columns_of(columns, width)
    warp = Warp(pack(a, paired=paired), x)
    want = x.double() @ dense(a).T
    for raise_alone in (True, False):
        assert wrong(warp.product(raise_alone), want) < 1e-12  # fp64 throughout


def test_a_wrong_shift_a_wrong_pairing_and_a_wrong_zero_show() -> None:
    a, x = affine(32, 128, 64, zeros=True), columns_of(2, 128)
    want, packed = x.double() @ dense(a).T, pack(a)
    swapped = Warp(packed, x, shifts=(0, 8, 4, 12))
    assert wrong(swapped.product(raise_alone=True), want) > 0.1
    assert wrong(Warp(replace(packed, paired=True), x).product(raise_alone=True), want) > 0.1
    assert wrong(Warp(replace(packed, zeros=None), x).product(raise_alone=True), want) > 0.1


AS_EMULATED = {  # what `Warp` does, as the sources have it: whoever changes one changes both
    "common.cuh": [
        "lop3.b32 %0, %1, 0x000F000F, 0x43004300, 0xEA;",
        '"fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(r), "r"(0x3F803F80u), "r"(minus)',
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32",
    ],
    "linear.cu": [
        "W.words + ((size_t)tile * (W.K / 64) + span * LOADS) * 32 + lane",
        "((size_t)tile * (W.K / GROUP) + span * GROUPS_A_SPAN) * 8 + g",
        "x + (size_t)column * (K / 8) + span * (SPAN / 8) + t",
        "b[n] = mine[n][i * 4]",
        "__byte_perm(pair, 0, 0x1010) | 0x80008000u",
        "__byte_perm(pair, 0, 0x3232) | 0x80008000u",
        "{i % 2 ? four.z : four.x, i % 2 ? four.w : four.y}",
        "{raised(w), raised(w >> 4), raised(w >> 8), raised(w >> 12)}",
        "integers(w, upper), integers(w >> 4, lower), integers(w >> 8, upper), "
        "integers(w >> 12, lower)",
        "mma(less[c][m][n], upper, lower, upper, lower, b0, b1)",
        "b0 = j ? b[n].z : b[n].x, b1 = j ? b[n].w : b[n].y",
        "(const float*)&sums[0][m][n / 8][g * 4 + n % 8 / 2] + n % 2",
    ],
}


@pytest.mark.parametrize("source", list(AS_EMULATED))
def test_the_sources_are_as_they_are_emulated(source: str) -> None:
    text = " ".join((cuda.SOURCES / source).read_text(encoding="utf-8").split())
    for line in AS_EMULATED[source]:
        assert line in text, line
