from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qatbench.errors import NumericsError, PrerequisiteError, ShapeError, UsageError
from qatbench.quant import fake_quant as arithmetic
from qatbench.quant import kernels as of_device
from qatbench.quant.grid import LSQ_RATIOS, Grid, dequantize, quantize, search_scales, stored_scales
from qatbench.quant.lsq import (
    FakeQuantLinear,
    attach,
    compile_layers,
    detach,
    fake_quant,
    lsq_gradient_factor,
    quantized_layers,
)

GRIDS = [Grid(bits, size) for bits in (2, 3, 4, 8) for size in (8, -1)]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def problem(grid: Grid, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Weights and log-scales so small that about a third of the weights is clipped."""
    rng = torch.Generator().manual_seed(3)
    weight = torch.randn(5, 32, generator=rng, dtype=torch.float64)
    scale = torch.rand(5, grid.groups(32), generator=rng, dtype=torch.float64) + 0.5
    return weight.to(dtype), (scale / grid.qmax).log().to(dtype)


def stored(log_scale: Tensor, grid: Grid) -> Tensor:
    return stored_scales(log_scale, grid)


def tiny_model() -> nn.Sequential:
    torch.manual_seed(0)  # the same weights at every call
    block = nn.ModuleDict({"up": nn.Linear(32, 24), "down": nn.Linear(24, 32, bias=False)})
    return nn.Sequential(nn.Embedding(11, 32), block, nn.Linear(32, 11))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_forward_is_what_is_packed_to_the_bit(grid: Grid) -> None:
    weight, log_scale = problem(grid)
    scales = stored(log_scale, grid)

    value = fake_quant(weight, log_scale, grid)

    assert value.dtype == torch.float32
    assert torch.equal(value, dequantize(quantize(weight, scales, grid), scales, grid))


def detach_trick(weight: Tensor, log_scale: Tensor, grid: Grid) -> Tensor:
    """The same function as a composition that autograd can differentiate by itself."""
    scale = log_scale.exp()
    scale = (scale + (stored(log_scale, grid) - scale).detach()).unsqueeze(-1)
    place = (weight.unflatten(1, (log_scale.shape[1], -1)) / scale).clamp(grid.qmin, grid.qmax)
    return ((place + (place.round() - place).detach()) * scale).flatten(1)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_gradients_equal_autograd_of_the_detach_trick(grid: Grid) -> None:
    inputs = [x.requires_grad_() for x in problem(grid, torch.float64)]
    upstream = torch.randn(5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    expected = torch.autograd.grad(detach_trick(*inputs, grid), inputs, upstream)

    got = torch.autograd.grad(fake_quant(*inputs, grid), inputs, upstream)

    # The oracle multiplies by s and divides by it again: two fp64 roundings.
    torch.testing.assert_close(got[0], expected[0], rtol=1e-15, atol=0)
    # The oracle's d/ds and d/dlog_scale differ by exp(log_scale) against its fp16 value: 2^-11.
    torch.testing.assert_close(got[1], expected[1], rtol=2**-11, atol=0)
    clipped = expected[0] == 0
    assert clipped.any()
    assert not clipped.all()


def test_gradient_formulas_by_hand() -> None:
    scale, grid = 0.25, Grid(4, 8)
    places = torch.tensor([[-9.0, -8.0, -7.6, 0.0, 0.4, 2.7, 7.0, 7.3]])
    weight = (places * scale).requires_grad_()
    log_scale = torch.tensor([[scale]]).log().requires_grad_()
    codes = torch.tensor([[-8.0, -8.0, -8.0, 0.0, 0.0, 3.0, 7.0, 7.0]])
    by_scale = torch.tensor([[-8.0, 0.0, -0.4, 0.0, -0.4, 0.3, 0.0, 7.0]])  # q - w/s, or q clipped

    value = fake_quant(weight, log_scale, grid)
    assert torch.equal(value, codes * scale)
    for i in range(8):
        one = F.one_hot(torch.tensor([i]), 8).float()
        by_weight, by_log = torch.autograd.grad(value, (weight, log_scale), one, retain_graph=True)
        assert torch.equal(by_weight, one * (i not in (0, 7)))
        # Differences of places below 8 in fp32: half an ulp of 8 is 5e-7.
        assert by_log.item() == pytest.approx(by_scale[0, i].item() * scale, abs=1e-6)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_scale_gradient_is_the_slope_with_the_rounding_held_fixed(grid: Grid) -> None:
    weight, log_scale = problem(grid, torch.float64)
    log_scale = stored(log_scale, grid).double().log()  # exact scales: no fp16 rounding left over
    upstream = torch.randn(5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(6))

    def place(logs: Tensor) -> Tensor:
        groups = weight.unflatten(1, (logs.shape[1], -1))
        return (groups / logs.exp().unsqueeze(-1)).clamp(grid.qmin, grid.qmax)

    rounding = place(log_scale).round() - place(log_scale)  # straight-through: a constant

    def straight(logs: Tensor) -> Tensor:
        values = (place(logs) + rounding) * logs.exp().unsqueeze(-1)
        return (values.flatten(1) * upstream).reshape(5, logs.shape[1], -1).sum(-1)

    step = 1e-6
    slope = (straight(log_scale + step) - straight(log_scale - step)) / (2 * step)
    log_scale.requires_grad_()
    (fake_quant(weight, log_scale, grid) * upstream).sum().backward()

    # Values up to ~50: fp64 cancellation 50 * 2e-16 / 1e-6 = 1e-8, curvature 1e-12.
    torch.testing.assert_close(log_scale.grad, slope, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("sign", [-1, 1])
def test_scale_gradient_is_the_true_slope_where_all_is_clipped(sign: int) -> None:
    grid, step = Grid(4, 8), 0.05
    weight, log_scale = torch.full((1, 8), sign * 100.0), torch.tensor([[0.3]])
    values = [fake_quant(weight, log_scale + d, grid).sum() for d in (-step, step)]
    log_scale.requires_grad_()
    fake_quant(weight, log_scale, grid).sum().backward()
    # fp16 scales: 2^-11 / step = 1e-2; curvature step^2 / 6 = 4e-4.
    slope = (values[1] - values[0]).item() / (2 * step)
    assert log_scale.grad is not None
    assert log_scale.grad.item() == pytest.approx(slope, rel=1.1e-2)


def test_gradient_factor_multiplies_the_scale_gradient_only() -> None:
    grid = Grid(4, 8)
    factor = lsq_gradient_factor(grid, 32)
    assert factor == pytest.approx(1 / math.sqrt(8 * 7))
    assert lsq_gradient_factor(Grid(3, -1), 32) == pytest.approx(1 / math.sqrt(32 * 3))
    inputs = [x.requires_grad_() for x in problem(grid)]
    plain = torch.autograd.grad(fake_quant(*inputs, grid).sum(), inputs)
    scaled = torch.autograd.grad(fake_quant(*inputs, grid, gradient_factor=factor).sum(), inputs)
    assert torch.equal(scaled[0], plain[0])
    torch.testing.assert_close(scaled[1], plain[1] * factor, rtol=1e-6, atol=0)  # one fp32 product


def test_only_the_two_inputs_are_kept_for_the_backward_pass() -> None:
    weight, log_scale = (x.requires_grad_() for x in problem(Grid(4, 8)))
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        fake_quant(weight, log_scale, Grid(4, 8))
    assert [x.data_ptr() for x in kept] == [weight.data_ptr(), log_scale.data_ptr()]


def test_frozen_inputs_get_no_gradient() -> None:
    weight, log_scale = problem(Grid(4, 8))
    log_scale.requires_grad_()
    fake_quant(weight, log_scale, Grid(4, 8)).sum().backward()
    assert weight.grad is None
    assert log_scale.grad is not None


def test_half_precision_weights_get_gradients_of_their_dtype() -> None:
    weight, log_scale = problem(Grid(4, 8))
    weight = weight.bfloat16().requires_grad_()
    value = fake_quant(weight, log_scale, Grid(4, 8))
    value.sum().backward()
    assert value.dtype == torch.float32
    assert torch.equal(value, fake_quant(weight.float(), log_scale, Grid(4, 8)))
    assert weight.grad is not None
    assert weight.grad.dtype == torch.bfloat16


def test_wrong_scales_are_refused() -> None:
    weight, log_scale = problem(Grid(4, 8))
    with pytest.raises(NumericsError, match="log_scale"):
        fake_quant(weight, log_scale.bfloat16(), Grid(4, 8))
    with pytest.raises(ShapeError, match="scales"):
        fake_quant(weight, log_scale[:, :2], Grid(4, 8))


def test_wrapping_keeps_the_parameters_and_starts_from_the_searched_scales() -> None:
    linear, grid = nn.Linear(32, 24).eval(), Grid(4, 8)
    layer = FakeQuantLinear.from_linear(linear, grid)
    scales = search_scales(linear.weight, grid, ratios=LSQ_RATIOS)

    assert layer.weight is linear.weight
    assert layer.bias is linear.bias
    assert not layer.training
    assert layer.state_dict().keys() == {"weight", "bias", "log_scale"}
    assert torch.equal(layer.codes_and_scales()[1], scales)  # exp(log(s)) rounds back to s
    assert layer.log_scale.requires_grad
    assert "bits=4" in repr(layer)


def test_exp_of_log_gives_every_fp16_scale_back() -> None:
    grid = Grid(8, -1)
    every = torch.arange(1, 1 << 15, dtype=torch.int16).view(torch.float16).float()
    every = every[(every >= 2.0**-14) & (every <= 65504 / 128)]
    assert len(every) > 20_000
    assert torch.equal(stored(every.log(), grid), every)


def test_forward_uses_the_codes_and_scales_it_reports() -> None:
    layer = FakeQuantLinear.from_linear(nn.Linear(32, 24), Grid(3, 8))
    x = torch.randn(2, 7, 32)
    codes, scales = layer.codes_and_scales()
    assert codes.dtype == torch.int8
    expected = F.linear(x, dequantize(codes, scales, layer.grid), layer.bias)
    assert torch.equal(layer(x), expected)
    assert not torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))


def test_forward_follows_the_inputs_dtype_and_autocast() -> None:
    layer = FakeQuantLinear.from_linear(nn.Linear(32, 24), Grid(4, 8))
    x = torch.randn(7, 32)
    codes, scales = layer.codes_and_scales()
    weight = dequantize(codes, scales, layer.grid).bfloat16()
    expected = F.linear(x.bfloat16(), weight, layer.bias.bfloat16())
    assert torch.equal(layer(x.bfloat16()), expected)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = layer(x)
    assert torch.equal(mixed, expected)
    mixed.float().sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.dtype == torch.float32
    assert layer.log_scale.grad is not None


def test_training_the_scales_lowers_the_error() -> None:
    grid = Grid(3, 8)
    weight = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    log_scale = (weight.reshape(4, 4, 8).abs().amax(-1) / 3 * 3).log().requires_grad_()  # 3 x wide
    optimizer = torch.optim.Adam([log_scale], lr=0.02)
    errors = []
    for _ in range(100):
        loss = (fake_quant(weight, log_scale, grid) - weight).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        errors.append(loss.item())
    searched = search_scales(weight, grid)
    best = (fake_quant(weight, searched.log(), grid) - weight).square().sum().item()
    assert errors[-1] < 0.3 * errors[0]
    assert errors[-1] < 2 * best  # straight-through descent ends near the searched optimum


def test_attach_then_forward_is_the_linear_with_dequantized_weights() -> None:
    model, grid = tiny_model(), Grid(4, 8)
    expected = tiny_model()
    for name in ("1.up", "1.down"):
        linear = expected.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        scales = search_scales(linear.weight, grid, ratios=LSQ_RATIOS)
        linear.weight.data = dequantize(quantize(linear.weight, scales, grid), scales, grid)

    layers = attach(model, ["1.up", "1.down", "1.up"], grid)

    assert list(layers) == ["1.up", "1.down"]
    assert layers == quantized_layers(model)
    assert type(model[2]) is nn.Linear
    x = torch.randn(3, 32)
    for name in ("1.up", "1.down"):
        module = expected.get_submodule(name)
        y = torch.randn(3, module.in_features)  # type: ignore[arg-type]
        assert torch.equal(model.get_submodule(name)(y), module(y))
    assert torch.equal(model[2](x), expected[2](x))


def test_detach_restores_plain_linears_with_the_same_outputs() -> None:
    model = tiny_model().eval()
    attach(model, ["1.up", "1.down"], Grid(4, 8))
    up, down = (model.get_submodule(f"1.{n}") for n in ("up", "down"))
    bias = up.bias
    x, y = torch.randn(3, 32), torch.randn(3, 24)
    before = up(x), down(y)

    assert detach(model) == ["1.up", "1.down"]

    up, down = (model.get_submodule(f"1.{n}") for n in ("up", "down"))
    assert type(up) is nn.Linear
    assert type(down) is nn.Linear
    assert up.bias is bias
    assert down.bias is None
    assert not up.training
    assert up.weight.requires_grad
    assert torch.equal(up(x), before[0])
    assert torch.equal(down(y), before[1])
    assert model.state_dict().keys() == tiny_model().state_dict().keys()
    assert quantized_layers(model) == {}
    assert detach(model) == []


def test_detach_leaves_a_tied_weight_alone() -> None:
    model = tiny_model()
    model[2].weight = model[0].weight
    original = model[0].weight.detach().clone()
    attach(model, ["2"], Grid(4, 8))
    assert model[2].weight is model[0].weight
    detach(model)
    assert torch.equal(model[0].weight, original)
    assert not torch.equal(model[2].weight, original)


@pytest.mark.parametrize("name", ["1.gate", "0", "1", ""])
def test_attach_refuses_what_is_no_linear_and_replaces_nothing(name: str) -> None:
    model = tiny_model()
    with pytest.raises(UsageError, match="cannot quantize"):
        attach(model, ["1.up", name], Grid(4, 8))
    assert quantized_layers(model) == {}


def test_attach_twice_is_refused() -> None:
    model = tiny_model()
    attach(model, ["1.up"], Grid(4, 8))
    with pytest.raises(UsageError, match="FakeQuantLinear"):
        attach(model, ["1.up"], Grid(4, 8))


def test_attach_names_the_layer_that_does_not_fit() -> None:
    model = tiny_model()
    with pytest.raises(ShapeError, match=r"1\.down: group size 32 does not divide 24"):
        attach(model, ["1.up", "1.down"], Grid(4, 32))
    assert quantized_layers(model) == {}


def test_diverged_scales_and_weights_are_reported() -> None:
    layer = FakeQuantLinear.from_linear(nn.Linear(32, 8), Grid(4, 8))
    layer.log_scale.data[0, 0] = math.nan
    with pytest.raises(NumericsError, match="scale"):
        layer.codes_and_scales()
    with pytest.raises(NumericsError, match="fp16"):
        FakeQuantLinear.from_linear(
            nn.utils.skip_init(nn.Linear, 8, 8).apply(_fill_nan), Grid(4, 8)
        )


def _fill_nan(module: nn.Module) -> None:
    for parameter in module.parameters():
        nn.init.constant_(parameter, math.nan)


# --- real group sizes, 16-bit output, chunks, the compiler --------------------------------------

REAL = [Grid(bits, size) for bits in (2, 3, 4, 8) for size in (32, 64, 128, -1)]


def real_problem(grid: Grid, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Weights (24, 256), log-scales and an upstream gradient; about a third is clipped."""
    rng = torch.Generator().manual_seed(5)
    weight = torch.randn(24, 256, generator=rng, dtype=torch.float64)
    scale = torch.rand(24, grid.groups(256), generator=rng, dtype=torch.float64) + 0.5
    upstream = torch.randn(24, 256, generator=rng, dtype=torch.float64)
    logs = (scale / grid.qmax).log()
    return weight.to(dtype), logs.to(torch.promote_types(dtype, torch.float32)), upstream.to(dtype)


def outcome(
    grid: Grid, dtype: torch.dtype, kernels: arithmetic.Arithmetic = arithmetic.EAGER
) -> tuple[Tensor, Tensor, Tensor]:
    """Value and both gradients, in `dtype` throughout but for the scales."""
    weight, logs, upstream = real_problem(grid, dtype)
    inputs = weight.requires_grad_(), logs.requires_grad_()
    value = fake_quant(*inputs, grid, out_dtype=dtype, kernels=kernels)
    by_weight, by_scale = torch.autograd.grad(value, inputs, upstream)
    return value, by_weight, by_scale


@pytest.mark.parametrize("grid", REAL, ids=str)
def test_codes_and_gradients_at_every_width_and_group_size(grid: Grid) -> None:
    weight, logs, upstream = real_problem(grid, torch.float64)
    scales = stored(logs, grid)
    codes = quantize(weight, scales, grid)
    assert (codes.min(), codes.max()) == (grid.qmin, grid.qmax)
    assert torch.equal(
        fake_quant(weight.float(), logs.float(), grid), dequantize(codes, scales, grid)
    )
    inputs = weight.requires_grad_(), logs.requires_grad_()
    wide = detach_trick(weight, logs, grid)
    expected = torch.autograd.grad(wide, inputs, upstream)

    value, by_weight, by_scale = outcome(grid, torch.float64)

    # as in test_gradients_equal_autograd_of_the_detach_trick; sums of up to 256 terms of both
    # signs, so that the oracle's 2^-11 is one of the largest term (at most qmax/2 a weight)
    torch.testing.assert_close(value, wide, rtol=1e-14, atol=0)
    torch.testing.assert_close(by_weight, expected[0], rtol=1e-15, atol=0)
    torch.testing.assert_close(by_scale, expected[1], rtol=2**-11, atol=2**-11)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_output_is_the_exact_value_rounded_once(dtype: torch.dtype) -> None:
    for grid in REAL:
        weight, logs, _ = real_problem(grid, torch.bfloat16)
        value = fake_quant(weight, logs, grid, out_dtype=dtype)
        assert value.dtype == dtype
        assert torch.equal(value, fake_quant(weight, logs, grid).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_weights_in_chunks_compute_the_same(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = outcome(Grid(4, 32), dtype)
    sizes: list[int] = []
    real = arithmetic._quantize
    monkeypatch.setattr(arithmetic, "CHUNK", 5 * 256)
    monkeypatch.setattr(arithmetic, "_quantize", lambda w, *a: sizes.append(len(w)) or real(w, *a))
    for one, other in zip(whole, outcome(Grid(4, 32), dtype), strict=True):
        assert torch.equal(one, other)
    assert sizes == [5, 5, 5, 5, 4]


@pytest.fixture
def _compiler() -> Iterator[None]:
    with torch._dynamo.config.patch(disable=False):  # other tests switch it off
        yield


@pytest.mark.usefixtures("_compiler")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_kernels_give_the_codes_of_eager_to_the_bit(dtype: torch.dtype) -> None:
    for grid in (Grid(4, 32), Grid(3, 128), Grid(8, -1)):
        eager, made = outcome(grid, dtype), outcome(grid, dtype, of_device.compiled())
        assert torch.equal(made[0], eager[0])
        assert torch.equal(made[1], eager[1])
        # fp32 sums of up to 256 terms below qmax in another order
        torch.testing.assert_close(made[2], eager[2], rtol=1e-5, atol=1e-5 * grid.qmax)


@pytest.mark.usefixtures("_compiler")
def test_a_model_compiled_around_the_layers_finds_one_operator() -> None:
    model = nn.Sequential(nn.Linear(64, 32), nn.SiLU(), nn.Linear(32, 8))
    attach(model, ["0", "2"], Grid(4, 32))
    for layer in quantized_layers(model).values():
        layer.gradient_factor = 0.5
    x = torch.randn(3, 64)
    found = []
    for run in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        loss = run(x).square().sum()
        found.append((loss, *torch.autograd.grad(loss, list(model.parameters()))))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


@pytest.mark.usefixtures("_compiler")
def test_compiled_layers_of_many_shapes_are_all_compiled() -> None:
    sizes = [(8 * n, 16 * n) for n in range(1, 4)]
    model = nn.Sequential(*(nn.Linear(i, o) for o, i in sizes))
    attach(model, map(str, range(len(sizes))), Grid(4, 16))
    compile_layers(model, torch.device("cpu"))
    for layer in quantized_layers(model).values():
        x = torch.randn(2, layer.in_features)
        codes, scales = layer.codes_and_scales()
        weight = dequantize(codes, scales, layer.grid)
        with torch._dynamo.config.patch(recompile_limit=1):  # dynamo's own: 8
            result = layer(x)
            result.sum().backward()
        assert torch.equal(result, F.linear(x, weight, layer.bias))
        assert layer.log_scale.grad is not None


def test_a_compiler_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    attach(model, ["1.up"], Grid(4, 8))
    with (
        torch._dynamo.config.patch(disable=True),
        pytest.raises(PrerequisiteError, match="switched off"),
    ):
        compile_layers(model, torch.device("cpu"))

    def missing(*arguments: object) -> Tensor:
        raise RuntimeError("no compiler")

    broken = arithmetic.Kernels(missing, missing)  # type: ignore[arg-type]
    monkeypatch.setattr(of_device, "compiled", lambda: broken)
    with (
        torch._dynamo.config.patch(disable=False),
        pytest.raises(PrerequisiteError, match="no compiler"),
    ):
        compile_layers(model, torch.device("cpu"))
    assert quantized_layers(model)["1.up"].kernels is arithmetic.EAGER


def test_given_scales_are_those_a_layer_starts_from() -> None:
    model, grid = tiny_model(), Grid(4, 8)
    scales = torch.full((24, 4), 0.125)
    layers = attach(model, ["1.up", "1.down"], grid, {"1.up": scales})
    assert torch.equal(layers["1.up"].codes_and_scales()[1], scales)
    down = search_scales(layers["1.down"].weight, grid, ratios=LSQ_RATIOS)
    assert torch.equal(layers["1.down"].codes_and_scales()[1], down)
