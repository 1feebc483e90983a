"""Relational CKA against the textbook H K H in fp64, its invariances and its undefined cases."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from qatbench.errors import ShapeError
from qatbench.grace import relational_cka

# fp32 rounds each of n * n products to 6e-8; CKA is their mean, so 1e-5 leaves two digits.
close = partial(torch.testing.assert_close, rtol=0, atol=1e-5, check_dtype=False)


def tokens(n: int, d: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    common = torch.randn(d, generator=rng)  # real visual tokens share a direction
    return (torch.randn(n, d, generator=rng) + common).to(dtype)


def oracle(student: Tensor, teacher: Tensor) -> Tensor:
    n = len(student)
    H = torch.eye(n, dtype=torch.float64) - 1 / n
    grams = []
    for x in (student.double(), teacher.double()):
        x = x / x.square().sum(1, keepdim=True).sqrt()
        grams.append(H @ x @ x.T @ H)
    (ss, st), (_, tt) = [[torch.trace(a @ b) for b in grams] for a in grams]
    return 1 - st / (ss * tt).sqrt()


@pytest.mark.parametrize(("n", "d_s", "d_t"), [(4, 3, 8), (49, 16, 24), (100, 8, 8)])
def test_value_is_the_fp64_formula(n, d_s, d_t):
    student, teacher = tokens(n, d_s, 0), tokens(n, d_t, 1)
    want = oracle(student, teacher)
    assert 0.05 < want < 0.99
    close(relational_cka(student, teacher).double(), want)
    close(relational_cka(teacher, student), relational_cka(student, teacher))


def test_tokens_related_alike_have_loss_zero():
    x = tokens(40, 12, 0)
    rotation = torch.linalg.qr(torch.randn(12, 12, generator=torch.Generator().manual_seed(2)))[0]
    lengths = torch.linspace(0.1, 30, 40)[:, None]
    close(relational_cka(x, x), torch.tensor(0.0))
    close(relational_cka(-3 * x @ rotation, x), torch.tensor(0.0))
    close(relational_cka(lengths * x @ rotation, x), torch.tensor(0.0))
    assert relational_cka(x.roll(1, 0), x) > 0.1  # the same tokens at other places are not alike


@pytest.mark.parametrize("n", range(4))
def test_fewer_than_four_tokens_are_undefined(n):
    assert relational_cka(tokens(n, 6, 0), tokens(n, 6, 1)) is None


@pytest.mark.parametrize("noise", [0.0, 1e-6])
@pytest.mark.parametrize("n", [4, 300])
def test_collapsed_tokens_are_undefined_on_either_side(n, noise):
    x = tokens(n, 16, 0)
    one_way = torch.linspace(1, 9, n)[:, None] * (x[0] + noise * x)
    assert relational_cka(one_way, x) is None
    assert relational_cka(x, one_way) is None


def test_tokens_close_together_but_resolved_still_count():
    x = tokens(64, 16, 0)
    tight = x[0] + 0.01 * x
    close(relational_cka(tight, x).double(), oracle(tight, x), atol=1e-3)  # 0.01 costs two digits


@pytest.mark.parametrize("shapes", [((5, 8), (6, 8)), ((5,), (5,)), ((1, 5, 8), (1, 5, 8))])
def test_token_counts_that_differ_raise(shapes):
    with pytest.raises(ShapeError, match="visual tokens"):
        relational_cka(*map(torch.ones, shapes))


def test_gradient_is_right_and_the_students_alone():
    student, teacher = tokens(6, 4, 0, torch.float64), tokens(6, 5, 1, torch.float64)
    assert torch.autograd.gradcheck(
        lambda x: relational_cka(x, teacher), student.clone().requires_grad_()
    )
    teacher.requires_grad_()
    assert not relational_cka(student, teacher).requires_grad
    relational_cka(student.requires_grad_(), teacher).backward()
    assert teacher.grad is None
    assert student.grad.abs().max() > 1e-3


def test_half_precision_and_autocast_do_not_reach_the_arithmetic():
    student, teacher = tokens(49, 16, 0, torch.bfloat16), tokens(49, 24, 1, torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = relational_cka(student.requires_grad_(), teacher)
    assert got.dtype == torch.float32
    close(got.double(), oracle(student, teacher))  # fp32's tolerance: bf16 would be off by 1e-3
    got.backward()
    assert student.grad.dtype == torch.bfloat16
