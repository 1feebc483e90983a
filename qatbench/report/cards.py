"""The first screen of report.html: a card a grid that says what to ship, and a headline a task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from markupsafe import Markup

from qatbench.report import drawings, tables
from qatbench.report.model import ArmResult, Comparison, PairResult, TaskComparison
from qatbench.report.tables import UNKNOWN
from qatbench.report.verdict import Decision, decisions, margin_words, sure

Outcome = Literal["ahead", "behind", "equivalent", "open", "alone"]  # QAT beside PTQ

METHODS = {
    "rtn": "RTN",
    "gptq": "GPTQ",
    "awq": "AWQ",
    "autoround": "AutoRound",
    "qat": "LSQ with cross-entropy",
    "grace": "GRACE",
    "sft": "fine-tuned at 16 bits",
    "kd": "distilled at 16 bits",
    "base": "as it came",
}
_BADGES: dict[Outcome, str] = {
    "ahead": "QAT is ahead",
    "behind": "PTQ is ahead",
    "equivalent": "equivalent",
    "open": "no difference shown",
    "alone": "no contest",
}


class Line(NamedTuple):
    """One arm in a card's table."""

    arm: ArmResult
    role: str
    accuracy: str
    cost: str
    size: str
    bits: str


class VerdictCard(NamedTuple):
    """What to ship on one grid."""

    grid: str
    where: str  # the grid in words
    outcome: Outcome
    badge: str
    ship: str  # what the big words begin with
    decision: Decision
    how: str  # how the arm to ship is made
    why: str
    contest: PairResult | None
    numbers: str  # QAT minus PTQ with its interval
    p: str
    drawing: Markup | None
    lines: tuple[Line, ...]
    price: str  # what the other choice costs


def cards(comparison: Comparison, task: TaskComparison) -> list[VerdictCard]:
    """One a decision; the intervals of a task are drawn on one scale."""
    margin = task.definition.margin
    contests = [(contest.low, contest.high) for contest in task.contests]
    scale = drawings.difference_scale(contests, margin) if contests else None
    return [_card(task, decision, scale) for decision in decisions(task, comparison.baseline)]


def headline(task: TaskComparison, made: Sequence[VerdictCard]) -> str:
    """Sum the cards up in a sentence."""
    grids: dict[Outcome, list[str]] = {}
    for card in made:
        grids.setdefault(card.outcome, []).append(card.grid)
    if "alone" in grids:
        return f"{made[0].ship} {made[0].decision.shipped.name}; QAT and PTQ do not meet here."
    bits = _short_grids(made)
    margin = margin_words(task.definition)
    said: dict[Outcome, str] = {
        "ahead": "QAT is ahead of PTQ {}",
        "behind": "PTQ is ahead of QAT {}",
        "equivalent": f"QAT and PTQ are equivalent within {margin} points {{}}",
        "open": "no difference is shown {}"
        if len(grids) > 1
        else "no difference between QAT and PTQ is shown {}",
    }
    parts = [
        words.format(f"at {_listed([bits[grid] for grid in grids[outcome]])}")
        for outcome, words in said.items()
        if outcome in grids
    ]
    text = "; ".join(parts)
    return f"{text[0].upper()}{text[1:]}."


def _short_grids(made: Sequence[VerdictCard]) -> dict[str, str]:
    """Grids by their bits alone where no two share them."""
    bits = {card.grid: str(card.decision.shipped.bits) for card in made}
    alike = len(set(bits.values())) < len(bits)
    return {grid: grid if alike else f"{count} bits" for grid, count in bits.items()}


def _listed(names: Sequence[str]) -> str:
    """4 bits, 3 bits -> 4 and 3 bits."""
    shared = all(name.endswith(" bits") for name in names)
    bare = [name.removesuffix(" bits") for name in names] if shared else list(names)
    joined = f"{', '.join(bare[:-1])} and {bare[-1]}" if len(bare) > 1 else bare[0]
    return f"{joined} bits" if shared else joined


