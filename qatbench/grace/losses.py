"""The distillation losses of GRACE: gated decoupled KD, relational CKA and their two controls.

Objective per step: `CE + beta * GDKD + omega * RCKA`; each term here is in nats or a pure number.
Logits are wide (V is 1.5e5 for Qwen), so every logit loss walks over `chunk` positions at a time,
forward and backward: on 16-bit logits no fp32 tensor is larger than (chunk, V). Arithmetic is
fp32, fp64 on fp64 input; probabilities stay logarithms: `1 - p` is lost when p is nearly 1.
Gradient flows to the student alone. Departures from the paper are listed in `qatbench.grace`.
Letters: N supervised positions, V the logits' own width, n visual tokens of one image.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from qatbench.errors import ShapeError, UsageError

CHUNK = 1024
MIN_CKA_TOKENS = 4
# Norm of a centred Gram over n. Rounding hidden states to bf16 (2**-9 relative) moves rows of
# length 1 by about 2e-3, which alone makes a Gram of (2e-3)**2 / sqrt(n): about 1e-7 for 576
# tokens. Anything below is the rounding's geometry, not the image's.
DEGENERATE_GRAM = 1e-7


class GatedSums(NamedTuple):
    """The two sums whose ratio is GDKD; add them up over micro-batches before dividing."""

    numerator: Tensor  # (), sum of g_i * d_i in nats; carries the gradient
    gate_sum: Tensor  # (), sum of g_i; never below N / e, carries no gradient


def gated_decoupled_kd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    *,
    temperature: float = 2.0,
    target_weight: float = 1.0,
    nontarget_weight: float = 4.0,
    gate: bool = True,
    chunk: int = CHUNK,
) -> Tensor:
    """Gate-weighted mean of decoupled KD over supervised positions: GRACE's GDKD.

    `sum(g * d) / sum(g)`, d = (target_weight * TCKD + nontarget_weight * NCKD) * temperature**2;
    TCKD is the KL of "the target or not?", NCKD that of "which other token?", teacher || student.

    Shapes: logits (N, V) of any float type, already aligned with target (N,) int64. `gate=False`
    weighs all positions alike (the ablation); `chunk` is the positions held in fp32 at a time.
    Returns: () fp32 (fp64 on fp64 logits), nats, gradient to the student.
    Raises: ShapeError if shapes differ, N = 0, V < 2 or a target lies outside [0, V); UsageError
    on a temperature or chunk <= 0. Source: arXiv:2601.22709; arXiv:2203.08679, Sec. 3.
    """
    numerator, gate_sum = gated_decoupled_kd_sums(
        student_logits,
        teacher_logits,
        target,
        temperature=temperature,
        target_weight=target_weight,
        nontarget_weight=nontarget_weight,
        gate=gate,
        chunk=chunk,
    )
    return numerator / gate_sum


def gated_decoupled_kd_sums(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    *,
    temperature: float = 2.0,
    target_weight: float = 1.0,
    nontarget_weight: float = 4.0,
    gate: bool = True,
    chunk: int = CHUNK,
) -> GatedSums:
    """Return numerator and denominator of `gated_decoupled_kd`; arguments and errors as there.

    A mean of micro-batch means is not the mean of the batch: divide the summed numerators of an
    optimizer step by its summed gates. A trainer that must divide before each backward pass takes
    the denominator from `teacher_gate` beforehand: it needs the teacher only. `gate_sum / N` is
    the mean gate, at no further pass over the teacher.
    """
    _check(chunk, student_logits, teacher_logits, target=target, temperature=temperature)
    uniform = torch.ones(len(target), device=target.device)
    weight = teacher_gate(teacher_logits, chunk) if gate else uniform
    loss = partial(_gated_rows, temperature, target_weight, nontarget_weight)
    numerator = _sum_rows(loss, chunk, student_logits, teacher_logits, target, weight)
    return GatedSums(numerator, weight.to(numerator.dtype).sum())


def teacher_gate(teacher_logits: Tensor, chunk: int = CHUNK) -> Tensor:
    """Confidence gate exp(-H / log V): 1 where the teacher is certain, 1/e where it is flat.

    Shapes: (N, V) logits at temperature 1. Returns: (N,) fp32 (fp64 on fp64), no gradient.
    Raises: ShapeError on an empty batch or V < 2. Source: arXiv:2601.22709.
    """
    _check(chunk, teacher_logits)
    log_width = math.log(teacher_logits.shape[-1])
    with torch.no_grad():
        parts = [
            (-torch.special.entr(logits.softmax(-1)).sum(-1) / log_width).exp()
            for _, (logits,) in _chunks(chunk, teacher_logits)
        ]
    return torch.cat(parts)


def plain_kd(
    student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 2.0, chunk: int = CHUNK
) -> Tensor:
    """Mean over positions of KL(teacher || student) * temperature**2: the undecoupled control.

    Shapes: logits (N, V). Returns: () fp32 (fp64 on fp64), nats, gradient to the student.
    Raises: ShapeError on unlike or empty logits, UsageError on a temperature or chunk <= 0.
    Source: arXiv:1503.02531, Sec. 2 (the temperature**2).
    """
    total = plain_kd_sum(student_logits, teacher_logits, temperature=temperature, chunk=chunk)
    return total / len(student_logits)


def plain_kd_sum(
    student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 2.0, chunk: int = CHUNK
) -> Tensor:
    """`plain_kd` before the division by N, to be summed over micro-batches."""
    _check(chunk, student_logits, teacher_logits, temperature=temperature)
    return _sum_rows(partial(_plain_rows, temperature), chunk, student_logits, teacher_logits)


def cross_entropy(student_logits: Tensor, target: Tensor, *, chunk: int = CHUNK) -> Tensor:
    """Mean over positions of -log q(target).

    Shapes: logits (N, V), target (N,) int64 without ignored entries. Returns: () fp32 (fp64 on
    fp64), nats. Raises: ShapeError on unlike or empty input or a target outside [0, V).
    """
    return cross_entropy_sum(student_logits, target, chunk=chunk) / len(target)


def cross_entropy_sum(student_logits: Tensor, target: Tensor, *, chunk: int = CHUNK) -> Tensor:
    """`cross_entropy` before the division by N, to be summed over micro-batches."""
    _check(chunk, student_logits, target=target)
    return _sum_rows(partial(F.cross_entropy, reduction="none"), chunk, student_logits, target)


def relational_cka(student_tokens: Tensor, teacher_tokens: Tensor) -> Tensor | None:
    """1 - CKA between the visual tokens of one image: 0 when both relate them alike.

    Rows are scaled to length 1; the double-centred Gram H F F^T H is formed as (H F)(H F)^T,
    which cancels less than centring the Gram. Widths may differ.

    Shapes: (n, d_s), (n, d_t). Returns: () fp32 (fp64 on fp64) in [0, 1] up to rounding, gradient
    to the student; None where CKA is undefined: n < 4, or a centred Gram whose Frobenius norm is
    below `DEGENERATE_GRAM` * n (all tokens point the same way).
    Raises: ShapeError if the token counts differ. Source: arXiv:2601.22709.
    """
    shapes = tuple(student_tokens.shape), tuple(teacher_tokens.shape)
    if [len(shape) for shape in shapes] != [2, 2] or shapes[0][0] != shapes[1][0]:
        raise ShapeError(f"visual tokens: student {shapes[0]}, teacher {shapes[1]}; need one n")
    n = shapes[0][0]
    if n < MIN_CKA_TOKENS:
        return None

    def centred_gram(tokens: Tensor) -> Tensor:  # (n, d) -> (n, n)
        unit = F.normalize(tokens.to(dtype), dim=-1)
        centred = unit - unit.mean(0)
        return centred @ centred.T

    dtype = _wide(student_tokens, teacher_tokens)
    with torch.autocast(student_tokens.device.type, enabled=False):  # else the products are bf16
        gram_s, gram_t = centred_gram(student_tokens), centred_gram(teacher_tokens.detach())
        norm_s, norm_t = gram_s.norm(), gram_t.norm()
        if bool(torch.minimum(norm_s, norm_t) < DEGENERATE_GRAM * n):
            return None
        cka: Tensor = (gram_s * gram_t).sum() / (norm_s * norm_t)
    return 1 - cka


def _gated_rows(
    temperature: float,
    target_weight: float,
    nontarget_weight: float,
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    weight: Tensor,
) -> Tensor:
    """Return weight * (a * TCKD + b * NCKD) * T**2 by position: logits (n, V) -> (n,) nats."""

    def split(logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return log p(target or rest) (n, 2) and log p(word | rest) (n, V)."""
        label = target[:, None]
        rest = logits.scatter(-1, label, torch.finfo(logits.dtype).min)  # target masked out
        mass = rest.logsumexp(-1, keepdim=True)  # not log(1 - p): exact when p is nearly 1
        return torch.cat((logits.gather(-1, label), mass), -1).log_softmax(-1), rest - mass

    (pair_s, rest_s), (pair_t, rest_t) = split(student / temperature), split(teacher / temperature)
    decoupled = target_weight * _kl(pair_t, pair_s) + nontarget_weight * _kl(rest_t, rest_s)
    return weight * decoupled * temperature**2


