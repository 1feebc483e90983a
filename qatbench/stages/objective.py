"""One optimizer step's loss: L = CE + beta * KD + omega * RCKA over all of its micro-batches.

Every term is normalised over the whole step, not over a micro-batch: CE by the supervised tokens,
the gated KD by the sum of its gates, RCKA by the images. The teacher runs first, so that these
denominators are known before the student's first backward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from qatbench.grace.losses import (
    MIN_CKA_TOKENS,
    cross_entropy_sum,
    gated_decoupled_kd_sums,
    plain_kd_sum,
    relational_cka,
    teacher_gate,
)
from qatbench.vlm.batch import backbone
from qatbench.vlm.training import MicroBatch

PENULTIMATE = -2


@dataclass(frozen=True)
class Distillation:
    """Which distillation terms are on, and their constants."""

    kl: Literal["none", "plain", "decoupled"] = "decoupled"
    gate: bool = True
    rcka: bool = True
    temperature: float = 2.0
    target_weight: float = 1.0
    nontarget_weight: float = 4.0


@dataclass(frozen=True)
class Seen:
    """What a forward pass leaves behind: logits (N, V) and each image's visual tokens (n, d)."""

    logits: Tensor
    images: list[Tensor]


@dataclass
class StepLoss:
    """The terms of one step, unweighted, in nats (RCKA: a pure number in [0, 1])."""

    ce: float = 0.0
    kd: float | None = None
    rcka: float | None = None
    gate: float | None = None
    tokens: int = 0
    images: int = 0


def look(model: Any, batch: MicroBatch, *, images: bool) -> Seen:
    """Run a model on a micro-batch; the head is applied at supervised positions only."""
    out = backbone(model)(**batch.inputs, use_cache=False, output_hidden_states=images)
    hidden = out.last_hidden_state
    flat = hidden.reshape(-1, hidden.shape[-1])
    logits = model.lm_head(flat[batch.where])
    if not images:
        return Seen(logits, [])
    inner = out.hidden_states[PENULTIMATE]
    inner = inner.reshape(-1, inner.shape[-1])
    return Seen(logits, [inner[where] for where in batch.images])


def accumulate(
    student: Any,
    teacher: Any | None,
    batches: Sequence[MicroBatch],
    distillation: Distillation,
    beta: float,
    omega: float,
    autocast: Any,
) -> StepLoss:
    """Forward and backward over a step's micro-batches; gradients are left in the student.

    Args:
        student: model with trainable parameters.
        teacher: frozen model, None without distillation.
        batches: micro-batches of this step.
        distillation: terms and constants.
        beta: weight of the distillation term.
        omega: weight of RCKA.
        autocast: context manager factory for mixed precision.
    """
    see_images = teacher is not None and distillation.rcka and any(b.images for b in batches)
    taught = _teach(teacher, batches, see_images, autocast)
    total = StepLoss(tokens=sum(len(b.target) for b in batches))
    gates = _gate_sum(taught, distillation)
    n_images = sum(len(w) >= MIN_CKA_TOKENS for b in batches for w in b.images)
    for batch, known in zip(batches, taught, strict=True):
        with autocast():
            seen = look(student, batch, images=see_images)
        loss = cross_entropy_sum(seen.logits, batch.target) / total.tokens
        total.ce += loss.item()
        if known is not None and distillation.kl != "none":
            kd = _distil(seen, known, batch, distillation) / gates
            total.kd = (total.kd or 0.0) + kd.item()
            loss = loss + beta * kd
        if see_images and known is not None:
            for own, theirs in zip(seen.images, known.images, strict=True):
                relation = relational_cka(own, theirs)
                if relation is not None:
                    total.images += 1
                    total.rcka = (total.rcka or 0.0) + relation.item() / n_images
                    loss = loss + omega * relation / n_images
        loss.backward()  # type: ignore[no-untyped-call]
    if distillation.kl == "decoupled" and gates and distillation.gate:
        total.gate = gates / total.tokens
    return total


def _teach(
    teacher: Any | None, batches: Sequence[MicroBatch], images: bool, autocast: Any
) -> list[Seen | None]:
    if teacher is None:
        return [None] * len(batches)
    with torch.no_grad(), autocast():
        return [look(teacher, batch, images=images) for batch in batches]


def _gate_sum(taught: Sequence[Seen | None], distillation: Distillation) -> float:
    """What the distillation sum is divided by: the gates, or the tokens where none are used."""
    known = [seen for seen in taught if seen is not None]
    if distillation.kl == "decoupled" and distillation.gate:
        return sum(teacher_gate(seen.logits).sum().item() for seen in known)
    return float(sum(len(seen.logits) for seen in known))


def _distil(seen: Seen, known: Seen, batch: MicroBatch, distillation: Distillation) -> Tensor:
    if distillation.kl == "plain":
        return plain_kd_sum(seen.logits, known.logits, temperature=distillation.temperature)
    return gated_decoupled_kd_sums(
        seen.logits,
        known.logits,
        batch.target,
        temperature=distillation.temperature,
        target_weight=distillation.target_weight,
        nontarget_weight=distillation.nontarget_weight,
        gate=distillation.gate,
    ).numerator
