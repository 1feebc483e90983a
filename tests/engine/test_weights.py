"""INT4 weights in the kernels' order: undone exactly, and multiplied right by the PTX ISA's rules.

There is no GPU here: `Warp` does what `kernels/linear.cu` does, lane by lane, with the fragments of
`mma.m16n8k16` as the PTX ISA lays them out: g = lane / 4, t = lane % 4.
"""

from __future__ import annotations

import itertools
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
F64 = NDArray[np.float64]
LANES = np.arange(32)
G, T = LANES // 4, LANES % 4
Shape = tuple[int, int, int]
SHAPES = [(32, 64, 32), (96, 192, 64), (64, 384, 128), (32, 512, 256)]  # outputs, inputs, group
LARGE = {256: (128, 2), 192: (64, 3), 512: (128, 4), 320: (64, 5)}  # of which, and how many alike


def affine(out: int, width: int, group: int, zeros: bool) -> Affine:
    generator = torch.Generator().manual_seed(0)
    groups = (out, width // group)
    fields = torch.randint(0, 16, (out, width), dtype=torch.uint8, generator=generator)
    zero = torch.randint(0, 16, groups, dtype=torch.uint8, generator=generator)
    scales = (torch.rand(groups, generator=generator) / 100 + 0.001).half()
    return Affine(fields, zero if zeros else torch.full_like(zero, 8), scales)


def dense(a: Affine) -> Tensor:
    """(out, in) fp64."""
    fields = a.fields.double().view(*a.scales.shape, -1)
    return ((fields - a.zeros.double()[..., None]) * a.scales.double()[..., None]).flatten(1)


@pytest.mark.parametrize("shape", [*SHAPES, *((32, 2 * group, group) for group in LARGE)])
@pytest.mark.parametrize("paired", [False, True], ids=["", "paired"])
@pytest.mark.parametrize("zeros", [False, True], ids=["symmetric", "zeros"])
def test_packing_is_undone_exactly(shape: Shape, zeros: bool, paired: bool) -> None:
    packed = pack(a := affine(*shape, zeros), paired=paired)
    assert (packed.rows, packed.width, packed.group * packed.alike) == shape
    assert (packed.zeros is not None) == zeros
    for got, want in zip(unpack(packed), a, strict=True):
        assert got.dtype == want.dtype
        assert torch.equal(got, want)
    assert not torch.equal(unpack(replace(packed, paired=not paired)).fields, a.fields)


@pytest.mark.parametrize("group", list(LARGE))
@pytest.mark.parametrize("zeros", [False, True], ids=["symmetric", "zeros"])
def test_a_large_group_is_several_that_are_alike(group: int, zeros: bool) -> None:
    size, alike = LARGE[group]
    packed = pack(a := affine(32, 2 * group, group, zeros))
    assert (packed.group, packed.alike, packed.scales.shape) == (size, alike, (2, 2 * alike, 8))
    small = pack(Affine(a.fields, *(part.repeat_interleave(alike, 1) for part in a[1:])))
    assert (small.group, small.alike) == (size, 1)
    for part in ("words", "scales", "zeros"):
        got, want = getattr(packed, part), getattr(small, part)
        assert got is want is None or torch.equal(got, want)


@pytest.mark.parametrize(("group", "held"), [(128, 128), (256, 128), (192, 64)])
@pytest.mark.parametrize("zeros", [False, True], ids=["symmetric", "zeros"])
def test_bytes_are_of_four_bits_scales_and_zeros(group: int, held: int, zeros: bool) -> None:
    packed = pack(affine(64, 768, group, zeros))
    assert packed.bytes() == 64 * 768 // 2 + 64 * 768 // held * 2 * (2 if zeros else 1)


REFUSED = [  # outputs, inputs, group, paired, what is told
    (40, 64, 32, False, "40 x 64 in groups of 32"),  # half a tile is left
    (48, 64, 32, True, "48 x 64 in groups of 32"),  # a tile of gate and up is not
    (32, 96, 32, False, "32 x 96"),  # a lane's read has 64 inputs
    (32, 64, 16, False, "groups of 16"),
    (32, 192, 96, False, "groups of 96"),  # groups and reads do not meet
]


@pytest.mark.parametrize(("out", "width", "group", "paired", "told"), REFUSED)
def test_others_are_refused(out: int, width: int, group: int, paired: bool, told: str) -> None:
    with pytest.raises(ShapeError, match=told) as error:
        pack(affine(out, width, group, zeros=False), paired=paired)
    outputs = f"outputs: a multiple of {32 if paired else 16}"
    assert error.value.hint == f"{outputs}; inputs: of 64; groups: of 32"


# --- the kernel, lane by lane ---------------------------------------------------------------------


def fp16(words: U32) -> F64:
    """The two numbers of each word, low half first: (2, words)."""
    return np.ascontiguousarray(words).view(np.float16).reshape(-1, 2).T.astype(np.float64)


def bf16(words: U32) -> F64:
    pair = np.stack((words << np.uint32(16), words & np.uint32(0xFFFF0000)))
    return pair.view(np.float32).astype(np.float64)


def turned(words: U32, bits: int) -> U32:
    return words >> np.uint32(bits) | words << np.uint32(32 - bits) if bits else words


def among(words: U32, mask: int, base: int) -> U32:
    return words & np.uint32(mask) | np.uint32(base)  # lop3, 0xEA: (a & b) | c


RAISED = (0x003C003C, 0x42004200)
HALF_256, HALF_16 = (0x003C003C, 0x5C005C00), (0x03C003C0, 0x4C004C00)


def integers(words: U32, minus: U32) -> U32:
    """One fused multiply-add of both halves; what comes out has to be exact in bf16."""
    found = (bf16(among(words, *RAISED)) + bf16(minus)).astype(np.float32).view(np.uint32)
    assert not (found & np.uint32(0xFFFF)).any()
    return np.asarray(found[0] >> np.uint32(16) | found[1])


def mma(c: F64, a: list[U32], b: list[U32], read: Any = bf16) -> None:
    """c (32, 4) += A B in fp64; registers of all 32 lanes, fragments by the PTX ISA."""
    left, right = np.full((16, 16), np.nan), np.full((16, 8), np.nan)
    for i, words in enumerate(a):
        row, k = G + 8 * (i % 2), 2 * T + 8 * (i // 2)
        left[row, k], left[row, k + 1] = read(words)
    for i, words in enumerate(b):
        right[2 * T + 8 * i, G], right[2 * T + 8 * i + 1, G] = read(words)
    product = left @ right
    for i in range(4):
        c[:, i] += product[G + 8 * (i // 2), 2 * T + i % 2]


def stage(x: Tensor, group: int) -> tuple[U32, F64, F64]:
    """x (width,) bf16 -> fp16 (width / 8, 4 words), each group's sum, and what x was divided by."""
    f = x.float().numpy().reshape(-1, 8)
    most, total = np.abs(f).max(1), f.astype(np.float64).sum(1)
    lane, far = np.arange(len(f)), group // 16
    while far:
        most, total = np.maximum(most, most[lane ^ far]), total + total[lane ^ far]
        far //= 2
    exponent = np.maximum(most.view(np.uint32) >> np.uint32(23), np.uint32(15))
    times = (np.uint32(268) - exponent << np.uint32(23)).view(np.float32)
    back = (exponent - np.uint32(14) << np.uint32(23)).view(np.float32)
    assert (times.astype(np.float64) * back == 1).all()
    halves = (f * times[:, None]).astype(np.float16).view(np.uint32)
    return halves, (total * times)[:: group // 8], back[:: group // 8].astype(np.float64)


@dataclass
class Warp:
    """What `linear.cu` computes for up to eight columns, a unit by one warp."""

    packed: Packed
    x: Tensor  # (columns, width) bf16
    alone: bool = True  # RAISED: the zero points go by a product of their own; not if SINGLE
    tiles: int = 1  # MT, a unit
    wider: int = 1  # SPAN: so many times the least
    turns: tuple[int, ...] = (0, 4, 8, 12)

    def __post_init__(self) -> None:
        p = self.packed
        self.words = p.words.numpy().view(np.uint32).reshape(-1, 4)  # uint4
        self.scales = p.scales.numpy().view(np.uint32).reshape(-1)
        self.zeros = None if p.zeros is None else p.zeros.numpy().view(np.uint32).reshape(-1)
        self.inputs = self.x.view(torch.int16).numpy().view(np.uint32).reshape(len(self.x), -1, 4)
        self.span = max(64, p.group) * self.wider
        self.single = len(self.x) == 1
        self.staged, self.sums, self.back = stage(self.x[0], p.group)

    def minus(self, at: Any) -> list[U32]:
        """-(32 + zero) of rows g and of rows g + 8, twice a word."""
        if self.zeros is None:
            return [np.full(32, 0xC220C220, np.uint32)] * 2
        pair, sign, twice = self.zeros[at], np.uint32(0x80008000), np.uint32(0x00010001)
        low, high = pair & np.uint32(0xFFFF), pair >> np.uint32(16)  # __byte_perm 0x1010, 0x3232
        return [low * twice | sign, high * twice | sign]

    def step(self, sums: F64, w: U32, two: list[U32], less: list[U32]) -> None:
        """A word of every lane, of all columns: sums (32, 4)."""
        moved = [turned(w, turn) for turn in self.turns]
        if self.single:
            mma(sums, [among(v, *f) for v in moved[::2] for f in (HALF_256, HALF_16)], two, fp16)
        elif self.alone:
            mma(sums, [among(m, *RAISED) for m in moved], two)
            mma(sums, less * 2, two)
        else:
            mma(sums, [integers(m, z) for m, z in zip(moved, less * 2, strict=True)], two)

    def corrected(self, sums: F64, at: Any, group: int) -> F64:
        """Of one column: without what constants and zero points added, as x was."""
        less = np.full((2, 32), 40.0) if self.zeros is None else bf16(self.zeros[at])
        less = np.repeat(less.T + np.array([224, -16]), 2, 1)  # 256 + zero, 16 + zero
        return np.asarray((sums - less * self.sums[group]) * self.back[group])

    def unit(self, unit: int) -> F64:
        """Sums (tiles, 32, 4)."""
        p, acc, column = self.packed, np.zeros((self.tiles, 32, 4)), np.minimum(G, len(self.x) - 1)
        spans, loads, groups = p.width // self.span, self.span // 64, self.span // p.group
        for span, m, group in itertools.product(range(spans), range(self.tiles), range(groups)):
            from_here = (unit * self.tiles + m) * spans + span
            scale = (from_here * groups + group) * 8 + G
            sums, less = np.zeros((32, 4)), self.minus(scale)
            for i in range(group * p.group // 32, (group + 1) * p.group // 32):
                at = span * (self.span // 8) + T + i * 4
                b = self.staged[at] if self.single else self.inputs[column, at]
                four = self.words[(from_here * loads + i // 2) * 32 + LANES]
                for j in range(2):
                    self.step(sums, four[:, 2 * (i % 2) + j], [b[:, 2 * j], b[:, 2 * j + 1]], less)
            if self.single:
                sums = self.corrected(sums, scale, span * groups + group)
            acc[m] += np.repeat(fp16(self.scales[scale]).T, 2, 1) * sums
        return acc

    def product(self) -> F64:
        """W x, (columns, rows), each number taken from the lane that `finish` takes it from."""
        columns, rows = len(self.x), self.packed.rows
        found = np.full((columns, rows), np.nan)
        tiles = [acc for unit in range(rows // 16 // self.tiles) for acc in self.unit(unit)]
        for tile, g, n in itertools.product(range(rows // 16), range(8), range(columns)):
            upper, far = (tile * 8 + g, rows // 2) if self.packed.paired else (tile * 16 + g, 8)
            lane = tiles[tile][g * 4 + n // 2]
            found[n, upper], found[n, upper + far] = lane[n % 2], lane[n % 2 + 2]
        return found


def columns_of(count: int, width: int) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(1)).bfloat16()


def wrong(got: F64, want: Tensor) -> float:
    """The largest error, relative to the largest number."""
    return float(np.abs(got - want.numpy()).max() / want.abs().max())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("zeros", [False, True], ids=["symmetric", "zeros"])
@pytest.mark.parametrize("paired", [False, True], ids=["", "swiglu"])
@pytest.mark.parametrize("columns", [1, 3, 8])
def test_tensor_cores_take_the_layout(
    shape: Shape, zeros: bool, paired: bool, columns: int
) -> None:
    a, x = affine(*shape, zeros), columns_of(columns, shape[1])
    packed, want = pack(a, paired=paired), x.double() @ dense(a).T
    for alone in (True,) if columns == 1 else (True, False):
        assert wrong(Warp(packed, x, alone).product(), want) < 1e-12  # fp64 throughout
    wider = 2 if packed.width % (2 * max(64, packed.group)) == 0 else 1
    assert wrong(Warp(packed, x, tiles=2, wider=wider).product(), want) < 1e-12


def test_fp16_keeps_a_column_of_any_size() -> None:
    """Groups from the smallest normal numbers to the largest, and one of zeros."""
    a, x = affine(32, 512, 64, zeros=True), columns_of(1, 512)
    for i, power in enumerate((-126, -112, -40, 0, 14, 100, 124)):
        x[:, i * 64 : i * 64 + 64] *= 2.0**power
    x[:, -64:] = 0
    want = x.double() * dense(a)[:, None]  # rows, 1, width
    largest = np.abs(fp16(stage(x[0], 64)[0]).T.reshape(8, -1)).max(1)
    assert ((largest >= 2**14) & (largest < 2**15)).tolist() == [False, *[True] * 6, False]
    for i in range(8):  # each group by itself: else the largest hides the others
        only, here = torch.zeros_like(x), slice(i * 64, i * 64 + 64)
        only[:, here] = x[:, here]
        got, exact = Warp(pack(a), only).product(), want[..., here].sum(-1).T
        assert np.abs(got - exact.numpy()).max() <= 1e-9 * exact.abs().max()


def test_a_wrong_turn_a_wrong_pairing_and_a_wrong_zero_show() -> None:
    for columns, turns in ((1, (0, 4, 12, 8)), (2, (0, 8, 4, 12))):
        a, x = affine(32, 128, 64, zeros=True), columns_of(columns, 128)
        want, packed = x.double() @ dense(a).T, pack(a)
        assert wrong(Warp(packed, x, turns=turns).product(), want) > 0.1
        assert wrong(Warp(replace(packed, paired=True), x).product(), want) > 0.1
        assert wrong(Warp(replace(packed, zeros=None), x).product(), want) > 0.1


# What `Warp` does, as the sources have it, in their order: whoever changes one changes both.
AS_EMULATED = {
    "common.cuh": """
return __funnelshift_r(word, word, bits); ... lop3.b32 %0, %1, 0x003C003C, 0x42004200, 0xEA; ...
"fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(r), "r"(0x3F803F80u), "r"(minus) ... lop3.b32 %0,
%1, 0x003C003C, 0x5C005C00, 0xEA; ... lop3.b32 %0, %1, 0x03C003C0, 0x4C004C00, 0xEA; ... mma_half(
... m16n8k16.row.col.f32.f16.f16.f32 ... mma( ... m16n8k16.row.col.f32.bf16.bf16.f32
""",
    "linear.cu": """
at = (size_t)unit * MT * (W.K / SPAN) + span; ... scale = at * GROUPS_A_SPAN * 8 + lane / 4; return
Source{W.words + at * LOADS * 32 + lane, W.scales + scale, W.zeros + scale, span}; ...
copy_async(&slot.w[m][i][lane], s.words + (size_t)(m * spans * LOADS + i) * 32); ... const int at =
(m * spans * GROUPS_A_SPAN + i) * 8; ... return first_lanes(x + at * 16, lane); ... x += spans *
SPAN * 2, groups += spans * GROUPS_A_SPAN; ... return x[n][at]; ... x[n] += spans * (SPAN / 8); ...
b[n] = in(n, i * 4, lane); ... four = slot.w[m][i / 2][lane]; ... {i % 2 ? four.z : four.x, i % 2 ?
four.w : four.y}; ... __byte_perm(pair, 0, 0x1010) | 0x80008000u; ... __byte_perm(pair, 0, 0x3232) |
0x80008000u; ... upper = 0xC220C220u, lower = 0xC220C220u; ... v = turned(w, 8); const u32 a[4] =
{half_256(w), half_16(w), half_256(v), half_16(v)}; ... {raised(w), raised(turned(w, 4)),
raised(turned(w, 8)), raised(turned(w, 12))}; ... integers(w, upper), integers(turned(w, 4), lower),
integers(turned(w, 8), upper), integers(turned(w, 12), lower)}; ... b0 = j ? b[n].z : b[n].x, b1 = j
? b[n].w : b[n].y; ... mma(less[c][m][n], upper, lower, upper, lower, b0, b1); ... half_low(pair) *
x.y, half_high(pair) * x.y ... {(low(zero) + 224.f) * x.x, (high(zero) - 16.f) * x.x}; ... {264.f *
x.x, 24.f * x.x}; ... to.of[m][lane / 4] = acc[m][n][0], to.of[m][lane / 4 + 8] = acc[m][n][1]; ...
e % NT * 8 + (lane & 3) * 2 + c; ... y += sums[unit + w].of[m][lane % 16]; ... __shfl_xor_sync(~0u,
y, 8) ... v = sums[unit + w].of[m][e % NT][lane]; ... (c ? y.y : y.x) * f, (c ? y.w : y.z) * f,
rows, n < columns); ... for (int l = GROUP / 16; l; l /= 2) ... exponent = max(__float_as_uint(most)
>> 23, 15u); ... times = __uint_as_float(268 - exponent << 23); ... divided_by =
__uint_as_float(exponent - 14 << 23); ... make_float2(sum * times, divided_by); ...
__cvta_generic_to_shared(staged + x_lane), in.groups = groups; ... x + (size_t)min(n * 8 + lane / 4,
columns - 1) * (W.K / 8) + x_lane; ... now.go_on(span);
""",
}


@pytest.mark.parametrize("source", list(AS_EMULATED))
def test_the_sources_are_as_they_are_emulated(source: str) -> None:
    text, at = " ".join((cuda.SOURCES / source).read_text(encoding="utf-8").split()), 0
    for passage in " ".join(AS_EMULATED[source].split()).split(" ... "):
        assert passage in text[at:]
        at = text.index(passage, at) + len(passage)