def _plain_rows(temperature: float, student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student) * T**2 per position: logits (n, V) -> (n,) nats."""
    log_p = (teacher / temperature).log_softmax(-1)
    return _kl(log_p, (student / temperature).log_softmax(-1)) * temperature**2


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) of each row, nats; log-probabilities (n, K) -> (n,)."""
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)


def _sum_rows(
    row_loss: Callable[..., Tensor], chunk: int, student: Tensor, *frozen: Tensor
) -> Tensor:
    """Sum of `row_loss(student, *frozen)` over rows; see `_RowSum`."""
    constants = (tensor.detach() for tensor in frozen)
    total: Tensor = _RowSum.apply(row_loss, chunk, student, *constants)
    return total


class _RowSum(torch.autograd.Function):
    """Sum a row-wise loss chunk by chunk, and recompute each chunk to differentiate it.

    Plain autograd over a loop would keep every chunk's fp32 intermediates until backward, and
    checkpointing slices would add up one (N, V) gradient a chunk.
    """

    @staticmethod
    def forward(
        ctx: Any, row_loss: Callable[..., Tensor], chunk: int, student: Tensor, *frozen: Tensor
    ) -> Tensor:
        ctx.row_loss, ctx.chunk = row_loss, chunk
        ctx.save_for_backward(student, *frozen)
        parts = [row_loss(*part) for _, part in _chunks(chunk, student, *frozen)]
        return torch.cat(parts).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        student, *frozen = ctx.saved_tensors
        gradient = torch.empty_like(student)  # the student's type; each chunk is rounded once
        for rows, (logits, *constants) in _chunks(ctx.chunk, student, *frozen):
            leaf = logits.detach().requires_grad_()
            with torch.enable_grad():
                total = ctx.row_loss(leaf, *constants).sum()
            gradient[rows] = torch.autograd.grad(total, leaf, upstream)[0]
        return None, None, gradient, *(None for _ in frozen)


