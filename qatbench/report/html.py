"""report.html: the verdict on the first screen, then every number and what is behind it.

One file that opens offline and asks nobody for anything: style, script, figures and pictures are
inside. A pure function of the comparison, the figures drawn of it, and the questions handed over.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from markupsafe import Markup

from qatbench.report import cells, training
from qatbench.report.cards import VerdictCard, cards, headline
from qatbench.report.drawings import inlined
from qatbench.report.facts import definition_facts
from qatbench.report.figures import TRAINING_FIGURE, of_task
from qatbench.report.gallery import Gallery, Wall, walls
from qatbench.report.markdown import method
from qatbench.report.model import Comparison, TaskComparison
from qatbench.report.prose import inline, prose
from qatbench.report.recovery import sentences
from qatbench.report.sections import Section, contested, contests_first, sections
from qatbench.report.verdict import margin_words

TEMPLATES = Path(__file__).with_name("templates")
UNTESTED = "not testable here"
_FIGURES = {
    "accuracy": "Accuracy of every arm with its interval",
    "pareto": "Accuracy against what an arm costs",
    "training": "Course of the training losses",
}


class _Figure(NamedTuple):
    title: str
    svg: Markup


class _Block(NamedTuple):
    """One task as the template lays it out."""

    anchor: str
    task: TaskComparison
    headline: str
    cards: list[VerdictCard]
    arms: cells.Table
    labels: str
    figures: list[_Figure]
    behind: list[str]  # recovery and noise floor
    changed: cells.Table | None  # of the pairs that the verdict is about
    walls: list[Wall]
    unfolded: Wall | None  # of the pair in which most changed
    scored: bool  # whether any pair has KL and margins
    sections: list[Section]
    facts: dict[str, str]


def render(
    comparison: Comparison,
    *,
    figures: Mapping[str, str] | None = None,
    gallery: Gallery | None = None,
) -> str:
    """Render report.html.

    Args:
        comparison: what it says.
        figures: path beside report.md -> SVG; which are of a task, `figures.of_task` says.
        gallery: (task, id of a row) -> question, of the questions that may be shown; without it
            the gallery holds ids and letters only.

    Raises: ArtifactError for a figure that is not SVG or not self-contained.
    """
    drawn = dict(figures or {})
    first = comparison.tasks[0].definition
    blocks = [
        _block(comparison, task, f"task-{k}", drawn, gallery)
        for k, task in enumerate(comparison.tasks, start=1)
    ]
    placed = {
        path
        for task in comparison.tasks
        for path in _figures_of(comparison, task.definition.task, drawn)
    }
    page = _template().render(
        style=Markup((TEMPLATES / "report.css").read_text(encoding="utf-8")),
        script=Markup((TEMPLATES / "report.js").read_text(encoding="utf-8")),
        comparison=comparison,
        recipe=next((t.definition.recipe for t in comparison.tasks if t.definition.recipe), ""),
        models=dict.fromkeys(name for task in comparison.tasks for name in task.definition.model),
        baseline=comparison.baseline,
        blocks=blocks,
        claims=_claims(comparison),
        training=_training(comparison, drawn),
        figures=[
            _figure(path, svg)
            for path, svg in drawn.items()
            if path not in placed and path != TRAINING_FIGURE
        ],
        margin=margin_words(first),
        method=method(comparison),
        any_flips=any(block.walls for block in blocks),
        warned=sum(len(task.warnings) for task in comparison.tasks),
        contested=any(task.contests for task in comparison.tasks),
    )
    return page.lstrip()


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"prose": prose, "inline": inline, "link": cells.link}
    return environment.get_template("report.html.jinja")


def _block(
    comparison: Comparison,
    task: TaskComparison,
    anchor: str,
    figures: Mapping[str, str],
    gallery: Gallery | None,
) -> _Block:
    made = cards(comparison, task)
    shipped = {card.decision.shipped.name for card in made if card.contest}
    contests = [change for change in task.changes if contested(task, change)]
    shown = walls(contests_first(task), task.definition.task, gallery)
    return _Block(
        anchor=anchor,
        task=task,
        headline=headline(task, made),
        cards=made,
        arms=cells.arms_table(comparison, task, shipped),
        labels=_labels(task),
        figures=[
            _figure(path, figures[path])
            for path in _figures_of(comparison, task.definition.task, figures)
        ],
        behind=sentences(task),
        changed=cells.changes_table("Pairs that the verdict is about", contests),
        walls=shown,
        unfolded=max(
            [wall for wall in shown if wall.changes in contests] or shown,
            key=lambda wall: wall.changes.lost + wall.changes.gained,
            default=None,
        ),
        scored=any(change.divergence for change in task.changes),
        sections=sections(comparison, task),
        facts=definition_facts(task, comparison.baseline),
    )


def _labels(task: TaskComparison) -> str:
    """What weights really are, where an arm says so."""
    told: dict[str, list[str]] = {}
    for arm in task.arms:
        if arm.label:
            told.setdefault(arm.label, []).append(f"`{arm.name}`")
    return " ".join(f"{', '.join(names)}: {label}." for label, names in told.items())


def _figures_of(comparison: Comparison, task: str, figures: Mapping[str, str]) -> list[str]:
    """A task's figures among those that were drawn."""
    return [path for path in of_task(comparison, task) if path in figures]


def _figure(path: str, svg: str) -> _Figure:
    kind, _, about = Path(path).stem.partition("-")
    title = _FIGURES.get(kind, kind) + (f": {about}" if about else "")
    return _Figure(title, inlined(svg, Path(path).stem, title))


def _training(comparison: Comparison, figures: Mapping[str, str]) -> dict[str, Any]:
    """The figure, the table and what its columns are; {} where nothing was trained."""
    if not comparison.training:
        return {}
    titles = {"ce": "CE", "kd": "KD", "rcka": "RCKA"}
    rows = training.course_rows(comparison.training)
    svg = figures.get(TRAINING_FIGURE)
    return {
        "figure": _figure(TRAINING_FIGURE, svg) if svg else None,
        "table": cells.table("Where each training began, was half-way, and ended", rows, titles),
        "text": training.paragraphs(comparison)[-1],
    }


def _claims(comparison: Comparison) -> dict[str, Any]:
    """The claims that could be tested, the others, and how many have each verdict."""
    counts: dict[str, int] = {}
    for claim in comparison.claims:
        counts[claim.verdict] = counts.get(claim.verdict, 0) + 1
    tasks = "|".join(re.escape(task.definition.task) for task in comparison.tasks)
    told = [(claim, re.split(rf"; (?=(?:{tasks})[,:])", claim.here)) for claim in comparison.claims]
    return {
        "words": ", ".join(f"{count} {verdict}" for verdict, count in counts.items()),
        "tested": [pair for pair in told if pair[0].verdict != UNTESTED],
        "untested": [pair for pair in told if pair[0].verdict == UNTESTED],
    }
