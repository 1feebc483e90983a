"""AutoRound: integers taken from a tuned layer, and how a layer is rounded while tuning."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qatbench.errors import NumericsError
from qatbench.quant import layer_tuning
from qatbench.quant.autoround import take
from qatbench.quant.grid import SMALLEST_SCALE, Grid
from qatbench.quant.packing import dequantize_gptq, unpack_gptq

BITS = (2, 3, 4, 8)


def tuned(grid: Grid, rows: int = 32, columns: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales of both signs as the library has them (fp32), and their weight."""
    rng = torch.Generator().manual_seed(grid.bits)
    shape = (rows, grid.groups(columns), -1)
    codes = torch.randint(grid.qmin, grid.qmax + 1, (rows, columns), generator=rng)
    scales = torch.rand(shape[:2], generator=rng) * 0.1 + 1e-3
    scales *= torch.where(torch.rand(shape[:2], generator=rng) < 0.5, -1, 1)
    return codes, scales, (codes.reshape(shape) * scales[..., None]).flatten(1)


# --- taking the integers --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("group_size", [16, -1])
@pytest.mark.parametrize("bits", BITS)
def test_codes_are_those_of_the_tuned_weight_and_survive_packing(
    bits: int, group_size: int, dtype: torch.dtype
) -> None:
    grid = Grid(bits, group_size)
    codes, scales, weight = tuned(grid)
    assert codes.min() == grid.qmin  # a full grid: -2^(bits-1) is used as well

    linear = take(weight.to(dtype), scales.squeeze(-1), grid, "x")

    packed = linear.packed("gptq", "x")
    got, stored = unpack_gptq(packed, grid)
    assert torch.equal(got.long(), codes)
    assert torch.equal(stored, scales.half().float())
    assert (stored < 0).any()
    assert linear.symmetric
    assert torch.equal(dequantize_gptq(packed, bits, group_size), linear.dense())
    # 2^-11: half a unit in the last place of an fp16 scale, the only thing that is rounded
    torch.testing.assert_close(linear.dense(), weight, rtol=2**-11, atol=0)


def test_a_weight_off_the_grid_is_refused() -> None:
    grid = Grid(4, 32)
    _, scales, weight = tuned(grid)
    step = scales.abs().repeat_interleave(32, 1)
    for bad in (weight + 0.3 * step, weight * 3, weight / 0.0):  # between codes, beyond, nowhere
        with pytest.raises(NumericsError, match="x: tuned weights are"):
            take(bad, scales, grid, "x")
    with pytest.raises(NumericsError, match=r"x: scales \(32, 1\)"):
        take(weight, scales[:, :1], grid, "x")


# --- rounding once a step -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wrapper() -> Any:
    layer_tuning.load()
    from auto_round import wrapper

    return wrapper


def wrapped(kind: Any, bits: int, dtype: torch.dtype) -> Any:
    """A linear in the library's wrapper, tuned away from where it starts."""
    torch.manual_seed(0)
    linear: Any = nn.Linear(64, 32, bias=False, dtype=dtype).requires_grad_(False)
    linear.bits, linear.group_size, linear.sym, linear.data_type = bits, 16, True, "int"
    linear.act_bits, linear.scale_dtype = 16, torch.float32
    layer = kind(linear, enable_torch_compile=False)
    with torch.no_grad():
        layer.value.uniform_(-0.5, 0.5)
        layer.min_scale.uniform_(0.6, 1)
        layer.max_scale.uniform_(0.6, 1)
    return layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bits", BITS)
def test_rounding_once_a_step_gives_the_gradients_of_rounding_for_every_sample(
    bits: int, dtype: torch.dtype, wrapper: Any
) -> None:
    theirs = wrapped(wrapper.WrapperLinear, bits, dtype)
    ours = wrapped(layer_tuning._once_a_step(wrapper.WrapperLinear), bits, dtype)
    samples = [torch.randn(1, tokens, 64).to(dtype) for tokens in (5, 9, 3)]
    counted = []
    rounding = ours.weight_quant_func
    ours.weight_quant_func = lambda *args, **kwargs: counted.append(1) or rounding(*args, **kwargs)
    for step in range(2):  # two: what is held must be let go
        for layer in (theirs, ours):
            for sample in samples:
                layer(sample).float().square().sum().backward()
        ours.hand_back()
        assert len(counted) == step + 1
        for name, parameter in theirs.params.items():
            assert parameter.grad.abs().sum() > 0
            # fp32: sums in another order. bf16: theirs rounds every sample's gradient to 8 bits
            # before summing, ours the sum.
            slack = 1e-5 if dtype == torch.float32 else 2e-2
            got, wanted = ours.params[name].grad, parameter.grad
            assert (got - wanted).norm() < slack * wanted.norm(), name
        with torch.no_grad():
            for name, parameter in theirs.params.items():
                for moved in (ours.params[name], parameter):  # both to the same place
                    moved -= 0.02 * parameter.grad.sign()
        theirs.zero_grad()
        ours.zero_grad()


def test_no_scale_is_smaller_than_a_checkpoint_can_hold(wrapper: Any) -> None:
    layer = wrapped(layer_tuning._once_a_step(wrapper.WrapperLinear), 8, torch.float32)
    with torch.no_grad():
        layer.orig_layer.weight[:8] *= 1e-4
        layer.weight_min[:32] *= 1e-4  # 8 rows of 4 groups
        layer.weight_max[:32] *= 1e-4
        weight, scale, _ = layer._qdq_weight(layer.value, layer.min_scale, layer.max_scale)
    assert scale.abs().min() == SMALLEST_SCALE
    linear = take(weight, scale.reshape(32, 4), Grid(8, 16), "x")
    torch.testing.assert_close(linear.dense(), weight, rtol=2**-11, atol=0)
