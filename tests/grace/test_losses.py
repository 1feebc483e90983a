"""The logit losses against fp64 formulas in plain probabilities, identities and autograd."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qatbench.errors import ShapeError, UsageError
from qatbench.grace import losses

N, V = 30, 50
# fp32 logarithms near log V = 4 carry 2e-7 each, and d multiplies them by up to 4 * T**2 = 16.
close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5, check_dtype=False)
SCALES = [0.1, 3.0, 40.0, 200.0]  # 40 and 200: so sure that 1 - p is 0 in fp32


def batch(scale: float = 3.0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Student, teacher, target: a third the teacher's word, a third the student's."""
    rng = torch.Generator().manual_seed(0)
    student, teacher = ((scale * torch.randn(N, V, generator=rng)).to(dtype) for _ in range(2))
    target = torch.randint(V, (N,), generator=rng)
    target[::3], target[1::3] = teacher[::3].argmax(-1), student[1::3].argmax(-1)
    return student, teacher, target


def probabilities(logits: Tensor, temperature: float) -> Tensor:
    odds = ((logits.double() - logits.double().amax(-1, keepdim=True)) / temperature).exp()
    return odds / odds.sum(-1, keepdim=True)


def oracle_rows(student: Tensor, teacher: Tensor, target: Tensor, T=2.0, a=1.0, b=4.0) -> Tensor:
    """d_i, from probabilities in fp64; the rest mass is a sum, never 1 - p."""
    others = F.one_hot(target, student.shape[1]) == 0
    p, q = probabilities(teacher, T), probabilities(student, T)
    p_rest, q_rest = (x[others].view(len(target), -1) for x in (p, q))
    tckd = 0.0
    for x, y in ((p[~others], q[~others]), (p_rest.sum(1), q_rest.sum(1))):
        tckd = tckd + x * (x.log() - y.log())
    p_hat, q_hat = (x / x.sum(1, keepdim=True) for x in (p_rest, q_rest))
    return (a * tckd + b * (p_hat * (p_hat.log() - q_hat.log())).sum(1)) * T**2


def oracle_gate(teacher: Tensor) -> Tensor:
    p = probabilities(teacher, 1.0)
    return (torch.special.xlogy(p, p).sum(1) / math.log(p.shape[1])).exp()


def oracle(student: Tensor, teacher: Tensor, target: Tensor, **settings: float) -> Tensor:
    gate = oracle_gate(teacher)
    return (gate * oracle_rows(student, teacher, target, **settings)).sum() / gate.sum()


def oracle_plain(student: Tensor, teacher: Tensor, target: Tensor, T: float = 2.0) -> Tensor:
    p, q = probabilities(teacher, T), probabilities(student, T)
    return (p * (p.log() - q.log())).sum(1).mean() * T**2


def oracle_cross_entropy(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(student.double(), target)


def plain(student: Tensor, teacher: Tensor, target: Tensor, **options: float) -> Tensor:
    return losses.plain_kd(student, teacher, **options)


def entropy(student: Tensor, teacher: Tensor, target: Tensor, **options: int) -> Tensor:
    return losses.cross_entropy(student, target, **options)


PAIRS = [
    pytest.param(losses.gated_decoupled_kd, oracle, id="gated"),
    pytest.param(plain, oracle_plain, id="plain"),
    pytest.param(entropy, oracle_cross_entropy, id="entropy"),
]
each_loss = pytest.mark.parametrize(("loss", "formula"), PAIRS)


def grad(loss: Callable[..., Tensor], student: Tensor, *rest: Tensor, **options: float) -> Tensor:
    leaf = student.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(leaf, *rest, **options), leaf)
    return gradient


@each_loss
@pytest.mark.parametrize("scale", SCALES)
def test_value_is_the_fp64_formula(loss, formula, scale):
    close(loss(*batch(scale)).double(), formula(*batch(scale)))


@pytest.mark.parametrize("settings", [(1.0, 1.0, 4.0), (2.0, 1.0, 0.0), (3.0, 0.0, 1.0)])
def test_each_setting_enters_as_in_the_formula(settings):
    T, a, b = settings

    got = losses.gated_decoupled_kd(
        *batch(), temperature=T, target_weight=a, nontarget_weight=b, chunk=7
    )

    close(got, oracle(*batch(), T=T, a=a, b=b))
    close(plain(*batch(), temperature=T), oracle_plain(*batch(), T=T))


