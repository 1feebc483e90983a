"""What to ship, how sure that is, what the other choice would cost: in short and in full.

A decision is made a grid: the best arm trained for it (QAT) against the best quantized without
training (PTQ). Where no difference is shown, the one that cost less is shipped.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from qatbench.report import tables
from qatbench.report.model import ArmResult, Definition, PairResult, TaskComparison


class Decision(NamedTuple):
    """The verdict on one grid."""

    grid: str  # "" where the task has one only
    shipped: ArmResult
    rival: ArmResult | None  # the best arm of the other family; None without a contest
    contest: PairResult | None
    short: str  # one sentence or two, for the first screen
    long: str  # the paragraph with every number


def verdict(task: TaskComparison, baseline: str) -> str:
    """Say what to ship, a paragraph a grid, how sure that is, and at what cost."""
    told = decisions(task, baseline)
    return "\n\n".join(f"{d.grid}: {d.long}" if d.grid else d.long for d in told)


def decisions(task: TaskComparison, baseline: str) -> list[Decision]:
    """One a grid where QAT and PTQ meet; else one on the best arm there is."""
    if not task.contests:
        shipped, sentence = _without_contest(task)
        text = _told(task, shipped, sentence, baseline, [])
        return [
            Decision("", shipped, None, None, f"{sentence} {_gap(task, shipped)}".strip(), text)
        ]
    made = []
    for contest in task.contests:
        shipped, why = _contest_words(task, contest)
        qat, ptq = task.arm(contest.arm), task.arm(contest.reference)
        rival = ptq if shipped is qat else qat
        grid = shipped.grid if len(task.contests) > 1 else ""
        text = _told(task, shipped, why, baseline, [qat, ptq])
        short = _in_short(task, contest, shipped, rival)
        made.append(Decision(grid, shipped, rival, contest, short, text))
    return made


def _in_short(
    task: TaskComparison, contest: PairResult, shipped: ArmResult, rival: ArmResult
) -> str:
    """What to ship and what the other would bring, at what price."""
    ahead = tables.difference(contest if shipped.name == contest.arm else turned(contest))
    more = tables.difference(contest if rival.name == contest.arm else turned(contest))
    p = f"p {tables.p_value(contest.p_holm)}"
    if contest.verdict == "equivalent":
        within = margin_words(task.definition)
        other = f"`{rival.name}` is equivalent within {within} points: {more}"
        price = _price(rival, shipped)
    elif sure(task, contest):
        best = f"the best {rival.family} arm, `{rival.name}`"
        other = f"It scores {ahead} points against {best} ({p})"
        price = _price(shipped, rival)
    else:
        other = f"`{rival.name}` scores {more} points beside it, no difference that is shown ({p})"
        price = _price(rival, shipped)
    return f"**Ship `{shipped.name}`.** {other}{price}. {_gap(task, shipped)}".rstrip()


def turned(pair: PairResult) -> PairResult:
    """The same pair the other way round."""
    opposite = {"better": "worse", "worse": "better"}
    told = {
        "arm": pair.reference,
        "reference": pair.arm,
        "difference": -pair.difference,
        "low": -pair.high,
        "high": -pair.low,
        "verdict": opposite.get(pair.verdict, pair.verdict),
        "seed_pairs": (),
        "lost": pair.gained,
        "gained": pair.lost,
    }
    return pair.model_copy(update=told)


def _price(arm: ArmResult, other: ArmResult) -> str:
    mine, theirs = tables.price(arm), tables.price(other)
    if tables.UNKNOWN in (mine, theirs):
        return ""
    return f", and costs {mine} instead of {theirs}"


def _gap(task: TaskComparison, arm: ArmResult) -> str:
    """How far the arm to ship is from 16 bits."""
    base = task.best("16-bit")
    if base is None or arm.family == "16-bit":
        return ""
    return (
        f"It answers {tables.percent(arm.accuracy)} % right, the best at 16 bits, `{base.name}`,"
        f" {tables.percent(base.accuracy)} %."
    )


def sure(task: TaskComparison, contest: PairResult) -> bool:
    """Whether a difference is shown: beside 0, and after the correction for all pairs."""
    alpha = 1 - task.definition.level
    return contest.p_holm < alpha and (contest.low > 0 or contest.high < 0)


def _without_contest(task: TaskComparison) -> tuple[ArmResult, str]:
    best = task.best("QAT") or task.best("PTQ")
    if best is not None:
        shipped = best
        others = sum(arm.family == best.family for arm in task.arms) > 1
        role = f"the best {best.family} arm" if others else f"the only {best.family} arm"
        sentence = f"**Best quantized arm: `{best.name}`**, {role}, with {_score(best)}."
    else:
        shipped = max(task.arms, key=lambda arm: arm.accuracy)
        sentence = (
            f"No arm states a quantization method. The most accurate is `{shipped.name}`, with"
            f" {_score(shipped)}."
        )
    return shipped, sentence


def _told(
    task: TaskComparison,
    shipped: ArmResult,
    sentence: str,
    baseline: str,
    rivals: Sequence[ArmResult],
) -> str:
    """Put the sentence before what follows of the arm to ship."""
    sentences = [sentence, _against_baseline(task, shipped, baseline), _cost(shipped, rivals)]
    trained = shipped.family == "QAT" or shipped.source_seconds is not None
    if trained and len(shipped.seeds) == 1:
        sentences.append(f"`{shipped.name}` was trained with one seed: another may differ.")
    return " ".join(filter(None, sentences))


def _contest_words(task: TaskComparison, contest: PairResult) -> tuple[ArmResult, str]:
    """Decide between the best QAT and the best PTQ arm."""
    qat, ptq = task.arm(contest.arm), task.arm(contest.reference)
    margin = margin_words(task.definition)
    if contest.verdict == "equivalent":
        shipped, price = _cheaper(qat, ptq)
        why = (
            f"the best QAT and the best PTQ arm are equivalent within {margin} points, and {price}"
        )
    elif sure(task, contest):
        shipped, side = (qat, "above") if contest.difference > 0 else (ptq, "below")
        why = f"the best QAT arm is {side} the best PTQ arm"
    else:
        shipped, price = _cheaper(qat, ptq)
        why = (
            f"no difference is shown between the best QAT and the best PTQ arm, and {price}; to"
            f" show them equivalent within {margin} points would take about"
            f" {contest.n_needed} questions"
        )
    picked = ""
    if sum(arm.family in ("QAT", "PTQ") and arm.grid == qat.grid for arm in task.arms) > 2:
        picked = " Both were picked as the best on these same questions, which flatters them."
    return shipped, (
        f"**Ship `{shipped.name}`**: {why}. Best QAT: `{qat.name}`, {_score(qat)}. Best PTQ:"
        f" `{ptq.name}`, {_score(ptq)}. QAT minus PTQ: {tables.difference(contest)} points"
        f" (p {tables.p_value(contest.p_holm)}).{picked}"
    )


def _cheaper(qat: ArmResult, ptq: ArmResult) -> tuple[ArmResult, str]:
    """Choose the one that cost less, and say so; PTQ where that is unknown."""
    mine, theirs = qat.cost_seconds, ptq.cost_seconds
    if mine is None or theirs is None:
        return ptq, "PTQ needs no training (what they cost is not recorded)"
    return (qat if mine < theirs else ptq), "it cost no more"


def _against_baseline(task: TaskComparison, arm: ArmResult, baseline: str) -> str:
    pair, base = task.pair(arm.name), task.arm(baseline)
    if pair is None:
        return f"`{arm.name}` is the baseline."
    margin = margin_words(task.definition)
    verdicts = {
        "equivalent": f"equivalent within {margin} points",
        "better": "better",
        "worse": "worse",
        "undecided": f"neither a difference nor equivalence within {margin} points is shown",
    }
    return (
        f"Against the baseline `{baseline}` ({_score(base)}) it is {tables.difference(pair)} points"
        f" (p {tables.p_value(pair.p_holm)}): {verdicts[pair.verdict]}."
    )


def _cost(shipped: ArmResult, rivals: Sequence[ArmResult]) -> str:
    """Price of the arm to ship, beside that of the arm it beat."""
    told = []
    for arm in [shipped, *(rival for rival in rivals if rival.name != shipped.name)]:
        known = [
            (tables.duration(arm.cost_seconds), " to make"),
            (tables.megabytes(arm.checkpoint_bytes), " MB"),
            (tables.bits_per_weight(arm), " bits/weight"),
        ]
        stated = ", ".join(value + unit for value, unit in known if value != tables.UNKNOWN)
        told.append(f"`{arm.name}` {stated or 'not recorded'}")
    return f"Cost: {'; '.join(told)}."


def margin_words(definition: Definition) -> str:
    """Write a margin of 0.01 as ±1."""
    return f"±{100 * definition.margin:g}"


def _score(arm: ArmResult) -> str:
    accuracy = f"{tables.percent(arm.accuracy)} % {tables.interval(arm.low, arm.high)}"
    return f"{accuracy} of {arm.n} questions"
