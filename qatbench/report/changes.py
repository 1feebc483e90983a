"""What changed from one arm to another: in words, and as rows of tables."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator

from qatbench.report.details import Changes
from qatbench.report.model import Comparison, TaskComparison
from qatbench.report.tables import (
    UNKNOWN,
    Row,
    between,
    count,
    flips,
    markdown_table,
    of_task,
    percent,
)

METHOD = """\
- **what changed**: questions, mean over pairs of equal seeds (or all seeds with the only one of \
the other arm). **both wrong, answered otherwise**: rows wrong in both arms with another letter in \
each. **same answer**: share of rows with the same letter, or without one in both.
- **KL**: KL(reference || arm) of the distributions over options, nats, over the rows of all pairs \
of seeds; a distribution is the softmax of an arm's option scores. **margin**: the gold option's \
score minus the best other's, nats; medians, of the lost questions in the reference and of the \
gained ones in the arm (of a question of several rows, of the first that flipped); "near" below \
ln 2, where the gold option is less than twice as likely as the next, "clear" above ln 10.
- **by group**: as the first row of a question states it; intervals: percentiles of the bootstrap \
over the group's questions, not adjusted for the number of groups: of twenty without any change \
one may stand clear of 0."""

UNSCORED = "The options were not scored: KL and margins are not known."

_MATRIX_AT_MOST = 12  # arms
_CATEGORIES, _CATEGORY_AT_LEAST = 8, 20  # rows of a table; questions
_NEAR, _CLEAR = math.log(2), math.log(10)  # nats of margin
_CORNER = "same answer %"
_TITLES = {
    "otherwise": "both wrong, answered otherwise",
    "same %": "same answer %",
    "lost margin": "margin of the lost, before",
    "gained margin": "margin of the gained, after",
    "flips": "lost/gained",
    "diff": "difference, points",
}


def change_rows(comparison: Comparison) -> list[Row]:
    """One row a pair and task; questions and rows are means over pairs of seeds, KL in nats."""
    return [
        {"task": task.definition.task, **_change_row(change)}
        for task in comparison.tasks
        for change in task.changes
    ]


def group_rows(comparison: Comparison) -> list[Row]:
    """One row a pair, group and task: accuracies in percent, the difference in points."""
    return [
        {
            "task": task.definition.task,
            "pair": _pair(change),
            "kind": group.kind,
            "group": group.name,
            "n": str(group.n),
            "arm %": percent(group.accuracy),
            "reference %": percent(group.reference_accuracy),
            "diff": between(group.difference, group.low, group.high),
            "flips": flips(group.lost, group.gained),
        }
        for task in comparison.tasks
        for change in task.changes
        for group in change.groups
    ]


def agreement_rows(task: TaskComparison) -> list[Row]:
    """One row an arm, one column an arm: percent of rows with the same letter; [] if not known."""
    if task.agreement is None:
        return []
    names = task.agreement.arms
    return [
        {_CORNER: name, **dict(zip(names, map(percent, shares), strict=True))}
        for name, shares in zip(names, task.agreement.share, strict=True)
    ]


def section(comparison: Comparison, task: TaskComparison) -> str:
    """Say in words what changed, then the tables; "" where nothing is known."""
    told = "\n".join(f"- {sentences}" for sentences in _in_words(comparison, task))
    if told and not any(change.divergence for change in task.changes):
        told += f"\n- {UNSCORED}"
    rows = of_task(change_rows(comparison), task.definition.task)
    parts = [told, markdown_table(rows, _TITLES)]
    parts += [part for change in _contests(task) for part in _by_group(change)]
    matrix = agreement_rows(task)
    if 1 < len(matrix) <= _MATRIX_AT_MOST:
        parts += [_matrix_words(task), markdown_table(matrix)]
    return "\n\n".join(filter(None, parts))


def _in_words(comparison: Comparison, task: TaskComparison) -> Iterator[str]:
    """Each contest, then the best quantized arm of each grid against the baseline."""
    contests = _contests(task)
    for contest in contests:
        yield f"`{contest.arm}` against `{contest.reference}`: {_words(task, contest)}"
    quantized = [arm for arm in task.arms if arm.family in ("PTQ", "QAT")]
    arms = quantized or [arm for arm in task.arms if arm.name != comparison.baseline]
    told = {frozenset((contest.arm, contest.reference)) for contest in contests}
    for grid in dict.fromkeys(arm.grid for arm in arms):
        mine = [arm for arm in arms if arm.grid == grid]
        best = max(mine, key=lambda arm: arm.accuracy).name
        change = _change(task, best, comparison.baseline)
        if change is None or frozenset((change.arm, change.reference)) in told:
            continue
        where = f" with {grid}" if quantized else ""
        role = f" (the best of {len(mine)} arms{where})" if len(mine) > 1 else ""
        yield (
            f"`{change.arm}`{role} against the baseline `{change.reference}`:"
            f" {_words(task, change)}"
        )


