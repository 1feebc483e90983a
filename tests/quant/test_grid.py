from __future__ import annotations

import math

import pytest
import torch

from qatbench.errors import NumericsError, ShapeError, UsageError
from qatbench.quant.grid import (
    LSQ_RATIOS,
    RTN_RATIOS,
    SMALLEST_SCALE,
    Grid,
    dequantize,
    quantize,
    round_scales,
    search_scales,
    sqnr_db,
)

GRIDS = [Grid(bits, size) for bits in (2, 3, 4, 8) for size in (8, 32, -1)]


def random_weight(rows: int = 6, columns: int = 64, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.05


def random_codes(grid: Grid, rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(grid.qmin, grid.qmax + 1, (rows, columns), generator=rng).to(torch.int8)


def random_scales(grid: Grid, rows: int, columns: int, seed: int = 1) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    return round_scales(torch.rand(rows, grid.groups(columns), generator=rng) * 0.1 + 1e-3, grid)


@pytest.mark.parametrize(
    ("bits", "qmin", "qmax"), [(2, -2, 1), (3, -4, 3), (4, -8, 7), (8, -128, 127)]
)
def test_range_is_that_of_twos_complement(bits: int, qmin: int, qmax: int) -> None:
    assert (Grid(bits, 32).qmin, Grid(bits, 32).qmax) == (qmin, qmax)


@pytest.mark.parametrize(("bits", "size"), [(5, 32), (0, 32), (4, 0), (4, -2), (4, 12), (4, 1)])
def test_other_grids_are_refused(bits: int, size: int) -> None:
    with pytest.raises(UsageError):
        Grid(bits, size)


def test_groups_of_a_row() -> None:
    assert Grid(4, 128).groups(512) == 4
    assert Grid(4, -1).groups(511) == 1


def test_a_group_size_that_does_not_divide_is_refused_with_the_layers_name() -> None:
    grid, weight = Grid(4, 128), torch.ones(2, 200)
    calls = [
        lambda: grid.groups(200, "layers.3.o_proj"),
        lambda: quantize(weight, torch.ones(2, 1), grid, name="layers.3.o_proj"),
        lambda: dequantize(weight.char(), torch.ones(2, 1), grid, name="layers.3.o_proj"),
        lambda: search_scales(weight, grid, name="layers.3.o_proj"),
    ]
    for call in calls:
        with pytest.raises(ShapeError, match=r"layers\.3\.o_proj: group size 128 .* 200 inputs"):
            call()


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_codes_survive_dequantize_and_quantize(grid: Grid) -> None:
    codes, scales = random_codes(grid, 5, 96), random_scales(grid, 5, 96)

    values = dequantize(codes, scales, grid)

    assert values.dtype == torch.float32
    assert torch.equal(quantize(values, scales, grid), codes)
    # fp64 oracle: 8-bit codes times 11-bit scales need 19 bits, so fp32 must be exact
    wide = codes.double() * scales.double().repeat_interleave(96 // scales.shape[1], dim=1)
    assert torch.equal(values.double(), wide)


def test_rounding_is_half_to_even_and_clamped() -> None:
    places = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, -8.6, 7.4, 99.0]])
    codes = quantize(places * 0.25, torch.tensor([[0.25]]), Grid(4, -1))
    assert codes.dtype == torch.int8
    assert codes.tolist() == [[0, 2, 2, 0, -2, -8, 7, 7]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_give_the_codes_of_their_fp32_values(dtype: torch.dtype) -> None:
    grid, weight = Grid(4, 32), random_weight().to(dtype)
    scales = search_scales(weight, grid)
    assert torch.equal(quantize(weight, scales, grid), quantize(weight.float(), scales, grid))


def test_scales_of_another_shape_are_refused() -> None:
    grid, weight = Grid(4, 32), random_weight(6, 64)
    for shape in [(6, 1), (2, 6), (6, 2, 1)]:
        with pytest.raises(ShapeError, match="scales"):
            quantize(weight, torch.ones(shape), grid)
        with pytest.raises(ShapeError, match="scales"):
            dequantize(weight.char(), torch.ones(shape), grid)
    with pytest.raises(ShapeError, match="matrix"):
        quantize(weight[0], torch.ones(1, 2), grid)
    with pytest.raises(ShapeError, match="matrix"):
        search_scales(torch.empty(0, 64), grid)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_are_refused(bad: float) -> None:
    grid, weight = Grid(4, 32), random_weight()
    weight[3, 40] = bad
    with pytest.raises(NumericsError, match="q_proj"):
        search_scales(weight, grid, name="q_proj")
    with pytest.raises(NumericsError, match="q_proj"):
        quantize(weight, torch.ones(6, 2), grid, name="q_proj")


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
def test_scales_that_are_not_positive_are_refused(bad: float) -> None:
    with pytest.raises(NumericsError, match="scale"):
        quantize(torch.ones(1, 32), torch.tensor([[bad]]), Grid(4, 32))


def test_weights_beyond_fp16_are_refused() -> None:
    with pytest.raises(NumericsError, match="fp16"):
        search_scales(torch.tensor([[1e5] * 8]), Grid(4, 8))


@pytest.mark.parametrize("ratio", [0.0, -0.5, math.nan, math.inf])
def test_ratios_must_be_positive(ratio: float) -> None:
    with pytest.raises(UsageError, match="ratios"):
        search_scales(torch.ones(1, 32), Grid(4, 32), ratios=[1.0, ratio])


def test_the_ratio_grids_are_the_documented_ones() -> None:
    assert len(RTN_RATIOS) == 46
    assert 1.0 in RTN_RATIOS
    assert (RTN_RATIOS[0], RTN_RATIOS[-1]) == (0.3, 1.2)
    assert torch.allclose(torch.tensor(LSQ_RATIOS), torch.linspace(0.3, 1.2, 20))


def group_errors(weight: torch.Tensor, scales: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Squared error of each group in fp64."""
    error = dequantize(quantize(weight, scales, grid), scales, grid).double() - weight.double()
    return error.reshape(weight.shape[0], scales.shape[1], -1).square().sum(-1)


@pytest.mark.parametrize("ratios", [RTN_RATIOS, LSQ_RATIOS], ids=["rtn", "lsq"])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_search_is_never_worse_than_the_full_range(grid: Grid, ratios: tuple[float, ...]) -> None:
    weight = random_weight()
    top = weight.reshape(6, grid.groups(64), -1).abs().amax(-1)
    full = group_errors(weight, round_scales(top / grid.qmax, grid), grid)

    found = group_errors(weight, search_scales(weight, grid, ratios=ratios), grid)

    # The search compares fp32 sums of at most 64 squares: off by at most 64 ulp, 4e-6.
    assert (found <= full * (1 + 4e-6)).all()
    if grid.bits <= 4:  # with few codes, clipping the tail of a normal weight must pay somewhere
        assert found.sum() < 0.98 * full.sum()


@pytest.mark.parametrize("grid", [Grid(4, 8), Grid(3, 32)], ids=str)
def test_search_finds_the_best_ratio_of_each_group(grid: Grid) -> None:
    weight, ratios = random_weight(3, 64, seed=5), (0.5, 0.7, 0.9, 1.1)
    top = weight.reshape(3, grid.groups(64), -1).abs().amax(-1) / grid.qmax
    by_hand = torch.stack(
        [group_errors(weight, round_scales(top * r, grid), grid) for r in (*ratios, 1.0)]
    ).amin(0)

    found = group_errors(weight, search_scales(weight, grid, ratios=ratios), grid)

    torch.testing.assert_close(found, by_hand, rtol=4e-6, atol=0)  # fp32 sums, as above


def test_search_gives_the_same_in_blocks_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, grid = random_weight(7), Grid(4, 32)
    whole = search_scales(weight, grid)
    monkeypatch.setattr("qatbench.quant.grid._BLOCK", 130)  # two rows of 64 at a time, then one
    assert torch.equal(search_scales(weight, grid), whole)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_weights_on_the_grid_are_found_exactly(grid: Grid) -> None:
    codes, scales = random_codes(grid, 4, 64), random_scales(grid, 4, 64)
    per_group = codes.view(4, grid.groups(64), -1)
    per_group[..., 0] = grid.qmax  # so that ratio 1 gives the very scale, ...
    per_group[per_group == grid.qmin] = grid.qmin + 1  # ... which -2^(bits-1) would enlarge
    weight = dequantize(codes, scales, grid)

    found = search_scales(weight, grid)

    assert torch.equal(found, scales)
    assert sqnr_db(weight, dequantize(quantize(weight, found, grid), found, grid)) == math.inf


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_scales_are_what_a_checkpoint_can_hold(grid: Grid) -> None:
    weight = random_weight(4)
    weight[0] = 0  # no range at all
    weight[1] *= 1e-9  # an fp16 scale would underflow to zero
    weight[2] *= 65504 / weight[2].abs().max()  # code times scale could overflow in fp16
    scales = search_scales(weight, grid)
    half = scales.half()

    assert scales.dtype == torch.float32
    assert torch.equal(half.float(), scales)
    assert torch.equal(scales[:2], torch.full_like(scales[:2], SMALLEST_SCALE))
    assert torch.finfo(torch.float16).smallest_normal == SMALLEST_SCALE
    assert (quantize(weight, scales, grid)[0] == 0).all()
    assert torch.isfinite(half * grid.qmin).all()
    assert torch.isfinite(half * grid.qmax).all()


def test_sqnr_of_known_noise() -> None:
    signal = torch.full((4, 4), 10.0)
    assert sqnr_db(signal, signal + 0.1) == pytest.approx(40, abs=1e-4)  # 10.1 is inexact in fp32
    assert sqnr_db(signal, signal) == math.inf
    assert sqnr_db(torch.zeros(2), torch.ones(2)) == -math.inf
    with pytest.raises(ShapeError):
        sqnr_db(signal, signal[0])
    with pytest.raises(ShapeError):
        sqnr_db(torch.empty(0), torch.empty(0))


def test_eight_bits_gain_about_six_db_a_bit_over_four() -> None:
    weight = random_weight(32, 128)
    levels = {}
    for bits in (4, 8):
        grid = Grid(bits, 32)
        scales = search_scales(weight, grid)
        levels[bits] = sqnr_db(weight, dequantize(quantize(weight, scales, grid), scales, grid))
    # 4 bits * 6.02 dB = 24.1; 4 bits gain up to ~1 dB more from clipping, 8 bits from qmin = -qmax
    assert levels[8] - levels[4] == pytest.approx(24.1, abs=1.5)
