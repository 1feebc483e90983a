"""Holm's adjustments over every pair that a comparison states, and the verdicts that follow.

Two families of null hypotheses: "no difference" of each pair, and "a difference of at least the
margin" of each pair. So the chance that any pair is called different though it is not, and the
chance that any is called equivalent though it is not, are each at most 1 - level.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from qatbench import stats
from qatbench.report.model import PairResult, TaskComparison

Key = tuple[int, frozenset[str]]  # the task's place, the two arms


def adjusted(tasks: Sequence[TaskComparison]) -> tuple[TaskComparison, ...]:
    """Fill in both adjusted p-values of all pairs; a pair that is stated twice counts once."""
    ids = [
        ((k, frozenset((pair.arm, pair.reference))), pair)
        for k, task in enumerate(tasks)
        for pair in (*task.pairs, *task.contests, *task.claimed)
    ]
    families = holm_of(ids)

    def fill(k: int, pairs: Iterable[PairResult], level: float) -> tuple[PairResult, ...]:
        return tuple(settled(pair, families, (k, frozenset((pair.arm, pair.reference))), level)
                     for pair in pairs)  # fmt: skip

    return tuple(
        task.model_copy(
            update={
                "pairs": fill(k, task.pairs, task.definition.level),
                "contests": fill(k, task.contests, task.definition.level),
                "claimed": fill(k, task.claimed, task.definition.level),
                "definition": task.definition.model_copy(update={"family_size": len(families)}),
            }
        )
        for k, task in enumerate(tasks)
    )


def holm_of(pairs: Iterable[tuple[Key, PairResult]]) -> dict[Key, tuple[float, float]]:
    """(p, p of equivalence) of each pair, each adjusted within its own family."""
    rows = dict(pairs)
    if not rows:
        return {}
    differences = stats.holm([pair.p for pair in rows.values()])
    equivalences = stats.holm([_p_equivalence(pair) for pair in rows.values()])
    return dict(zip(rows, zip(differences, equivalences, strict=True), strict=True))


def settled(
    pair: PairResult, family: Mapping[Key, tuple[float, float]], key: Key, level: float
) -> PairResult:
    """The pair with its adjusted p-values, and its verdict where these bear it out."""
    p_holm, p_equivalence_holm = family[key]
    shown = {
        "equivalent": p_equivalence_holm < 1 - level,
        "better": p_holm < 1 - level,
        "worse": p_holm < 1 - level,
        "undecided": True,
    }[pair.verdict]
    verdict = pair.verdict if shown else _otherwise(pair, p_holm, 1 - level)
    told = {"p_holm": p_holm, "p_equivalence_holm": p_equivalence_holm, "verdict": verdict}
    return pair.model_copy(update=told)


def _otherwise(pair: PairResult, p_holm: float, alpha: float) -> str:
    """An equivalence that the adjustment takes back may still be a difference that it leaves."""
    if pair.verdict == "equivalent" and p_holm < alpha and pair.low * pair.high > 0:
        return "better" if pair.low > 0 else "worse"
    return "undecided"


def _p_equivalence(pair: PairResult) -> float:
    return 1.0 if pair.p_equivalence is None else pair.p_equivalence
