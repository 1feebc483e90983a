"""report.md: the verdict in words, then the tables, then how each number came about."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from qatbench.report import ablations, tables, training
from qatbench.report.model import (
    ArmResult,
    Comparison,
    Definition,
    PairResult,
    Setting,
    TaskComparison,
)

_ARM_TITLES = {
    "acc %": "accuracy %",
    "95 % CI": "95 % interval",
    "diff": "difference, points",
    "p": "p (Holm)",
    "flips": "lost/gained",
    "bits/w": "bits/weight",
}
_PAIR_TITLES = {"diff": "difference, points", "flips": "lost/gained"}

_METHOD = """\
- **accuracy**: right / all asked, mean over seeds; unparsed and crashed questions count as not \
right. Where rows form groups, a question is a group, right when all its rows are.
- **95 % interval**: Wilson, of one seed's n questions around the mean. It covers the choice of \
questions, not of training seeds: the spread over seeds (standard deviation, points) does that.
- **difference**: arm minus reference in points, correctness averaged over seeds first; interval: \
percentile bootstrap over questions (clusters where rows form groups), \
{draws} draws, seed {seed}.
- **p**: two-sided and exact: McNemar with one seed each, else sign flips of the questions' mean \
differences. Holm's adjustment covers the {family} pairs of this comparison.
- **verdict**: two one-sided tests at a margin of {margin} points; "n needed" questions would \
show equivalence with 80 % power if there is no difference.
- **lost/gained**: questions that went from right to wrong / wrong to right, mean over pairs of \
equal seeds (or all seeds with the only one of the other arm); McNemar's p of each.
- **MB**: 10^6 bytes of checkpoint. **bits/weight**: the language model's linears, with scales. \
**cost**: making the checkpoint, and before it those of the compared arms that it was made from \
(the model that was quantized, the teacher); mean over seeds, on the device stated."""


def render(comparison: Comparison) -> str:
    """Render report.md; a pure function of the comparison."""
    recipe = next((t.definition.recipe for t in comparison.tasks if t.definition.recipe), None)
    parts = [f"# Comparison{f': {recipe}' if recipe else ''}"]
    for task in comparison.tasks:
        parts += _task_parts(comparison, task)
    if comparison.training:
        parts += ["## Training", *training.paragraphs(comparison)]
    first = comparison.tasks[0].definition
    method = _METHOD.format(
        draws=first.bootstrap_draws,
        seed=first.bootstrap_seed,
        family=first.family_size,
        margin=_margin(first),
    )
    if any(task.ablations for task in comparison.tasks):
        method += "\n" + ablations.METHOD.format(
            family=first.ablation_family, alpha=1 - first.level
        )
    method += f'\n- "{tables.UNKNOWN}": not recorded.'
    parts += ["## How the numbers are computed", method]
    return "\n\n".join(parts) + "\n"


def verdict(task: TaskComparison, baseline: str) -> str:
    """Say what to ship, a paragraph a grid, how sure that is, and at what cost."""
    if not task.contests:
        return _without_contest(task, baseline)
    paragraphs = []
    for contest in task.contests:
        shipped, sentence = _contest_words(task, contest)
        where = f"{shipped.grid}: " if len(task.contests) > 1 else ""
        rivals = [task.arm(name) for name in (contest.arm, contest.reference)]
        paragraphs.append(where + _told(task, shipped, sentence, baseline, rivals))
    return "\n\n".join(paragraphs)


def _without_contest(task: TaskComparison, baseline: str) -> str:
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
    return _told(task, shipped, sentence, baseline, [])


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
    margin, alpha = _margin(task.definition), 1 - task.definition.level
    sure = contest.p_holm < alpha and (contest.low > 0 or contest.high < 0)
    if contest.verdict == "equivalent":
        shipped, price = _cheaper(qat, ptq)
        why = (
            f"the best QAT and the best PTQ arm are equivalent within {margin} points, and {price}"
        )
    elif sure:
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
    margin = _margin(task.definition)
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