@pytest.mark.parametrize("scale", SCALES)
def test_target_mass_alone_keeps_its_digits_with_a_certain_teacher(scale):
    student, teacher, target = batch(scale)
    got = losses.gated_decoupled_kd_sums(student, teacher, target, nontarget_weight=0.0)
    want = oracle_gate(teacher) * oracle_rows(student, teacher, target, b=0.0)
    close(got.numerator, want.sum())


def test_flat_teacher_is_the_fp64_formula_and_zero_for_a_flat_student():
    student, _, target = batch()
    flat = torch.full((N, V), 7.0)
    close(losses.gated_decoupled_kd(student, flat, target), oracle(student, flat, target))
    # the flat student differs by a constant only; 1e-5: 16 times the last bits of log V
    assert abs(losses.gated_decoupled_kd(flat - 9, flat, target).item()) < 1e-5


@pytest.mark.parametrize("row", range(6))
@pytest.mark.parametrize("scale", [0.1, 3.0, 40.0])
def test_rest_mass_as_weight_makes_it_plain_kl(row, scale):
    student, teacher, target = (part[row : row + 1] for part in batch(scale))
    rest = probabilities(teacher, 2.0)[F.one_hot(target, V) == 0].sum()

    got = losses.gated_decoupled_kd(student, teacher, target, nontarget_weight=rest.item())

    close(got, oracle_plain(student, teacher, target))
    close(got, losses.plain_kd(student, teacher))


def test_gate_of_a_uniform_a_certain_and_a_two_way_teacher():
    certain, coin = torch.zeros(V), torch.full((V,), -100.0)
    certain[3], coin[:2] = 200.0, 0.0
    got = losses.teacher_gate(torch.stack((torch.full((V,), 5.0), certain, coin)), chunk=2)
    close(got, torch.tensor([1 / math.e, 1.0, math.exp(-math.log(2) / math.log(V))]))


@pytest.mark.parametrize("scale", SCALES)
def test_gate_is_taken_at_temperature_one_and_has_no_gradient(scale):
    _, teacher, _ = batch(scale)
    gate = losses.teacher_gate(teacher.requires_grad_(), chunk=7)
    close(gate, oracle_gate(teacher.detach()))
    assert not gate.requires_grad


def test_without_gate_every_position_weighs_the_same():
    student, teacher, target = batch()
    rows = oracle_rows(student, teacher, target)
    got = losses.gated_decoupled_kd_sums(student, teacher, target, gate=False)
    close(got.numerator, rows.sum())
    assert got.gate_sum.item() == N
    close(losses.gated_decoupled_kd(student, teacher, target, gate=False), rows.mean())
    assert abs(rows.mean() - oracle(student, teacher, target)) > 0.01  # so the gate mattered


@each_loss
@pytest.mark.parametrize("scale", SCALES)
def test_gradient_is_that_of_the_unchunked_formula(loss, formula, scale):
    student, *rest = batch(scale)
    want = grad(formula, student.double(), *rest)
    got = grad(loss, student, *rest, chunk=7)
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-6)  # entries reach 10 / N


@each_loss
def test_gradcheck_in_fp64(loss, formula):
    student, teacher, target = (part[:5] for part in batch(2.0, torch.float64))
    fn = partial(loss, chunk=2)
    assert torch.autograd.gradcheck(
        lambda s: fn(s, teacher, target), student.clone().requires_grad_()
    )
    assert fn(student, teacher, target).dtype == torch.float64


@each_loss
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_cost_no_precision_in_the_value(loss, formula, dtype):
    student, *rest = batch(3.0, dtype)
    got = loss(student, *rest)
    assert got.dtype == torch.float32
    close(got, formula(student, *rest))  # fp32's tolerance, not bf16's: only the input is rounded
    gradient = grad(loss, student, *rest)
    assert gradient.dtype == dtype
    want = grad(formula, student.double(), *rest)
    # half a last place of bf16 (2**-9) or, below 6e-5, of a subnormal fp16 (2**-25)
    torch.testing.assert_close(gradient.double(), want, rtol=2**-8, atol=1e-7)


