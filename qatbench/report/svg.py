"""What all figures share: colours, style, and SVG text that is the same bytes each time.

They are read on white and on black pages: no background, axes in a grey between the two, and
colours that stand out on both and to colour-blind eyes, told apart by shape or dashes as well.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from qatbench.report.model import ArmResult, Comparison, Family, TaskComparison

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

GREY = "#787878"
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#AA4499", "#2E93CC", "#B87F00", "#7B6FD0", "#C0507A")
LONGEST_NAME = 30  # characters of an arm's name; of a longer one the middle is left out
FULL = "16 bits"
STYLE: Any = {  # Any: matplotlib lists every name of a setting as a literal
    "svg.hashsalt": "qatbench",  # else ids are random
    "svg.fonttype": "none",  # text stays text
    "font.sans-serif": ["DejaVu Sans"],  # comes with matplotlib; a viewer without it takes its own
    "font.size": 8,
    "figure.dpi": 72,  # a pixel is a point, as in the SVG
    "text.color": GREY,
    "text.parse_math": False,  # a name may hold a dollar sign
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
    "legend.frameon": False,
    "lines.linewidth": 1.2,
}


class Look(NamedTuple):
    """How the arms of a family are drawn."""

    colour: str
    marker: str
    size: float  # points


LOOKS: dict[Family, Look] = {
    "16-bit": Look(COLOURS[2], "s", 5.0),
    "PTQ": Look(COLOURS[0], "o", 5.5),
    "QAT": Look(COLOURS[1], "^", 6.0),
    "unknown": Look(COLOURS[3], "D", 4.5),
}


@contextmanager
def styled() -> Iterator[None]:
    """Draw within: whatever the user's own settings are, they are not used, and left alone."""
    import matplotlib as mpl  # slow to import, and only needed to write a report

    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(STYLE)
        yield


def text_of(figure: Figure) -> str:
    """Write a figure as SVG, without a date, on no background."""
    stream = io.StringIO()
    figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return re.sub(r'(?<= d=")[^"]+', _shortened, stream.getvalue())


def family_keys(arms: tuple[ArmResult, ...]) -> list[Line2D]:
    """Legend entries of the families that are there."""
    from matplotlib.lines import Line2D

    there = {arm.family for arm in arms}
    return [
        Line2D([], [], color=look.colour, marker=look.marker, markersize=look.size, linestyle="",
               label=family)
        for family, look in LOOKS.items()
        if family in there
    ]  # fmt: skip


def shown_name(name: str) -> str:
    """Leave out the middle of a long name."""
    if len(name) <= LONGEST_NAME:
        return name
    half = (LONGEST_NAME - 1) // 2
    return f"{name[:half]}…{name[-half:]}"


def group_of(arm: ArmResult) -> str:
    """The heading under which an arm stands: its grid, or that it has none."""
    return FULL if arm.family == "16-bit" else arm.grid


def slugs(comparison: Comparison) -> list[tuple[TaskComparison, str]]:
    """Each task with a part of a file name that no other task has, on any file system."""
    taken: set[str] = set()
    named = []
    for task in comparison.tasks:
        words = re.sub(r"[^A-Za-z0-9._-]+", "-", task.definition.task).strip("-.")[:60] or "task"
        slug, k = words, 1
        while slug.lower() in taken:
            k += 1
            slug = f"{words}-{k}"
        taken.add(slug.lower())
        named.append((task, slug))
    return named


def _shortened(path: re.Match[str]) -> str:
    """Round a path's coordinates to a tenth of a point: half the bytes, and no eye sees it."""
    rounded = re.sub(r"-?\d+\.\d+", lambda number: f"{float(number[0]):.1f}", path[0])
    return re.sub(r"\s*([A-Za-z])\s*", r"\1", rounded)
