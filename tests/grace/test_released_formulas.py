"""The formulas of GRACE's released code, written down again from its description, against ours.

They agree where theirs are exact, and the tests show where theirs lose what ours keep. Theirs: the
rest mass is 1 - p, both sides clamped at 1e-8; the gate exp(-H / log V) at temperature 1; CKA on
double-centred Grams of rows scaled to length 1; beta moves by eta (EMA - tau) and is clipped.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qatbench.grace.controller import BetaController
from qatbench.grace.losses import gated_decoupled_kd, relational_cka, teacher_gate
from qatbench.quant.grid import LSQ_RATIOS, Grid, search_scales

CLAMP = 1e-8


def released_gdkd(student: Tensor, teacher: Tensor, target: Tensor, dtype: torch.dtype) -> Tensor:
    student, teacher = student.to(dtype), teacher.to(dtype)
    p, q = (logits.div(2).softmax(-1) for logits in (teacher, student))
    label = F.one_hot(target, p.shape[-1]).to(dtype)

    def pair(probability: Tensor) -> Tensor:
        own = (probability * label).sum(-1)
        return torch.stack((own, 1 - own), -1).clamp_min(CLAMP)

    def rest(logits: Tensor) -> Tensor:
        return (logits / 2 - 1000.0 * label).log_softmax(-1)

    tckd = (pair(p) * (pair(p).log() - pair(q).log())).sum(-1)
    nckd = (rest(teacher).exp() * (rest(teacher) - rest(student))).sum(-1)
    first = teacher.softmax(-1)
    entropy = -(first * first.clamp_min(CLAMP).log()).sum(-1)
    gate = (-entropy / math.log(p.shape[-1])).exp()
    return (gate * (tckd + 4 * nckd) * 4).sum() / gate.sum()


def logits(scale: float) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    student, teacher = (scale * torch.randn(32, 40, generator=generator) for _ in range(2))
    return student, teacher, torch.randint(40, (32,), generator=generator)


@pytest.mark.parametrize("scale", [0.5, 2.0])
def test_distillation_is_the_released_one_where_nothing_is_clamped(scale: float) -> None:
    student, teacher, target = logits(scale)
    theirs = released_gdkd(student, teacher, target, torch.float64)
    ours = gated_decoupled_kd(student, teacher, target)
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-6)  # fp32 against fp64


def test_where_the_student_is_surely_wrong_theirs_has_no_gradient_and_ours_has() -> None:
    # The teacher is certain of the target; the student gives it less than the clamp.
    teacher, target = torch.tensor([[60.0, 0.0, 1.0]]), torch.tensor([0])
    student = torch.tensor([[0.0, 50.0, 51.0]], requires_grad=True)
    theirs = released_gdkd(student, teacher, target, torch.float32)
    (lost,) = torch.autograd.grad(theirs, student)
    (kept,) = torch.autograd.grad(gated_decoupled_kd(student, teacher, target), student)
    assert abs(lost[0, 0]) < 1e-15
    assert kept[0, 0] == pytest.approx(-2.0, rel=1e-5)  # T^2 (q - p) / T at q = 0, p = 1


def test_gate_is_the_released_one() -> None:
    _, teacher, _ = logits(2.0)
    first = teacher.double().softmax(-1)
    entropy = -(first * first.clamp_min(CLAMP).log()).sum(-1)
    theirs = (-entropy / math.log(40)).exp()
    torch.testing.assert_close(teacher_gate(teacher).double(), theirs, rtol=1e-6, atol=0)


def test_relations_are_the_released_ones() -> None:
    generator = torch.Generator().manual_seed(2)
    student, teacher = (torch.randn(36, d, generator=generator).double() for d in (24, 40))

    def gram(tokens: Tensor) -> Tensor:
        unit = F.normalize(tokens, dim=-1)
        product = unit @ unit.T
        centre = torch.eye(len(product)).double() - 1 / len(product)
        return centre @ product @ centre

    one, other = gram(student), gram(teacher)
    theirs = 1 - (one * other).sum() / ((one * one).sum() * (other * other).sum()).sqrt()
    ours = relational_cka(student, teacher)
    assert ours is not None
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_beta_moves_as_released_but_starts_at_the_first_loss() -> None:
    losses = [2.0, 3.5, 3.0, 5.0]
    ours = BetaController(3.0, 0.003, 0.5, 0.1, 1.0, 0.99)
    average, beta = losses[0], 0.5
    for loss in losses:
        average = 0.99 * average + 0.01 * loss
        beta = min(max(beta + 0.003 * (average - 3.0), 0.1), 1.0)
        assert ours.update(loss) == pytest.approx(beta, abs=1e-12)


def test_scales_start_at_the_best_of_twenty_ratios() -> None:
    weight = torch.randn(8, 128, generator=torch.Generator().manual_seed(3))
    ratios = torch.linspace(0.3, 1.2, 20)
    top = weight.abs().amax(-1) / 7

    def error(scale: Tensor) -> Tensor:
        codes = (weight / scale[:, None]).round().clamp(-8, 7)
        return ((codes * scale[:, None] - weight) ** 2).sum(-1)

    theirs = torch.stack([error(ratio * top) for ratio in ratios]).amin(0)
    ours = search_scales(weight, Grid(4, 128), ratios=LSQ_RATIOS, name="w")[:, 0]
    # Ours also tries the ratio 1, and rounds a scale to what a checkpoint stores.
    assert (error(ours) <= theirs * 1.01).all()
    assert len([r for r in LSQ_RATIOS if r != 1]) == 20
