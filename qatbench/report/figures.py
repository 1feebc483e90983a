"""Figures beside report.md: SVG text, a pure function of the comparison, the same bytes each time.

Of each task the accuracies (`forest`) and what they cost (`pareto`); how the trainings went.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

from qatbench.report import forest, pareto
from qatbench.report.model import Comparison, Course, Curve, Term
from qatbench.report.svg import COLOURS, STYLE, group_of, slugs, styled, text_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TRAINING_FIGURE = "figures/training.svg"
PATTERNS = (TRAINING_FIGURE, "figures/accuracy-*.svg", "figures/pareto-*.svg")  # all there can be
TERMS: tuple[Term, ...] = get_args(Term)
TOGETHER = 6  # arms; more than these are drawn grid by grid
MOST_LINES = 8  # in one panel

_DASHES = ("-", (0, (4, 1.5)))  # by turns: a line that lies on its neighbour lets it show
_LABELS: dict[Term, str] = {
    "ce": "CE, nats a token",
    "kd": "KD, nats",
    "rcka": "RCKA, 1 - CKA",
    "gate": "gate",
    "beta": "beta",
}


class _Group(NamedTuple):
    """Arms that share their panels."""

    title: str
    courses: tuple[Course, ...]


def figures(comparison: Comparison) -> dict[str, str]:
    """Path beside report.md -> SVG.

    Of each task its accuracies, and its costs where two arms have any; the trainings where their
    curves were recorded. What `PATTERNS` match beside it and is not here is of an older comparison.
    """
    texts: dict[str, str] = {}
    for task, slug in slugs(comparison):
        texts[_accuracy(slug)] = forest.draw(task, comparison.baseline)
        if pareto.panels(task):
            texts[_pareto(slug)] = pareto.draw(task)
    shown = drawn(comparison)
    return texts | ({TRAINING_FIGURE: _training(_groups(comparison, shown))} if shown else {})


def of_task(comparison: Comparison, task: str) -> tuple[str, ...]:
    """Paths of a task's figures: accuracies, then costs if they are drawn."""
    block, slug = next((b, s) for b, s in slugs(comparison) if b.definition.task == task)
    return (_accuracy(slug), _pareto(slug)) if pareto.panels(block) else (_accuracy(slug),)


def alt(comparison: Comparison, path: str) -> str:
    """Say in words what a figure shows, without brackets, which end such a text in Markdown.

    Raises: KeyError if this comparison has no such figure.
    """
    words = {TRAINING_FIGURE: _in_words(drawn(comparison))} if drawn(comparison) else {}
    for task, slug in slugs(comparison):
        words[_accuracy(slug)] = forest.words(task, comparison.baseline)
        if pareto.panels(task):
            words[_pareto(slug)] = pareto.words(task)
    return words[path].translate(str.maketrans("[]", "()"))


def _accuracy(slug: str) -> str:
    return f"figures/accuracy-{slug}.svg"


def _pareto(slug: str) -> str:
    return f"figures/pareto-{slug}.svg"


def drawn(comparison: Comparison) -> tuple[Course, ...]:
    """Trainings that the figure shows; those recorded before there were curves are not."""
    return tuple(course for course in comparison.training if course.curves)


def _groups(comparison: Comparison, shown: Sequence[Course]) -> list[_Group]:
    """All arms together if they are few, else grid by grid, at most MOST_LINES in each."""
    if len(shown) <= TOGETHER:
        return [_Group("", tuple(shown))]
    by_grid: dict[str, list[Course]] = {}
    for course in shown:
        arm = comparison.tasks[0].arm(course.arm)
        by_grid.setdefault(group_of(arm), []).append(course)
    return [
        _Group(title, tuple(courses[k : k + MOST_LINES]))
        for title, courses in by_grid.items()
        for k in range(0, len(courses), MOST_LINES)
    ]


def _in_words(shown: Sequence[Course]) -> str:
    names = {"ce": "CE", "kd": "KD", "rcka": "RCKA"}
    terms = [term for term in TERMS if any(term in course.curves for course in shown)]
    return (
        f"Curves over the optimizer steps of {', '.join(names.get(t, t) for t in terms)}, a line"
        f" an arm: {', '.join(course.arm for course in shown)}. The table below tells where each"
        " began, was half-way, and ended."
    )


def _training(groups: Sequence[_Group]) -> str:
    from matplotlib.figure import Figure

    courses = [course for group in groups for course in group.courses]
    terms = [term for term in TERMS if any(term in course.curves for course in courses)]
    with styled():
        figure = Figure(layout="constrained")
        lay_out = _together if len(groups) == 1 else _side_by_side
        for group, term, axes in lay_out(figure, groups, terms):
            if term is None:
                _legend(axes, group)
            else:
                _panel(axes, group, term)
        figure.supxlabel("optimizer step", fontsize=STYLE["font.size"])
        return text_of(figure)


def _together(
    figure: Figure, groups: Sequence[_Group], terms: Sequence[Term]
) -> Iterator[tuple[_Group, Term | None, Axes]]:
    """Panels in rows of up to three, the legend in the cell after the last."""
    cells: list[Term | None] = [*terms, None]
    columns = min(3, len(cells))
    rows = -(-len(cells) // columns)
    figure.set_size_inches(2.9 * columns, 2.1 * rows)
    grid = figure.subplots(rows, columns, squeeze=False).flat
    for axes, term in zip(grid, cells, strict=False):
        yield groups[0], term, axes
    for axes in list(figure.axes)[len(cells) :]:
        axes.set_axis_off()


def _side_by_side(
    figure: Figure, groups: Sequence[_Group], terms: Sequence[Term]
) -> Iterator[tuple[_Group, Term | None, Axes]]:
    """A column a group, a row a term, the legend of each group on top."""
    most = max(len(group.courses) for group in groups)
    top = 0.3 + 0.17 * most  # inches
    figure.set_size_inches(2.6 * len(groups), top + 1.6 * len(terms))
    grid = figure.subplots(
        1 + len(terms), len(groups), squeeze=False, height_ratios=[top, *[1.6] * len(terms)]
    )
    for column, group in enumerate(groups):
        for row, term in enumerate([None, *terms]):
            yield group, term, grid[row, column]


def _panel(axes: Axes, group: _Group, term: Term) -> None:
    for k, course in enumerate(group.courses):
        if term in course.curves:
            _line(axes, course.points, course.curves[term], k)
    if axes.lines:
        axes.set_title(_LABELS[term])
        axes.grid(visible=True)
    else:
        axes.set_axis_off()


def _line(axes: Axes, points: Sequence[float], curve: Curve, k: int) -> None:
    colour, dash = _look(k)
    axes.plot(points, _gaps(curve.mean), color=colour, linestyle=dash)
    if curve.low:
        low, high = _gaps(curve.low), _gaps(curve.high)
        axes.fill_between(points, low, high, color=colour, alpha=0.2, linewidth=0)


def _legend(axes: Axes, group: _Group) -> None:
    from matplotlib.lines import Line2D

    axes.set_axis_off()
    looks = [_look(k) for k in range(len(group.courses))]
    axes.legend(
        [Line2D([], [], color=colour, linestyle=dash) for colour, dash in looks],
        [course.arm for course in group.courses],
        title=group.title or None,
        loc="upper left",
        handlelength=2.6,
    )


def _look(k: int) -> tuple[str, Any]:
    return COLOURS[k % len(COLOURS)], _DASHES[k % len(_DASHES)]


def _gaps(values: Sequence[float | None]) -> list[float]:
    return [float("nan") if value is None else value for value in values]