def _card(task: TaskComparison, decision: Decision, scale: drawings.Scale | None) -> VerdictCard:
    shipped, rival, contest = decision.shipped, decision.rival, decision.contest
    outcome = _outcome(task, contest)
    ship = "Ship" if contest else "Best quantized arm:" if shipped.bits else "Most accurate:"
    roles = [(shipped, "ship"), (rival, "instead"), (task.best("16-bit"), "16 bits")]
    lines = {arm.name: _line(arm, role) for arm, role in reversed(roles) if arm is not None}
    numbers = tables.difference(contest) if contest else ""
    drawing = None
    if contest and scale:
        low, high = tables.points(contest.low), tables.points(contest.high)
        drawing = drawings.difference_bar(
            contest.low, contest.difference, contest.high, scale, task.definition.margin,
            label=f"{contest.arm} minus {contest.reference}: {tables.points(contest.difference)}"
            f" points, 95 % interval {low} to {high}; the band is the margin of"
            f" {margin_words(task.definition)} points",
        )  # fmt: skip
    return VerdictCard(
        grid=shipped.grid if shipped.bits else "",
        where=_where(shipped),
        outcome=outcome,
        badge=_BADGES[outcome],
        ship=ship,
        decision=decision,
        how=_how(shipped),
        why=_why(task, decision, outcome),
        contest=contest,
        numbers=numbers,
        p=tables.p_value(contest.p_holm) if contest else "",
        drawing=drawing,
        lines=tuple(reversed(lines.values())),
        price=_price(decision, outcome),
    )


def _where(arm: ArmResult) -> str:
    if not arm.bits:
        return ""
    return f"{arm.bits} bits, {'a scale a row' if arm.group_size == -1 else _groups(arm)}"


def _groups(arm: ArmResult) -> str:
    return f"groups of {arm.group_size}" if arm.group_size else "groups unknown"


def _outcome(task: TaskComparison, contest: PairResult | None) -> Outcome:
    if contest is None:
        return "alone"
    if contest.verdict == "equivalent":
        return "equivalent"
    if not sure(task, contest):
        return "open"
    return "ahead" if contest.difference > 0 else "behind"


def _how(arm: ArmResult) -> str:
    method = METHODS.get(arm.method or "", arm.method or "method not recorded")
    kinds = {
        "PTQ": "quantized without training (PTQ)",
        "QAT": "trained on the integer grid (QAT)",
        "16-bit": "nothing quantized",
        "unknown": "",
    }
    kind = kinds[arm.family]
    if arm.family == "PTQ" and arm.source_seconds:
        kind = "a trained model, quantized (PTQ)"
    return f"{method}: {kind}" if kind else method


def _why(task: TaskComparison, decision: Decision, outcome: Outcome) -> str:
    """Why this arm ships, in words for a reader new to it."""
    shipped, rival = decision.shipped, decision.rival
    if rival is None:
        return decision.short
    margin = margin_words(task.definition)
    known = None not in (shipped.cost_seconds, rival.cost_seconds)
    cheaper = "the cheaper one ships" if known else "the one without training ships"
    if outcome == "equivalent":
        return f"As good as the best {rival.family} arm, within {margin} points: {cheaper}."
    if outcome == "open":
        contest = decision.contest
        if contest and (contest.low > 0 or contest.high < 0):
            pairs = f"{task.definition.family_size} pairs"
            ahead = "QAT" if contest.difference > 0 else "PTQ"
            return f"The lead of {ahead} does not outlive the correction for {pairs}: {cheaper}."
        return f"No difference to the best {rival.family} arm is shown: {cheaper}."
    return f"It beats the best {rival.family} arm, `{rival.name}`, by more than chance would."


def _price(decision: Decision, outcome: Outcome) -> str:
    """What QAT costs beside PTQ, and brings, whichever ships."""
    shipped, rival = decision.shipped, decision.rival
    if rival is None:
        return ""
    qat, ptq = (shipped, rival) if shipped.family == "QAT" else (rival, shipped)
    mine, theirs = tables.price(qat), tables.price(ptq)
    if UNKNOWN in (mine, theirs):
        return "What they cost to make is not recorded."
    gain = tables.points(decision.contest.difference) if decision.contest else UNKNOWN
    gains: dict[Outcome, str] = {
        "ahead": f"for {gain} points",
        "behind": "for less",
        "equivalent": "for the same",
        "open": "for a gain that is not shown",
    }
    ratio = (qat.cost_seconds or 0) / (ptq.cost_seconds or 1)
    if ratio < 1:
        return f"QAT costs no more here: {mine} instead of {theirs}, {gains[outcome]}."
    times = f", {ratio:.{0 if ratio >= 9.5 else 1}f} times as much" if ratio >= 1.5 else ""
    return f"The price of QAT: {mine} instead of {theirs}{times}, {gains[outcome]}."


def _line(arm: ArmResult, role: str) -> Line:
    return Line(
        arm,
        role,
        tables.percent(arm.accuracy),
        tables.price(arm),
        tables.megabytes(arm.checkpoint_bytes),
        tables.bits_per_weight(arm),
    )
