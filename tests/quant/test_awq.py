"""What AWQ's searches look at: all samples, and the library's own clip objective."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qatbench.quant import awq, backends


@pytest.fixture(scope="module")
def processor() -> Any:
    """The library's class; its methods need no more of an instance than the settings."""
    backends.prepare_import()
    with backends.quiet():
        module = pytest.importorskip("gptqmodel.looper.awq_processor")
    return module.AWQProcessor


def searcher(processor: Any, bits: int, group_size: int, sym: bool) -> Any:
    instance = processor.__new__(processor)
    instance.qcfg = SimpleNamespace(bits=bits, group_size=group_size, sym=sym)
    return instance


@pytest.mark.parametrize("sym", [False, True])
@pytest.mark.parametrize(("bits", "group_size"), [(4, 64), (3, 32), (2, 64), (4, -1)])
def test_clip_bounds_are_those_of_the_librarys_search(
    processor: Any, bits: int, group_size: int, sym: bool
) -> None:
    generator = torch.Generator().manual_seed(bits)
    weight = torch.randn(64, 128, generator=generator) ** 3
    rows = torch.randn(2, 200, 128, generator=generator) * torch.rand(128, generator=generator)
    search = searcher(processor, bits, group_size, sym)
    mine = awq.clip_bounds(search, weight.clone(), rows)
    theirs = search._compute_best_clip(weight.clone(), rows.clone(), n_sample_token=400)
    assert mine.shape == theirs.shape
    assert torch.equal(mine, theirs)
    assert (mine < weight.reshape(64, mine.shape[1], -1).abs().amax(-1, keepdim=True)).any()


def test_clip_bounds_take_any_number_of_outputs(processor: Any) -> None:
    weight, rows = torch.randn(37, 64), torch.randn(50, 64)
    bounds = awq.clip_bounds(searcher(processor, 4, 32, False), weight, rows)
    assert bounds.shape == (37, 2, 1)


def test_every_batch_has_its_say_except_before_attention(processor: Any) -> None:
    batches = [torch.full((1, 30 + i, 8), float(i)) for i in range(5)]
    policy = awq.token_policy("self_attn.v_proj")
    assert policy is not None
    assert awq.token_policy("self_attn.q_proj") is None
    rows, seen = processor._pack_token_rows(batches, max_tokens=policy["max_tokens"])
    assert seen == rows.shape[1] == sum(30 + i for i in range(5))
    few, _ = processor._pack_token_rows(batches, max_tokens=20)
    assert set(few[0, :, 0].tolist()) == {0.0, 1.0, 2.0, 3.0, 4.0}
