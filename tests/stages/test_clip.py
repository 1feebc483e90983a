"""Gradients are clipped to one norm over all of them, as torch does it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qatbench.stages.distributed import ALONE


def parameters(dtype: torch.dtype) -> list[nn.Parameter]:
    rng = torch.Generator().manual_seed(0)
    made = [nn.Parameter(torch.zeros(n, 5, dtype=t)) for n, t in ((3, dtype), (7, torch.float32))]
    for parameter in made:
        parameter.grad = torch.randn(parameter.shape, generator=rng).to(parameter.dtype)
    return [*made, nn.Parameter(torch.zeros(2))]  # the last one never had a gradient


@pytest.mark.parametrize("limit", [0.5, 100.0])
def test_as_torch_clips(limit: float) -> None:
    ours, theirs = parameters(torch.float32), parameters(torch.float32)
    norm = ALONE.clip(ours, limit)
    assert norm == nn.utils.clip_grad_norm_(theirs, limit)
    for one, other in zip(ours[:2], theirs[:2], strict=True):
        assert torch.equal(one.grad, other.grad)  # type: ignore[arg-type]


def test_16_bit_gradients_share_the_norm_and_are_rounded_once_more() -> None:
    ours, theirs = parameters(torch.bfloat16), parameters(torch.bfloat16)
    norm = ALONE.clip(ours, 0.5)
    assert norm == nn.utils.clip_grad_norm_(theirs, 0.5)
    assert ours[0].grad.dtype == torch.bfloat16  # type: ignore[union-attr]
    assert torch.equal(ours[1].grad, theirs[1].grad)  # type: ignore[arg-type]
    torch.testing.assert_close(ours[0].grad, theirs[0].grad, rtol=2**-7, atol=0)
