"""One optimizer step's loss: L = CE + beta * KD + omega * RCKA over all of its micro-batches.

Every term is normalised over the whole step, not over a micro-batch: CE by the supervised tokens,
the gated KD by the sum of its gates, RCKA by the images. The teacher runs first, so that these
denominators are known before the student's first backward pass. With several processes they are
sums over all of them, so that the gradients of all processes add up to those of one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from qatbench.grace.losses import (
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
    """Which distillation terms are on, at which tokens, and their constants."""

    kl: Literal["none", "plain", "decoupled"] = "decoupled"
    gate: bool = True
    rcka: bool = True
    tokens: Literal["supervised", "all"] = "supervised"  # all: the prompt's text is distilled too
    temperature: float = 2.0
    target_weight: float = 1.0
    nontarget_weight: float = 4.0


Reduce = Callable[[Sequence[float]], list[float]]
"""Numbers of this process -> their sums over all processes."""


@dataclass(frozen=True)
class Seen:
    """What a forward pass leaves behind.

    Shapes: logits (N, V) at the positions that are distilled; images: each image's visual tokens
    (n, d).
    """

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


def look(model: Any, batch: MicroBatch, *, images: bool, everywhere: bool = False) -> Seen:
    """Run a model on a micro-batch; the head is applied at supervised positions only.

    With `everywhere` it is applied wherever the next token is text.
    """
    out = backbone(model)(**batch.inputs, use_cache=False, output_hidden_states=images)
    hidden = out.last_hidden_state
    flat = hidden.reshape(-1, hidden.shape[-1])
    logits = model.lm_head(flat[batch.every if everywhere else batch.where])
    if not images:
        return Seen(logits, [])
    inner = out.hidden_states[PENULTIMATE]
    inner = inner.reshape(-1, inner.shape[-1])
    return Seen(logits, [inner[where] for where in batch.images])


def _alone(numbers: Sequence[float]) -> list[float]:
    return list(numbers)


def accumulate(
    student: Any,
    teacher: Any | None,
    batches: Sequence[MicroBatch],
    distillation: Distillation,
    beta: float,
    omega: float,
    autocast: Any,
    reduce: Reduce = _alone,
) -> StepLoss:
    """Forward and backward over a step's micro-batches; gradients are left in the student.

    Args:
        student: model with trainable parameters.
        teacher: frozen model, None without distillation.
        batches: micro-batches of this step, of this process.
        distillation: terms and constants.
        beta: weight of the distillation term.
        omega: weight of RCKA.
        autocast: context manager factory for mixed precision.
        reduce: sums over processes; the losses returned are those of all of them.
    """
    see_images = teacher is not None and distillation.rcka and any(b.images for b in batches)
    taught = _teach(student, teacher, batches, see_images, distillation, autocast)
    tokens, weight, n_images = reduce(
        [
            float(sum(len(b.target) for b in batches)),
            _distilled_weight(taught, distillation),
            float(sum(relational_cka(t, t) is not None for k in taught if k for t in k.images)),
        ]
    )
    everywhere = _everywhere(distillation)
    ce = kd = rcka = 0.0
    related = 0
    for batch, known in zip(batches, taught, strict=True):
        with autocast():
            seen = look(student, batch, images=see_images, everywhere=everywhere)
        loss = cross_entropy_sum(_answers(seen, batch, everywhere), batch.target) / tokens
        ce += loss.item()
        if known is not None and distillation.kl != "none":
            distilled = _distil(seen, known, batch, distillation) / weight
            kd += distilled.item()
            loss = loss + beta * distilled
        for relation in _relations(seen, known) if known is not None else ():
            related += 1
            rcka += relation.item() / n_images
            loss = loss + omega * relation / n_images
        loss.backward()  # type: ignore[no-untyped-call]
    positions = float(sum(len(known.logits) for known in taught if known is not None))
    ce, kd, rcka, looked, positions = reduce([ce, kd, rcka, float(related), positions])
    distils = teacher is not None and distillation.kl != "none"
    gated = distils and distillation.kl == "decoupled" and distillation.gate
    return StepLoss(
        ce=ce,
        kd=kd if distils else None,
        rcka=rcka if looked else None,
        gate=weight / positions if gated else None,
        tokens=int(tokens),
        images=int(looked),
    )


def _answers(seen: Seen, batch: MicroBatch, everywhere: bool) -> Tensor:
    """Logits at the supervised positions."""
    return seen.logits[torch.isin(batch.every, batch.where)] if everywhere else seen.logits


def _relations(seen: Seen, known: Seen) -> list[Tensor]:
    """1 - CKA of each image for which it is defined."""
    found = [relational_cka(o, t) for o, t in zip(seen.images, known.images, strict=True)]
    return [relation for relation in found if relation is not None]


def _everywhere(distillation: Distillation) -> bool:
    return distillation.tokens == "all" and distillation.kl != "none"


def _teach(
    student: Any,
    teacher: Any | None,
    batches: Sequence[MicroBatch],
    images: bool,
    distillation: Distillation,
    autocast: Any,
) -> list[Seen | None]:
    """What the teacher says, on the rows of the vocabulary that the student has too.

    Heads of one tokenizer are padded to different sizes: Qwen2-VL's 2B has 151936 rows, its 7B
    152064. The trainer checks that all of the tokenizer's own tokens lie in both.
    """
    if teacher is None:
        return [None] * len(batches)
    width, everywhere = _rows(student), _everywhere(distillation)
    with torch.no_grad(), autocast():
        told = [look(teacher, batch, images=images, everywhere=everywhere) for batch in batches]
    return [Seen(seen.logits[:, :width], seen.images) for seen in told]


def _rows(model: Any) -> int:
    """Rows of a model's output head."""
    return int(model.get_output_embeddings().weight.shape[0])


def _distilled_weight(taught: Sequence[Seen | None], distillation: Distillation) -> float:
    """What the distillation sum is divided by: the gates, or the tokens where none are used."""
    known = [seen for seen in taught if seen is not None]
    if distillation.kl == "decoupled" and distillation.gate:
        return sum(teacher_gate(seen.logits).sum().item() for seen in known)
    return float(sum(len(seen.logits) for seen in known))


def _distil(seen: Seen, known: Seen, batch: MicroBatch, distillation: Distillation) -> Tensor:
    teacher = known.logits
    student = seen.logits[:, : teacher.shape[-1]]
    if distillation.kl == "plain":
        return plain_kd_sum(student, teacher, temperature=distillation.temperature)
    return gated_decoupled_kd_sums(
        student,
        teacher,
        batch.every_target if _everywhere(distillation) else batch.target,
        temperature=distillation.temperature,
        target_weight=distillation.target_weight,
        nontarget_weight=distillation.nontarget_weight,
        gate=distillation.gate,
    ).numerator
