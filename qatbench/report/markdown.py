"""report.md: the verdict in words, then the tables, then how each number came about."""

from __future__ import annotations

from qatbench.report import (
    ablations,
    changes,
    claims,
    figures,
    recovery,
    speed_arms,
    tables,
    training,
)
from qatbench.report.facts import definition_facts, named, notes
from qatbench.report.model import Comparison, TaskComparison
from qatbench.report.verdict import decisions, margin_words, verdict

_ARM_TITLES = {
    "acc %": "accuracy %",
    "95 % CI": "95 % interval",
    "diff": "difference, points",
    "p": "p (Holm)",
    "flips": "lost/gained",
    "bits/w": "bits/weight",
}
_PAIR_TITLES = {"diff": "difference, points", "flips": "lost/gained"}

_WORDS = (
    "PTQ: a finished model is quantized. QAT: it is trained on the integer grid, which costs more."
    " Points are of accuracy, right / all asked; brackets hold 95 % intervals of paired"
    " differences; what is called a difference is one after Holm's correction for all pairs."
)

_METHOD = """\
- **accuracy**: right / all asked, mean over seeds; unparsed and crashed questions count as not \
right. Where rows form groups, a question is a group, right when all its rows are.
- **95 % interval**: Wilson, of one seed's n questions around the mean. It covers the choice of \
questions, not of training seeds: the spread over seeds (standard deviation, points) does that. \
Each question is taken alone, passes of one and questions of one cluster too; only differences \
know of clusters.
- **difference**: arm minus reference in points, correctness averaged over seeds first; interval: \
percentile bootstrap over questions (over clusters where questions form any), \
{draws} draws, seed {seed}.
- **p**: two-sided and exact: McNemar with one seed each, else sign flips of the questions' mean \
differences; where questions form clusters, sign flips of the clusters' sums, of single seeds too. \
Holm's adjustment covers the {family} pairs of this comparison.
- **verdict**: "equivalent": two one-sided tests at a margin of {margin} points, p adjusted by \
Holm as a family of its own; "better", "worse": the interval lies beside 0 and p (Holm) is below \
{alpha:.2g}; otherwise "undecided". "n needed" questions would show equivalence with 80 % power if \
there is no difference.
- **lost/gained**: questions that went from right to wrong / wrong to right, mean over pairs of \
equal seeds (or all seeds with the only one of the other arm); p of each.
- **MB**: 10^6 bytes of checkpoint. **bits/weight**: the language model's linears, with scales. \
**cost**: making the checkpoint, and before it those of the compared arms that it was made from \
(the model that was quantized, the teacher); mean over seeds, on the device stated."""


def render(comparison: Comparison) -> str:
    """Render report.md; a pure function of the comparison."""
    recipe = next((t.definition.recipe for t in comparison.tasks if t.definition.recipe), None)
    parts = [f"# Comparison{f': {recipe}' if recipe else ''}"]
    parts.append(_in_short(comparison))
    for task in comparison.tasks:
        parts += _task_parts(comparison, task)
    if told := claims.section(comparison):
        parts += ["## Published claims", told]
    if comparison.training:
        parts += ["## Training", *training.paragraphs(comparison)]
    parts += ["## How the numbers are computed", method(comparison)]
    return "\n\n".join(parts) + "\n"


def method(comparison: Comparison) -> str:
    """How each number came about, in a list."""
    first = comparison.tasks[0].definition
    told = _METHOD.format(
        draws=first.bootstrap_draws,
        seed=first.bootstrap_seed,
        family=first.family_size,
        margin=margin_words(first),
        alpha=1 - first.level,
    )
    if any(task.ablations for task in comparison.tasks):
        told += "\n" + ablations.METHOD.format(family=first.ablation_family, alpha=1 - first.level)
    if any(task.changes for task in comparison.tasks):
        told += "\n" + changes.METHOD
    if any(task.recovery or task.noise for task in comparison.tasks):
        told += "\n" + recovery.METHOD
    told += f'\n- "{tables.UNKNOWN}": not recorded.'
    return told


def _in_short(comparison: Comparison) -> str:
    """The first screen: a line a task and grid, and how to read it."""
    lines = []
    for task in comparison.tasks:
        name = task.definition.task
        for decision in decisions(task, comparison.baseline):
            where = ", ".join(filter(None, [name, decision.grid]))
            lines.append(f"- {where}: {decision.short}")
    return "\n".join([*lines, "", _WORDS])


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
    parts += [
        f"![{figures.alt(comparison, path)}]({path})"
        for path in figures.of_task(comparison, definition.task)
    ]
    if labels:
        marked = enumerate(labels.items(), start=1)
        parts.append("\n".join(f"({k}) {named(names)}: {text}." for k, (text, names) in marked))
    warnings = [
        f"- **{warning.code}**{f' ({warning.detail})' if warning.detail else ''}: {warning.advice}."
        for warning in task.warnings
    ]
    speeds = tables.markdown_table(speed_arms.arm_speed_rows(task))
    sections: list[tuple[str, str]] = [
        ("Won back, and the noise floor", recovery.section(task)),
        ("What changed", changes.section(comparison, task)),
        ("What each part of GRACE is worth", ablations.section(comparison, task)),
        ("Warnings", "\n".join(warnings)),
        ("Notes", notes(task)),
        ("Seeds", tables.markdown_table(tables.seed_rows(task))),
        ("Pairs", tables.markdown_table(pairs, _PAIR_TITLES)),
        ("Unparsed, errors, ties", tables.markdown_table(tables.count_rows(task))),
        ("Making", tables.markdown_table(tables.cost_rows(task))),
        ("Speed", "\n\n".join(filter(None, [speed_arms.about(task), speeds]))),
        ("Definition", _definition(task, comparison.baseline)),
    ]
    return parts + [f"### {title}\n\n{text}" for title, text in sections if text]


def _definition(task: TaskComparison, baseline: str) -> str:
    facts = definition_facts(task, baseline)
    return "\n".join(f"- {name}: {value}" for name, value in facts.items())
