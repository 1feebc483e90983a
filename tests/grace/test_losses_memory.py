"""On 16-bit logits no loss makes or keeps a wide tensor of more than one chunk."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from qatbench.grace import cross_entropy, gated_decoupled_kd, plain_kd, teacher_gate

N, V, CHUNK = 30, 50, 4


def is_wide(x: object) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point() and x.dtype.itemsize > 2


class WideTensors(TorchDispatchMode):
    """Records the size of every floating tensor that is made with more than 16 bits."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.sizes += [x.numel() for x in torch.utils._pytree.tree_leaves(out) if is_wide(x)]
        return out


@contextmanager
def kept_for_backward() -> Iterator[list[int]]:
    kept: list[int] = []

    def pack(x: Tensor) -> Tensor:
        kept.append(x.numel() * is_wide(x))
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        yield kept


def logits(seed: int) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(N, V, generator=rng).bfloat16()


@pytest.mark.parametrize(
    "loss",
    [
        pytest.param(lambda s, t, y: gated_decoupled_kd(s, t, y, chunk=CHUNK), id="gated"),
        pytest.param(lambda s, t, y: plain_kd(s, t, chunk=CHUNK), id="plain"),
        pytest.param(lambda s, t, y: cross_entropy(s, y, chunk=CHUNK), id="entropy"),
    ],
)
def test_losses_stay_within_a_chunk_forward_and_backward(loss):
    student, teacher, target = logits(0).requires_grad_(), logits(1), torch.arange(N)
    with WideTensors() as made, kept_for_backward() as kept:
        value = loss(student, teacher, target)
    forward = len(made.sizes)
    with made:
        value.backward()
    assert max(made.sizes[:forward]) == max(made.sizes[forward:]) == CHUNK * V
    assert kept  # the logits themselves in bf16; in fp32 the N gates and two scalars of a mean
    assert sum(kept) <= N + 2


def test_gate_stays_within_a_chunk():
    teacher = logits(1)
    with WideTensors() as made:
        teacher_gate(teacher, chunk=CHUNK)
    assert max(made.sizes) == CHUNK * V