def _words(task: TaskComparison, change: Changes) -> str:
    """What happened to the questions, the answers, the distributions and the margins."""
    n = task.definition.n
    arms = (task.arm(change.arm), task.arm(change.reference))
    means = " (means over seeds)" if any(len(arm.seeds) > 1 for arm in arms) else ""
    asked = "questions" if change.rows == n else "rows"
    sentences = [
        f"of {n} questions {count(change.lost)} went wrong and {count(change.gained)} came right"
        f"{means}{_otherwise(change, n)}.",
        f"{percent(change.same_answer)} % of {asked} have the same answer.",
    ]
    if change.divergence is not None:
        mean, p99 = _nats(change.divergence.mean), _nats(change.divergence.p99)
        sentences.append(f"KL {mean} nats on average, 99 % of rows below {p99}.")
    return " ".join(filter(None, [*sentences, _margin_words(change)]))


def _otherwise(change: Changes, n: int) -> str:
    """How many of those wrong both times are answered differently; rows where rows form groups."""
    if change.rows != n:
        return f"; {count(change.wrong_changed)} rows wrong both times are answered differently"
    if change.both_wrong == 0:
        return ""
    share = 100 * change.wrong_changed / change.both_wrong
    wrong = count(change.both_wrong)
    return f"; of the {wrong} wrong both times {share:.0f} % are answered differently"


def _margin_words(change: Changes) -> str:
    """How near the flipped questions were to falling the other way."""
    told = []
    if change.lost_margin is not None:
        lost = change.lost_margin
        how = " was near" if lost < _NEAR else " had been clear" if lost > _CLEAR else ""
        told.append(
            f"What was lost{how}: median margin {_nats(lost)} nats, the gold option {_odds(lost)}"
            " as likely as the next"
        )
    if change.gained_margin is not None:
        lead = "what was gained leads by" if told else "What was gained leads by"
        told.append(f"{lead} {_nats(change.gained_margin)} nats")
    return f"{'; '.join(told)}." if told else ""


def _odds(margin: float) -> str:
    return "over 100 times" if margin > math.log(100) else f"{math.exp(margin):.2g} times"


def _by_group(change: Changes) -> list[str]:
    """Caption and table of one contest's groups; of categories the ones that differ the most.

    A kind with but one group says nothing that the pair does not.
    """
    kinds = Counter(group.kind for group in change.groups)
    small = [g for g in change.groups if g.kind != "category" and kinds[g.kind] > 1]
    categories = [group for group in change.groups if group.kind == "category"]
    large = [group for group in categories if group.n >= _CATEGORY_AT_LEAST]
    widest = sorted(large, key=lambda group: -abs(group.difference))[:_CATEGORIES]
    if not small and not widest:
        return []
    caption = f"`{change.arm}` against `{change.reference}` by group"
    if len(widest) < len(categories):
        caption += (
            f"; of {len(categories)} categories the {len(widest)} with the widest difference, among"
            f" those of at least {_CATEGORY_AT_LEAST} questions"
        )
    rows = [
        {
            "group": group.name,
            "kind": group.kind.replace("l2_category", "category, level 2"),
            "n": str(group.n),
            f"{change.arm} %": percent(group.accuracy),
            f"{change.reference} %": percent(group.reference_accuracy),
            "diff": between(group.difference, group.low, group.high),
            "flips": flips(group.lost, group.gained),
        }
        for group in (*small, *widest)
    ]
    return [f"{caption}:", markdown_table(rows, _TITLES)]


def _matrix_words(task: TaskComparison) -> str:
    several = any(len(arm.seeds) > 1 for arm in task.arms)
    own = "; on the diagonal between the seeds of one arm, 100 with one seed" if several else ""
    return f"Rows on which two arms give the same answer, percent{own}:"


def _contests(task: TaskComparison) -> list[Changes]:
    """What changed in each contest, best QAT against best PTQ."""
    found = (_change(task, contest.arm, contest.reference) for contest in task.contests)
    return [change for change in found if change is not None]


def _change(task: TaskComparison, arm: str, reference: str) -> Changes | None:
    pairs = {(change.arm, change.reference): change for change in task.changes}
    return pairs.get((arm, reference))


def _change_row(change: Changes) -> Row:
    divergence = change.divergence
    return {
        "pair": _pair(change),
        "both right": count(change.both_right),
        "lost": count(change.lost),
        "gained": count(change.gained),
        "both wrong": count(change.both_wrong),
        "otherwise": count(change.wrong_changed),
        "same %": percent(change.same_answer),
        "KL mean": UNKNOWN if divergence is None else _nats(divergence.mean),
        "KL p99": UNKNOWN if divergence is None else _nats(divergence.p99),
        "lost margin": _margin(change.lost_margin),
        "gained margin": _margin(change.gained_margin),
    }


def _pair(change: Changes) -> str:
    return f"{change.arm} - {change.reference}"


def _margin(nats: float | None) -> str:
    return UNKNOWN if nats is None else _nats(nats)


def _nats(value: float) -> str:
    """Two significant digits, at most four decimals: 0.0013, 0.35, 4.9, 12."""
    if abs(value) < 5e-5:
        return "0"
    value = float(f"{value:.2g}")  # first, so that 0.0999 is 0.10
    digits = max(0, 1 - math.floor(math.log10(abs(value))))
    return f"{value:.{min(digits, 4)}f}"
