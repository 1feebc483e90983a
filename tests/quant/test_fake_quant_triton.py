"""The Triton kernels of fake quantization against the eager arithmetic.

On a GPU as they are; elsewhere in Triton's interpreter, which must be chosen before Triton is
imported: those tests run in a process of their own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_lsq import REAL, outcome, real_problem
from torch import Tensor

from qatbench.quant.fake_quant import fake_quant
from qatbench.quant.grid import Grid

pytest.importorskip("triton", reason="Triton is not installed here")
HERE = torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
runs_here = pytest.mark.skipif(not HERE, reason="needs a GPU or TRITON_INTERPRET=1, see below")


def fused(*arguments: Any) -> Tensor:
    """The kernels, on the device that has them."""
    from qatbench.quant import fake_quant_triton

    weight, logs, *rest = arguments
    result = fake_quant_triton.fused(weight.to(DEVICE), logs.to(DEVICE), *rest)
    return result.cpu()


@pytest.mark.skipif(HERE, reason="the tests run in this process")
def test_in_the_interpreter() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__],
        env=os.environ | {"TRITON_INTERPRET": "1"}, cwd=Path(__file__).parents[2],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout


@runs_here
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_codes_are_those_of_eager_to_the_bit(dtype: torch.dtype) -> None:
    if dtype == torch.bfloat16 and DEVICE == "cpu":
        pytest.skip("Triton's interpreter cuts to bfloat16 where a GPU rounds")
    for grid in (*REAL, Grid(4, 8)):
        eager, made = outcome(grid, dtype), outcome(grid, dtype, fused)
        assert torch.equal(made[0], eager[0]), grid
        assert torch.equal(made[1], eager[1]), grid
        # fp32 sums of up to 256 terms below qmax in another order
        torch.testing.assert_close(made[2], eager[2], rtol=1e-5, atol=1e-5 * grid.qmax)


@runs_here
def test_rows_of_no_power_of_two_and_many_tiles() -> None:
    rng = torch.Generator().manual_seed(1)
    for width, group in ((5632, -1), (2048, 8), (4 * 344, 344)):
        grid = Grid(4, group)
        weight = torch.randn(12, width, generator=rng).requires_grad_()
        logs = torch.rand(12, grid.groups(width), generator=rng).log().requires_grad_()
        up = torch.randn(12, width, generator=rng)
        found = [
            (value := fake_quant(weight, logs, grid, kernels=kernels),
             *torch.autograd.grad(value, (weight, logs), up))
            for kernels in (None, fused)
        ]  # fmt: skip
        assert torch.equal(found[0][0], found[1][0])
        assert torch.equal(found[0][1], found[1][1])
        torch.testing.assert_close(found[0][2], found[1][2], rtol=1e-4, atol=1e-2)


@runs_here
def test_ties_scales_out_of_range_and_what_is_not_a_number() -> None:
    grid = Grid(4, 8)
    weight = torch.tensor([-8.5, -2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 7.5]).repeat(6, 1)
    weight[4, 3], weight[5, 0] = float("nan"), float("inf")
    logs = torch.tensor([1.0, 1e-9, 1e9, float("nan"), 1.0, 1.0]).log()[:, None]
    expected = fake_quant(weight, logs, grid)
    torch.testing.assert_close(
        fake_quant(weight, logs, grid, kernels=fused), expected, rtol=0, atol=0, equal_nan=True
    )
    assert expected[0].tolist() == [-8, -2, -2, 0, 0, 2, 2, 7]


@runs_here
def test_the_gradient_factor_and_an_upstream_gradient_that_is_not_contiguous() -> None:
    grid = Grid(3, 64)
    weight, logs, upstream = real_problem(grid)
    inputs = weight.requires_grad_(), logs.requires_grad_()
    found = []
    for kernels in (None, fused):
        value = fake_quant(*inputs, grid, gradient_factor=0.25, kernels=kernels)
        found.append(torch.autograd.grad(value.T, inputs, upstream.T.contiguous()))
    assert torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-5, atol=1e-5)