def _chunks(chunk: int, *tensors: Tensor) -> Iterator[tuple[slice, list[Tensor]]]:
    """Slices of at most `chunk` rows of all tensors, the floating ones widened."""
    dtype = _wide(*tensors)
    for start in range(0, len(tensors[0]), chunk):
        rows = slice(start, start + chunk)
        parts = (tensor[rows] for tensor in tensors)
        yield rows, [part.to(dtype) if part.is_floating_point() else part for part in parts]


def _wide(*tensors: Tensor) -> torch.dtype:
    """Return the type to compute in: fp64 if any tensor is fp64, else fp32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def _check(
    chunk: int, *logits: Tensor, target: Tensor | None = None, temperature: float = 1.0
) -> None:
    """Raise unless all logits are (N, V) with N >= 1, V >= 2 and the rest fits them."""
    if chunk < 1 or not 0 < temperature < math.inf:
        raise UsageError(f"chunk {chunk}, temperature {temperature}: must be positive and finite")
    shapes = [tuple(part.shape) for part in logits]
    if len(set(shapes)) > 1:
        raise ShapeError(f"student logits {shapes[0]} != teacher logits {shapes[1]}")
    if len(shapes[0]) != 2 or shapes[0][0] < 1 or shapes[0][1] < 2:
        raise ShapeError(
            f"logits {shapes[0]}: need (N, V) with N >= 1 and V >= 2",
            hint="skip batches without a supervised token: their loss is undefined, not 0",
        )
    if target is None:
        return
    n, width = shapes[0]
    if tuple(target.shape) != (n,) or target.dtype != torch.int64:
        raise ShapeError(f"target {tuple(target.shape)} {target.dtype}: need ({n},) torch.int64")
    low, high = (int(bound) for bound in target.aminmax())
    if low < 0 or high >= width:
        raise ShapeError(
            f"targets {low} to {high} with logits of width {width}",
            hint="pass supervised positions only: ignored ones (-100) are dropped beforehand",
        )