def _task_parts(comparison: Comparison, task: TaskComparison) -> list[str]:
    definition = task.definition
    rows = tables.of_task(tables.arm_rows(comparison), definition.task)
    pairs = tables.of_task(tables.pair_rows(comparison), definition.task)
    labels: dict[str, list[str]] = {}
    for row, arm in zip(rows, task.arms, strict=True):
        if arm.label:
            labels.setdefault(arm.label, []).append(arm.name)
            row["bits/w"] += f" ({list(labels).index(arm.label) + 1})"
    parts = [f"## {definition.task}", verdict(task, comparison.baseline)]
    parts.append(tables.markdown_table(rows, _ARM_TITLES))
    if labels:
        marked = enumerate(labels.items(), start=1)
        parts.append("\n".join(f"({k}) {_named(names)}: {text}." for k, (text, names) in marked))
    told: dict[str, list[str]] = {}
    for arm in task.arms:
        for note in (*arm.notes, *arm.leakage):
            told.setdefault(note, []).append(arm.name)
    notes = [f"- {_named(names)}: {note}" for note, names in told.items()]
    warnings = [
        f"- **{warning.code}**{f' ({warning.detail})' if warning.detail else ''}: {warning.advice}."
        for warning in task.warnings
    ]
    sections: list[tuple[str, str]] = [
        ("What each part of GRACE is worth", ablations.section(comparison, task)),
        ("Warnings", "\n".join(warnings)),
        ("Notes", "\n".join(notes)),
        ("Seeds", tables.markdown_table(tables.seed_rows(task))),
        ("Pairs", tables.markdown_table(pairs, _PAIR_TITLES)),
        ("Unparsed, errors, ties", tables.markdown_table(tables.count_rows(task))),
        ("Making", tables.markdown_table(tables.cost_rows(task))),
        ("Definition", _definition(task, comparison.baseline)),
    ]
    return parts + [f"### {title}\n\n{text}" for title, text in sections if text]


def _named(arms: Sequence[str]) -> str:
    return ", ".join(f"`{arm}`" for arm in arms)


def _definition(task: TaskComparison, baseline: str) -> str:
    definition = task.definition
    searched = [arm.name for arm in task.arms if arm.leakage]
    questions = f"{definition.n}{' (text only)' if definition.text_only else ''}"
    if definition.intersection:
        dropped = ", ".join(f"{arm} {count}" for arm, count in definition.dropped.items())
        questions += f"; the intersection of the arms, left out: {dropped}"
    facts = {
        "baseline": f"`{baseline}`",
        "questions": questions,
        **({} if definition.images == ("shown",) else {"images": _setting(definition.images)}),
        "data": _by_name(definition.data),
        **({"leakage": f"searched for, see Notes: {_named(searched)}"} if searched else {}),
        "protocol": _setting(definition.protocol),
        "mode": _setting(definition.mode),
        "prompt form": _setting(definition.prompt_form),
        "dtype": _setting(definition.dtype),
        "device": _setting(definition.device),
        "batch": _setting(definition.batch),
        "versions": _by_name(definition.versions),
        "seeds": "; ".join(f"{a} {', '.join(map(str, s))}" for a, s in definition.seeds.items()),
        "margin": f"{_margin(definition)} points",
        "bootstrap": f"{definition.bootstrap_draws} draws, seed {definition.bootstrap_seed}",
    }
    return "\n".join(f"- {name}: {value}" for name, value in facts.items())


def _setting(values: Setting) -> str:
    return " | ".join(values) or tables.UNKNOWN


def _by_name(settings: Mapping[str, Setting]) -> str:
    return ", ".join(f"{k} {_setting(v)}" for k, v in settings.items()) or tables.UNKNOWN


def _margin(definition: Definition) -> str:
    return f"±{100 * definition.margin:g}"


def _score(arm: ArmResult) -> str:
    accuracy = f"{tables.percent(arm.accuracy)} % {tables.interval(arm.low, arm.high)}"
    return f"{accuracy} of {arm.n} questions"
