"""Figures beside report.md: SVG text, a pure function of the comparison, the same bytes each time.

They are read on white and on black pages: no background, axes in a grey between the two, and line
colours that stand out on both and to colour-blind eyes, told apart by dashes as well.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

from qatbench.report.model import Comparison, Course, Curve, Term

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TRAINING_FIGURE = "figures/training.svg"
TERMS: tuple[Term, ...] = get_args(Term)
TOGETHER = 6  # arms; more than these are drawn grid by grid
MOST_LINES = 8  # in one panel

GREY = "#787878"
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#AA4499", "#2E93CC", "#B87F00", "#7B6FD0", "#C0507A")
_DASHES = ("-", (0, (4, 1.5)))  # by turns: a line that lies on its neighbour lets it show
_LABELS: dict[Term, str] = {
    "ce": "CE, nats a token",
    "kd": "KD, nats",
    "rcka": "RCKA, 1 - CKA",
    "gate": "gate",
    "beta": "beta",
}
_STYLE: Any = {  # Any: matplotlib lists every name of a setting as a literal
    "svg.hashsalt": "qatbench",  # else ids are random
    "svg.fonttype": "none",  # text stays text
    "font.sans-serif": ["DejaVu Sans"],  # comes with matplotlib; a viewer without it takes its own
    "font.size": 8,
    "text.color": GREY,
    "axes.edgecolor": GREY,
    "axes.labelcolor": GREY,
    "axes.titlesize": 8,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "grid.color": GREY,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.5,
    "lines.linewidth": 1.2,
}


class _Group(NamedTuple):
    """Arms that share their panels."""

    title: str
    courses: tuple[Course, ...]


def figures(comparison: Comparison) -> dict[str, str]:
    """Path beside report.md -> SVG; empty when no training was recorded in curves."""
    shown = drawn(comparison)
    return {TRAINING_FIGURE: _training(_groups(comparison, shown))} if shown else {}


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
        by_grid.setdefault("16 bits" if arm.family == "16-bit" else arm.grid, []).append(course)
    return [
        _Group(title, tuple(courses[k : k + MOST_LINES]))
        for title, courses in by_grid.items()
        for k in range(0, len(courses), MOST_LINES)
    ]


def _training(groups: Sequence[_Group]) -> str:
    import matplotlib as mpl  # slow to import, and only needed to write a report
    from matplotlib.figure import Figure

    courses = [course for group in groups for course in group.courses]
    terms = [term for term in TERMS if any(term in course.curves for course in courses)]
    with mpl.rc_context():
        mpl.rcdefaults()  # whatever the user's own settings are
        mpl.rcParams.update(_STYLE)
        figure = Figure(layout="constrained")
        lay_out = _together if len(groups) == 1 else _side_by_side
        for group, term, axes in lay_out(figure, groups, terms):
            if term is None:
                _legend(axes, group)
            else:
                _panel(axes, group, term)
        figure.supxlabel("optimizer step", fontsize=_STYLE["font.size"])
        stream = io.StringIO()
        figure.savefig(
            stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None}
        )
    return re.sub(r'(?<= d=")[^"]+', _shortened, stream.getvalue())


def _shortened(path: re.Match[str]) -> str:
    """Round a path's coordinates to a tenth of a point: half the bytes, and no eye sees it."""
    rounded = re.sub(r"-?\d+\.\d+", lambda number: f"{float(number[0]):.1f}", path[0])
    return re.sub(r"\s*([A-Za-z])\s*", r"\1", rounded)


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
    legend = axes.legend(
        [Line2D([], [], color=colour, linestyle=dash) for colour, dash in looks],
        [course.arm for course in group.courses],
        title=group.title or None,
        loc="upper left",
        frameon=False,
        handlelength=2.6,
    )
    for text in legend.get_texts():
        text.set_parse_math(False)  # a name may hold a dollar sign


def _look(k: int) -> tuple[str, Any]:
    return COLOURS[k % len(COLOURS)], _DASHES[k % len(_DASHES)]


def _gaps(values: Sequence[float | None]) -> list[float]:
    return [float("nan") if value is None else value for value in values]