@each_loss
@pytest.mark.parametrize("chunk", [1, 7, N, 10 * N])
def test_chunk_size_changes_nothing(loss, formula, chunk):
    # 1e-6: only the order of a sum over N fp32 numbers may differ
    whole, cut = loss(*batch()), loss(*batch(), chunk=chunk)
    torch.testing.assert_close(cut, whole, rtol=1e-6, atol=0)
    gradients = [grad(loss, *batch(), chunk=size) for size in (N, chunk)]
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-6, atol=1e-9)


@each_loss
def test_gradient_goes_to_the_student_only(loss, formula):
    student, teacher, target = batch()
    teacher.requires_grad_()
    assert not loss(student, teacher, target).requires_grad
    loss(student.requires_grad_(), teacher, target).backward()
    assert teacher.grad is None
    assert student.grad.abs().max() > 1e-3


@pytest.mark.parametrize("loss", [losses.gated_decoupled_kd, plain])
def test_swapping_student_and_teacher_gives_another_loss(loss):
    student, teacher, target = batch(1.0)
    assert abs(loss(student, teacher, target) - loss(teacher, 2 * student, target)) > 0.05
    # mode covering: the teacher's second word, missing in the student, costs log 2 and more
    two, one = torch.zeros(1, V), torch.zeros(1, V)
    two[0, :2], one[0, 0] = 100.0, 100.0
    label = torch.tensor([5])
    assert loss(one, two, label) > 10 * loss(two, one, label)


def test_sums_over_micro_batches_are_the_whole_batch():
    student, teacher, target = batch()
    parts = [slice(0, 2), slice(2, 17), slice(17, N)]
    leaf = student.clone().requires_grad_()
    sums = [losses.gated_decoupled_kd_sums(leaf[p], teacher[p], target[p], chunk=4) for p in parts]
    gates = sum(s.gate_sum for s in sums)
    for part in sums:
        (part.numerator / gates).backward()

    whole = losses.gated_decoupled_kd(student, teacher, target)
    close(sum(s.numerator for s in sums) / gates, whole)
    close(leaf.grad, grad(losses.gated_decoupled_kd, student, teacher, target), atol=1e-8)
    means = [losses.gated_decoupled_kd(student[p], teacher[p], target[p]) for p in parts]
    assert abs(sum(means) / len(means) - whole) > 0.01
    assert not gates.requires_grad
    close(gates / N, losses.teacher_gate(teacher).mean())


def test_plain_and_entropy_sums_are_the_mean_times_n():
    student, teacher, target = batch()
    close(losses.plain_kd_sum(student, teacher), N * oracle_plain(student, teacher, target))
    total = losses.cross_entropy_sum(student, target)
    close(total, N * oracle_cross_entropy(student, teacher, target))


@each_loss
@pytest.mark.parametrize("shape", [(0, V), (N, 1), (N, V, 1), (V,)])
def test_logits_that_are_empty_or_not_a_matrix_raise(loss, formula, shape):
    with pytest.raises(ShapeError, match="need"):
        loss(torch.zeros(shape), torch.zeros(shape), torch.zeros(shape[0], dtype=torch.int64))


@pytest.mark.parametrize("loss", [losses.gated_decoupled_kd, plain])
@pytest.mark.parametrize("shape", [(N, V + 1), (N - 1, V), (1, V)])
def test_unlike_logits_raise_and_are_not_broadcast(loss, shape):
    student, _, target = batch()
    with pytest.raises(ShapeError, match="teacher"):
        loss(student, torch.zeros(shape), target)


@pytest.mark.parametrize("loss", [losses.gated_decoupled_kd, entropy])
@pytest.mark.parametrize("bad", [-100, -1, V])
def test_target_outside_the_vocabulary_raises(loss, bad):
    student, teacher, target = batch()
    target[-1] = bad
    with pytest.raises(ShapeError, match=str(bad)):
        loss(student, teacher, target)
    with pytest.raises(ShapeError, match="need"):
        loss(student, teacher, target[:-1])
    with pytest.raises(ShapeError, match="need"):
        loss(student, teacher, target.float())


@each_loss
def test_settings_that_cannot_be_raise(loss, formula):
    with pytest.raises(UsageError, match="chunk 0"):
        loss(*batch(), chunk=0)
    if loss is not entropy:
        for bad in (0.0, -1.0, math.inf, math.nan):
            with pytest.raises(UsageError, match="temperature"):
                loss(*batch(), temperature=bad)
