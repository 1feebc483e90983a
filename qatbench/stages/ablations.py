"""What each part of GRACE is worth: arms that differ by one part, question by question."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from statistics import NormalDist
from typing import NamedTuple, get_args

import numpy as np

from qatbench.report.model import (
    Ablation,
    ArmResult,
    Course,
    Definition,
    PairResult,
    Part,
    TaskComparison,
    Worth,
)
from qatbench.stages import adjusted
from qatbench.stages.arms import Arm
from qatbench.stages.paired import Scores
from qatbench.stages.parts import Found, Pairing, against_qat, find

_POWER = 0.8
_ORDER: tuple[Part, ...] = get_args(Part)

Against = Callable[[Scores, Scores], PairResult]


class _Row(NamedTuple):
    """A pairing, or qat against PTQ, with the full arm whose grid and cost it refers to."""

    full: str
    pairing: Pairing


def with_ablations(
    task: TaskComparison,
    arms: Sequence[Arm],
    training: Sequence[Course],
    scores: dict[str, Scores],
    against: Against,
) -> TaskComparison:
    """Add what the arms tell about parts; Holm's adjustment and verdicts are left to `settled`.

    `against` compares two arms on this task's questions.
    """
    found = find(arms, training)
    rows = sorted(_rows(task, arms, found), key=lambda row: _place(task, found, row))
    ablations = tuple(_ablation(task, row, scores, against) for row in rows)
    return task.model_copy(
        update={"ablations": ablations, "not_ablated": found.left_out if ablations else ()}
    )


def settled(tasks: Sequence[TaskComparison]) -> tuple[TaskComparison, ...]:
    """Give every ablation its adjusted p and its verdict.

    A pair that stands among the comparison's pairs keeps the p it has there, so that no pair has
    two; the others of all tasks are a family of their own.
    """
    known = [_known(task) for task in tasks]
    rows = [(k, row) for k, task in enumerate(tasks) for row in task.ablations]
    alone = [(k, row) for k, row in rows if _shared(row.pair, known[k]) is None]
    family = adjusted.holm_of((_key(k, row.pair), row.pair) for k, row in alone)

    def settle(k: int, row: Ablation, definition: Definition) -> Ablation:
        alpha, key = 1 - definition.level, _key(k, row.pair)
        shared = _shared(row.pair, known[k])
        mine = family if shared is None else {key: shared}
        pair = adjusted.settled(row.pair, mine, key, definition.level)
        n = n_to_decide(
            pair,
            row.variance,
            margin=definition.margin,
            alpha=alpha,
            family=len(family) if shared is None else definition.family_size,
        )
        told = {"shared_p": shared is not None, "verdict": verdict(pair, alpha), "n_to_decide": n}
        return row.model_copy(update={"pair": pair, **told})

    return tuple(
        task.model_copy(
            update={
                "ablations": tuple(settle(k, a, task.definition) for a in task.ablations),
                "definition": task.definition.model_copy(update={"ablation_family": len(family)}),
            }
        )
        for k, task in enumerate(tasks)
    )


def verdict(pair: PairResult, alpha: float) -> Worth:
    """Judge a part by the pair with it minus without it.

    Equivalence comes first, as in `stats.tost_paired`: a difference that is real but surely below
    the margin does not matter.
    """
    if pair.verdict == "equivalent":
        return "does not matter"
    if pair.p_holm < alpha and pair.low > 0:
        return "helps"
    if pair.p_holm < alpha and pair.high < 0:
        return "hurts"
    return "undecided"


def n_to_decide(
    pair: PairResult, variance: float, *, margin: float, alpha: float, family: int
) -> int:
    """Questions for 80 % power to settle a pair if its true difference is the one seen.

    The fewer of those for a two-sided test of no difference, Bonferroni's correction for the
    family counted in, and, where the difference lies within the margin, those for two one-sided
    tests of equivalence; normal power at the paired variance per question.
    """
    normal, size = NormalDist(), abs(pair.difference)
    one_sided = normal.inv_cdf(1 - alpha)
    choices = []
    if size > 0:
        wanted = normal.inv_cdf(1 - alpha / family / 2) + normal.inv_cdf(_POWER)
        choices.append(variance * (wanted / size) ** 2)
    if size < margin:

        def power(n: float) -> float:
            error = math.sqrt(variance / n)
            near, far = (margin - size) / error, (margin + size) / error
            return normal.cdf(near - one_sided) + normal.cdf(far - one_sided) - 1

        needed = float(pair.n_needed)  # that of no difference: never more than with one
        while variance > 0 and power(needed) < _POWER:
            needed *= 1.001
        choices.append(needed)
    return max(1, math.ceil(min(choices) - 1e-9))  # 1e-9: rounding adds no question


def _rows(task: TaskComparison, arms: Sequence[Arm], found: Found) -> Iterator[_Row]:
    """The parts of the method, then all of distillation, then training on the grid."""
    by_name = {arm.name: arm for arm in arms}
    told = {pairing.arm.name for pairing in found.pairings}
    for pairing in found.pairings:
        yield _Row(pairing.arm.name, pairing)
    for full in found.full:
        pairings = against_qat(full, arms)
        if any(pairing.differing for pairing in pairings):  # no qat arm of its settings: the best
            best = max(pairings, key=lambda p: task.arm(p.reference.name).accuracy)
            pairings = (best,)
        for pairing in pairings:
            yield _Row(full.name, pairing)
            qat = pairing.reference
            ptq = task.best("PTQ", task.arm(qat.name).grid)
            if ptq is not None and qat.name not in told:
                told.add(qat.name)
                seeds = qat.seeds
                yield _Row(full.name, Pairing("training", None, qat, by_name[ptq.name], seeds))


def _place(task: TaskComparison, found: Found, row: _Row) -> tuple[int, int]:
    """Grid by grid in the order of the full arms, part by part."""
    grids = [task.arm(full.name).grid for full in found.full]
    return grids.index(task.arm(row.full).grid), _ORDER.index(row.pairing.part)


def _ablation(
    task: TaskComparison, row: _Row, scores: dict[str, Scores], against: Against
) -> Ablation:
    part, without, arm, reference, seeds, differing = row.pairing
    mine, theirs = scores[arm.name], scores[reference.name]
    if part != "training":  # PTQ has its one checkpoint, or seeds of its own
        mine, theirs = _only(mine, seeds), _only(theirs, seeds)
    pair = against(mine, theirs)
    full = task.arm(row.full)
    return Ablation(
        part=part,
        without=without,
        full=full.name,
        grid=full.grid,
        pair=pair,
        shared_p=False,
        verdict="undecided",
        variance=float(np.var(mine.right.mean(axis=0) - theirs.right.mean(axis=0), ddof=1)),
        n_to_decide=pair.n_needed,
        cost=_cost(task.arm(reference.name), full),
        differing=differing,
    )


def _only(scores: Scores, seeds: Sequence[int]) -> Scores:
    places = [scores.seeds.index(seed) for seed in seeds]
    return Scores(scores.name, tuple(seeds), scores.right[places])


def _cost(arm: ArmResult, full: ArmResult) -> float | None:
    """Making `arm` over making `full`; None where a time is unknown or the devices differ."""
    if arm.making_seconds is None or not full.making_seconds or arm.device != full.device:
        return None
    return arm.making_seconds / full.making_seconds


def _known(task: TaskComparison) -> dict[frozenset[str], PairResult]:
    stated = (*task.claimed, *task.contests, *task.pairs)
    return {frozenset((pair.arm, pair.reference)): pair for pair in stated}


def _key(k: int, pair: PairResult) -> adjusted.Key:
    return k, frozenset((pair.arm, pair.reference))


def _shared(
    pair: PairResult, known: dict[frozenset[str], PairResult]
) -> tuple[float, float] | None:
    """Adjusted p-values of the same pair, of the same seeds, elsewhere in the comparison."""
    other = known.get(frozenset((pair.arm, pair.reference)))
    if other is None or other.p != pair.p or len(other.seed_pairs) != len(pair.seed_pairs):
        return None
    return other.p_holm, 1.0 if other.p_equivalence_holm is None else other.p_equivalence_holm
