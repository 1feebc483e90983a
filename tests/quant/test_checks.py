"""What packed tensors say of themselves, against what packed them."""

from __future__ import annotations

import pytest
import torch

from qatbench.errors import ShapeError
from qatbench.quant import checks
from qatbench.quant.grid import Grid
from qatbench.quant.result import QuantizedLinear

OUT, WIDTH = 96, 128
SIZES = [(4, 32), (4, -1), (8, 64), (3, 32), (2, 128)]


def linear(bits: int, group_size: int) -> QuantizedLinear:
    grid = Grid(bits, group_size)
    rng = torch.Generator().manual_seed(bits)
    codes = torch.randint(grid.qmin, grid.qmax + 1, (OUT, WIDTH), generator=rng)
    scales = torch.full((OUT, grid.groups(WIDTH)), 0.5)
    return QuantizedLinear.from_codes(codes.to(torch.int8), scales, grid)


@pytest.mark.parametrize(("bits", "group_size"), SIZES)
@pytest.mark.parametrize("form", ["gptq", "gptq_v2", "awq"])
def test_shapes_bits_groups_and_zeros_are_read_back(form: str, bits: int, group_size: int) -> None:
    if form == "awq" and bits != 4:
        return
    method = form.removesuffix("_v2")
    packed = linear(bits, group_size).packed(form, "x")
    sizes = (OUT, WIDTH)
    shapes = {part: tuple(value.shape) for part, value in packed.items()}
    assert checks.part_shapes(method, *sizes, bits, group_size) == shapes
    assert checks.implied_bits(method, shapes["qweight"], *sizes) == bits
    groups = Grid(bits, group_size).groups(WIDTH)
    assert checks.implied_groups(method, shapes["scales"], *sizes) == groups
    middle = 1 << (bits - 1)
    field = checks.only_field(packed["qzeros"], bits)
    assert field == (middle - 1 if form == "gptq" else middle)
    assert torch.equal(checks.constant_zeros(groups, OUT, bits, field), packed["qzeros"])
    packed["qzeros"][-1, -1] ^= 1 << 30
    assert checks.only_field(packed["qzeros"], bits) is None


def test_compressed_tensors_hold_the_same_words_turned() -> None:
    packed = linear(4, 32).packed("gptq", "x")
    shapes = checks.part_shapes("compressed-tensors", OUT, WIDTH, 4, 32)
    assert shapes == {
        "weight_packed": tuple(packed["qweight"].T.shape),
        "weight_scale": tuple(packed["scales"].T.shape),
        "weight_shape": (2,),
    }
    words, scales = shapes["weight_packed"], shapes["weight_scale"]
    assert checks.implied_bits("compressed-tensors", words, OUT, WIDTH) == 4
    assert checks.implied_groups("compressed-tensors", scales, OUT, WIDTH) == 4


def test_sizes_that_no_packing_has() -> None:
    assert checks.part_shapes("gptq", OUT, WIDTH, 4, 48) is None  # does not divide
    assert checks.part_shapes("gptq", OUT, WIDTH, 4, 0) is None
    assert checks.part_shapes("gptq", 100, WIDTH, 3, 32) is None  # zero points fill no words
    assert checks.part_shapes("awq", 100, WIDTH, 4, 32) is None
    assert checks.implied_bits("gptq", (16, OUT + 1), OUT, WIDTH) is None
    assert checks.implied_bits("gptq", (20, OUT), OUT, WIDTH) is None  # 5 bits
    assert checks.implied_bits("gptq", (16,), OUT, WIDTH) is None
    assert checks.implied_groups("gptq", (3, OUT), OUT, WIDTH) is None
    assert checks.implied_groups("gptq", (4, WIDTH), OUT, WIDTH) is None


@pytest.mark.parametrize(
    "qzeros", [torch.ones(2, 3), torch.ones(3, dtype=torch.int32), torch.ones(0, 3).int()]
)
def test_zero_points_that_are_none(qzeros: torch.Tensor) -> None:
    with pytest.raises(ShapeError):
        checks.only_field(qzeros, 4)
    with pytest.raises(ShapeError, match="periods"):
        checks.only_field(torch.ones(1, 4, dtype=torch.int32), 3)


def test_the_order_of_inputs() -> None:
    g_idx = torch.arange(8, dtype=torch.int32) // 2
    assert checks.in_order(g_idx, 4)
    assert not checks.in_order(g_idx.flip(0), 4)
    assert not checks.in_order(g_idx, 2)
    assert not checks.in_order(g_idx, 3)


def test_other_types_are_cast_only_without_loss() -> None:
    words = torch.tensor([[-1, 5]], dtype=torch.int32)
    for held in (words.view(torch.uint32), words.long(), words):
        got = checks.as_stored("qweight", held)
        assert got is not None
        assert torch.equal(got, words)
    assert checks.as_stored("qweight", words.float()) is None
    assert checks.as_stored("g_idx", torch.tensor([1 << 40])) is None
    scales = torch.tensor([0.5, 2.0**-14])
    assert checks.as_stored("scales", scales.bfloat16()).dtype == torch.float16  # type: ignore[union-attr]
    assert checks.as_stored("scales", scales / 3) is None
