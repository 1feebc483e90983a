"""The parts of report.html that fold, task by task: what is added to `sections` is on the page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from qatbench.report import cells, speed_arms, tables
from qatbench.report.details import Changes
from qatbench.report.facts import notes
from qatbench.report.model import Comparison, TaskComparison

LENGTHY = 100  # rows of a part, all tables together


class Section(NamedTuple):
    """A title that unfolds to a text, in the marks of `prose`, and tables below it."""

    title: str
    anchor: str  # unique among those of its task
    tables: Sequence[cells.Table | None] = ()  # of `cells.table(label, rows)`, or made by hand
    text: str = ""
    about: str = ""  # what is inside, beside the title
    unfolded: bool = False

    @property
    def lengthy(self) -> bool:
        """Whether it would take pages: it is printed only if the reader has unfolded it."""
        return sum(len(table.rows) for table in self.tables if table) > LENGTHY


def sections(comparison: Comparison, task: TaskComparison) -> list[Section]:
    """All parts of a task, in their order; those without content are left out."""
    made = [
        _worth(comparison, task),
        _groups(task),
        *_answers(task),
        _pairs(comparison, task),
        Section(
            "Seed by seed", "seeds", [cells.seeds_table(task)], about="what each training scored"
        ),
        Section(
            "What each arm cost to make",
            "cost",
            [cells.table("Means over seeds, on the device stated", tables.cost_rows(task))],
            about="time, samples, device",
        ),
        Section(
            "How fast each arm runs",
            "speed",
            [cells.table("Decoding, prefill and memory", speed_arms.arm_speed_rows(task))],
            speed_arms.about(task),
            about="tokens a second, by engine and batch",
        ),
        Section(
            "Unparsed, errors, ties",
            "counts",
            [cells.table("Rows of all seeds together", tables.count_rows(task))],
            about="rows without a plain answer",
        ),
        Section("Notes on the arms", "notes", text=notes(task)),
    ]
    return [section for section in made if section.text or any(section.tables)]


def contested(task: TaskComparison, change: Changes) -> bool:
    """Whether the verdict is about that pair."""
    return any({p.arm, p.reference} == {change.arm, change.reference} for p in task.contests)


def contests_first(task: TaskComparison) -> list[Changes]:
    """The pairs that the verdict is about, then the others."""
    return sorted(task.changes, key=lambda change: not contested(task, change))


def _worth(comparison: Comparison, task: TaskComparison) -> Section:
    rows = tables.of_task(tables.ablation_rows(comparison), task.definition.task)
    pairs = [ablation.pair for ablation in task.ablations]
    margin = task.definition.margin
    notes = [
        f"- `{ablation.pair.arm}` - `{ablation.pair.reference}`: the arms also differ in"
        f" {', '.join(ablation.differing)}."
        for ablation in task.ablations
        if ablation.differing
    ]
    return Section(
        "What each part of GRACE is worth",
        "parts",
        [cells.pairs_table("With the part minus without it", pairs, rows, margin)],
        "\n".join([*notes, *(f"- {sentence}." for sentence in task.not_ablated)]),
        f"{len(rows)} ablations",
        unfolded=True,
    )


def _groups(task: TaskComparison) -> Section:
    margin = task.definition.margin
    made = [cells.groups_table(change, margin) for change in contests_first(task)]
    return Section(
        "Where they differ: group by group",
        "groups",
        made,
        about=f"{sum(table is not None for table in made)} pairs by subject, category, context",
    )


def _answers(task: TaskComparison) -> list[Section]:
    every = cells.changes_table("Every pair", contests_first(task))
    return [
        Section(
            "What changed, pair by pair",
            "every",
            [every],
            about=f"{len(task.changes)} pairs: flips, divergence, margins",
        ),
        Section(
            "Do the arms answer alike?",
            "agreement",
            [cells.agreement_table(task.agreement)] if task.agreement else [],
            about="share of equal answers, each arm with each",
        ),
    ]


def _pairs(comparison: Comparison, task: TaskComparison) -> Section:
    rows = tables.of_task(tables.pair_rows(comparison), task.definition.task)
    pairs = tables.stated_pairs(task)
    return Section(
        "All pairs",
        "pairs",
        [cells.pairs_table("Arm minus reference", pairs, rows, task.definition.margin)],
        about=f"{len(rows)} differences with p, verdict and seeds",
    )
