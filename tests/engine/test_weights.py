"""INT4 weights in the kernels' order: undone exactly. Who multiplies them: test_emulated.py."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from fused_models import affine

from qatbench.engine.weights import pack, unpack
from qatbench.errors import ShapeError
from qatbench.quant.packing import Affine

Shape = tuple[int, int, int]
SHAPES = [(32, 64, 32), (96, 192, 64), (64, 384, 128), (32, 512, 256)]  # outputs, inputs, group
LARGE = {256: (128, 2), 192: (64, 3), 512: (128, 4), 320: (64, 5)}  # of which, and how many alike


@pytest.mark.parametrize("shape", [*SHAPES, *((32, 2 * group, group) for group in LARGE)])
@pytest.mark.parametrize("paired", [False, True], ids=["", "paired"])
@pytest.mark.parametrize("zeros", [False, True], ids=["symmetric", "zeros"])
def test_packing_is_undone_exactly(shape: Shape, zeros: bool, paired: bool) -> None:
    packed = pack(a := affine(*shape, zeros, "cpu"), paired=paired)
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
    packed = pack(a := affine(32, 2 * group, group, zeros, "cpu"))
    assert (packed.group, packed.alike, packed.scales.shape) == (size, alike, (2, 2 * alike, 8))
    small = pack(Affine(a.fields, *(part.repeat_interleave(alike, 1) for part in a[1:])))
    assert (small.group, small.alike) == (size, 1)
    for part in ("words", "scales", "zeros"):
        got, want = getattr(packed, part), getattr(small, part)
        assert got is want is None or torch.equal(got, want)


@pytest.mark.parametrize(("group", "held"), [(128, 128), (256, 128), (192, 64)])
@pytest.mark.parametrize("zeros", [False, True], ids=["symmetric", "zeros"])
def test_bytes_are_of_four_bits_scales_and_zeros(group: int, held: int, zeros: bool) -> None:
    packed = pack(affine(64, 768, group, zeros, "cpu"))
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
        pack(affine(out, width, group, False, "cpu"), paired=paired)
    outputs = f"outputs: a multiple of {32 if paired else 16}"
    assert error.value.hint == f"{outputs}; inputs: of 64; groups: 32 or of 64"
