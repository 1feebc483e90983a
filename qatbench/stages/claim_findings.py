"""What one task says of a claim, from the pairs and ablations that it states already."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

from qatbench.report import tables
from qatbench.report.details import ClaimVerdict
from qatbench.report.model import (
    CONTROL_METHODS,
    ArmResult,
    PairResult,
    TaskComparison,
    WarningCode,
    Worth,
)
from qatbench.report.verdict import turned
from qatbench.stages.claim_rules import (
    AblationTest,
    Arms,
    Expected,
    PairTest,
)
from qatbench.stats import Verdict

NOT_TESTABLE: ClaimVerdict = "not testable here"
_SUPPORT: dict[Expected, tuple[Verdict, ...]] = {
    "better": ("better",),
    "worse": ("worse",),
    "not worse": ("better", "equivalent"),
}
_BESIDE: dict[Verdict, str] = {
    "better": "above it too",
    "worse": "below it",
    "equivalent": "equivalent to it",
    "undecided": "not shown to be above it",
}
_WORTH: dict[Worth, Verdict] = {
    "helps": "better",
    "hurts": "worse",
    "does not matter": "equivalent",
    "undecided": "undecided",
}


class Finding(NamedTuple):
    """What one grid of one task says of a claim."""

    verdict: ClaimVerdict
    here: str
    reason: str
    grid: str = ""
    task: str = ""


def findings(task: TaskComparison, test: PairTest | AblationTest, baseline: str) -> list[Finding]:
    """Look at one task: a finding a grid, at least one; `task` of it is left to the caller."""
    if isinstance(test, PairTest):
        return _pair_findings(task, test, baseline)
    return _ablation_findings(task, test)


# --- an arm against another ---------------------------------------------------------------------


def _pair_findings(task: TaskComparison, test: PairTest, baseline: str) -> list[Finding]:
    arms = fitting(task, test.arm)
    if not arms:
        return _nearest(task, test, baseline)
    found = [
        _pair_finding(task, test, mine, others, baseline)
        for mine, others in _sides(task, arms, test.reference)
    ]
    several = len({finding.grid for finding in found}) > 1
    return found if several else [finding._replace(grid="") for finding in found]


def _nearest(task: TaskComparison, test: PairTest, baseline: str) -> list[Finding]:
    """No arm has the bits that the claim is about: tell of the widest grid there is."""
    reason = f"no {test.arm.words()} here"
    any_bits = {"bits": None}
    reference = test.reference
    if isinstance(reference, Arms):
        reference = reference.model_copy(update=any_bits)
    arms = fitting(task, test.arm.model_copy(update=any_bits))
    widest = [arm for arm in arms if arm.bits == max(other.bits or 0 for other in arms)]
    found = [
        _pair_finding(task, test, mine, other, baseline)._replace(
            verdict=NOT_TESTABLE, reason=reason
        )
        for mine, other in _sides(task, widest, reference)
    ]
    return found or [Finding(NOT_TESTABLE, "", reason)]


def fitting(task: TaskComparison, wanted: Arms) -> list[ArmResult]:
    """Arms that fit, without those that an ablation left a part of GRACE out of."""
    whole = ("distillation", "training")
    lacking = {a.pair.reference for a in task.ablations if a.part not in whole}
    return [arm for arm in task.arms if wanted.fits(arm) and arm.name not in lacking]


def _sides(
    task: TaskComparison, arms: Sequence[ArmResult], reference: Arms | Literal["source"]
) -> Iterator[tuple[list[ArmResult], list[ArmResult]]]:
    """Grid by grid (and source by source) the arms with those to compare them with."""
    for grid in dict.fromkeys(arm.grid for arm in arms):
        mine = [arm for arm in arms if arm.grid == grid]
        if isinstance(reference, Arms):
            others = fitting(task, reference)
            yield mine, [arm for arm in others if arm.bits is None or arm.grid == grid]
        else:
            sources = {arm.name: source_of(task, arm) for arm in mine}
            for source in dict.fromkeys(sources.values()):
                made = [arm for arm in mine if sources[arm.name] == source]
                yield made, [task.arm(source)] if source else []


def source_of(task: TaskComparison, arm: ArmResult) -> str | None:
    """The compared 16-bit arm that an arm was made from, known by what making that one took.

    An arm whose source was not compared counts as made from the untrained model.
    """
    if arm.source_seconds is None:
        base = fitting(task, Arms(method=("base",)))
        return base[0].name if base else None
    for control in task.arms:
        cost = control.cost_seconds
        if control.method not in CONTROL_METHODS or cost is None:
            continue
        if abs(cost - arm.source_seconds) < 1e-6:  # a sum of the same durations
            return control.name
    return None


def _pair_finding(
    task: TaskComparison,
    test: PairTest,
    arms: Sequence[ArmResult],
    references: Sequence[ArmResult],
    baseline: str,
) -> Finding:
    arm = best_of(arms)
    control = _control(task, test, arm)
    if not references:
        made = "16-bit arm that it was made from"
        words = test.reference.words() if isinstance(test.reference, Arms) else made
        here = _told(arms) + control if control else ""
        return Finding(NOT_TESTABLE, here, f"no {words} here", arm.grid)
    reference = best_of(references)
    here = f"{_told(arms)} against {_told(references)}"
    pair = _stated(task, arm.name, reference.name)
    if pair is None:
        reason = (
            f"`{arm.name}` against `{reference.name}` is not among the pairs: differences are taken"
            f" to the baseline `{baseline}`"
        )
        return Finding(NOT_TESTABLE, here + control, reason, arm.grid)
    here += f": {_difference(pair)}{control}"
    needed = f"would take about {pair.n_needed} questions if there is no difference"
    verdict, reason = _judged(task, test.expect, pair.verdict, pair, f"equivalence {needed}")
    return Finding(verdict, here, reason, arm.grid)


def best_of(arms: Sequence[ArmResult]) -> ArmResult:
    """The most accurate."""
    return max(arms, key=lambda arm: arm.accuracy)


def _told(arms: Sequence[ArmResult]) -> str:
    best = best_of(arms)
    picked = f" (best of {len(arms)})" if len(arms) > 1 else ""
    return f"`{best.name}`{picked} {tables.percent(best.accuracy)} %"


def _difference(pair: PairResult) -> str:
    return f"{tables.difference(pair)} points, p {tables.p_value(pair.p_holm)}"


def _control(task: TaskComparison, test: PairTest, arm: ArmResult) -> str:
    """Our note: the 16-bit model that was trained, too."""
    if test.control is None:
        return ""
    controls = fitting(task, test.control)
    if not controls:
        return ""
    control = best_of(controls)
    pair = _stated(task, arm.name, control.name)
    note = f". Control, trained without quantization: {_told(controls)}"
    if pair is None:
        return f"{note}, not a stated pair"
    return f"{note}: {_difference(pair)}, {_BESIDE[pair.verdict]}"


def _stated(task: TaskComparison, arm: str, reference: str) -> PairResult | None:
    """The pair among those the comparison states, turned round if need be."""
    stated = (*task.pairs, *task.contests, *task.claimed, *(a.pair for a in task.ablations))
    for pair in stated:
        if (pair.arm, pair.reference) == (arm, reference):
            return pair
        if (pair.arm, pair.reference) == (reference, arm):
            return turned(pair)
    return None


def _judged(
    task: TaskComparison, expect: Expected, shown: Verdict, pair: PairResult, needed: str
) -> tuple[ClaimVerdict, str]:
    margin = f"±{100 * task.definition.margin:g} points"
    if shown == "undecided":
        return "undecided", f"neither a difference nor equivalence within {margin}: {needed}"
    verdict: ClaimVerdict = "reproduced" if shown in _SUPPORT[expect] else "contradicted"
    if shown == "equivalent":
        return verdict, f"equivalent within {margin}"
    return verdict, f"{shown}, p {tables.p_value(pair.p_holm)}"


# --- parts of the method ------------------------------------------------------------------------


def _ablation_findings(task: TaskComparison, test: AblationTest) -> list[Finding]:
    mine = [ablation for ablation in task.ablations if ablation.part == test.part]
    if not mine:
        return [Finding(NOT_TESTABLE, "", "no two arms here differ by this part alone")]
    bound = [w.arms for w in task.warnings if w.code == WarningCode.BETA_AT_BOUND]
    still = {name for names in bound for name in names}
    alone = " (text questions only)" if task.definition.text_only else ""
    found = []
    for ablation in mine:
        pair = ablation.pair
        here = f"`{pair.arm}` - `{pair.reference}`: {_difference(pair)}"
        if test.part == "beta" and ablation.full in still:
            reason = f"beta of `{ablation.full}` lay at a bound in most steps: it did not adapt"
            found.append(Finding(NOT_TESTABLE, here, reason, ablation.grid))
            continue
        settled = f"telling them apart would take about {ablation.n_to_decide} questions"
        verdict, reason = _judged(task, "better", _WORTH[ablation.verdict], pair, settled)
        found.append(Finding(verdict, here, reason + alone, ablation.grid))
    return found
