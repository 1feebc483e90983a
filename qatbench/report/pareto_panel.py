"""One panel of the Pareto figure: points, the front as steps, names placed where there is room."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from qatbench.report.placing import Box, Name, Spot, place
from qatbench.report.svg import GREY, LOOKS, shown_name
from qatbench.report.tables import duration

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.text import Annotation

    from qatbench.report.pareto import Panel, Point

_TICKS = (0.1, 1, 10, 60, 600, 3600, 36_000, 360_000, 3_600_000)  # s


def draw_panel(axes: Axes, panel: Panel) -> None:
    """Draw a panel but its names; what another arm dominates is pale."""
    front = panel.front
    for point in panel.points:
        look = LOOKS[point.arm.family]
        shown = point in front or not panel.comparable
        axes.plot(
            point.x, 100 * point.arm.accuracy, color=look.colour, marker=look.marker,
            markersize=look.size, linestyle="", alpha=1 if shown else 0.45, zorder=3,
        )  # fmt: skip
    if len(front) > 1:
        xs, ys = [p.x for p in front], [100 * p.arm.accuracy for p in front]
        axes.step(
            xs, ys, where="pre" if panel.kind == "speed" else "post", color=GREY, linewidth=0.8,
            linestyle=(0, (3, 2)),
        )  # fmt: skip
    axes.set_xlabel(panel.label)
    axes.set_ylabel("accuracy, %")
    axes.grid(visible=True)
    axes.margins(x=0.08, y=0.14)
    if panel.kind == "cost":
        _seconds(axes, panel.points)


def _seconds(axes: Axes, points: Sequence[Point]) -> None:
    """A logarithmic axis with a place for nothing: costs span from seconds to days."""
    made = [point.x for point in points if point.x > 0]
    least, most = min(made), max(made)
    if len(made) < len(points):
        axes.set_xscale("symlog", linthresh=least, linscale=0.3)
        axes.set_xlim(left=-0.25 * least)
    elif most > 3 * least:
        axes.set_xscale("log")
    ticks = [tick for tick in _TICKS if least / 1.5 <= tick <= most * 1.5] or [least]
    if len(made) == len(points) and len(ticks) < 2:
        axes.xaxis.set_major_formatter("{x:g} s")
        return
    ticks = [0.0] * (len(made) < len(points)) + ticks
    axes.set_xticks(ticks, ["nothing" if tick == 0 else duration(tick) for tick in ticks])
    axes.minorticks_off()


def front_keys(panels: Sequence[Panel]) -> list[Line2D]:
    """The legend's entry of the front, where there is one."""
    from matplotlib.lines import Line2D

    if not any(len(panel.front) > 1 for panel in panels):
        return []
    return [Line2D([], [], color=GREY, linewidth=0.8, linestyle=(0, (3, 2)), label="best trade")]


def name_points(figure: Figure, axes: Axes, panel: Panel) -> None:
    """Name the arms on the front, or all where no front is told, each where nothing else lies.

    A name for which the panel has no room is left out, and the panel says so.
    """
    named = panel.front if panel.comparable else list(panel.points)
    named = sorted(named, key=lambda point: -point.arm.accuracy)
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    renderer = FigureCanvasAgg(figure).get_renderer()  # type: ignore[no-untyped-call]
    labels = [_label(axes, point) for point in named]
    sizes = [label.get_window_extent(renderer) for label in labels]
    spots = [_spot(axes, point) for point in named]
    places = place(
        [Name(spot, box.width, box.height) for spot, box in zip(spots, sizes, strict=True)],
        Box(*axes.get_window_extent(renderer).extents),
        [_spot(axes, point) for point in panel.points],
        _steps(axes, panel),
    )
    for label, (x, y), placed in zip(labels, spots, places, strict=True):
        if placed is None:
            label.remove()
            continue
        label.set_position((placed.box.x0 - x, placed.box.y0 - y))
        if placed.leader:
            _draw_leader(axes, label, placed.leader)
    if missing := places.count(None):
        axes.set_xlabel(f"{panel.label}; no room to name {missing} more")


def _label(axes: Axes, point: Point) -> Annotation:
    """The name, its lower left corner at the point."""
    return axes.annotate(
        shown_name(point.arm.name), (point.x, 100 * point.arm.accuracy), xytext=(0, 0),
        textcoords="offset points", fontsize=7, color=LOOKS[point.arm.family].colour,
        horizontalalignment="left", verticalalignment="bottom",
    )  # fmt: skip


def _draw_leader(axes: Axes, label: Annotation, leader: tuple[Spot, Spot]) -> None:
    from matplotlib.transforms import IdentityTransform

    (x0, y0), (x1, y1) = leader
    axes.plot(
        [x0, x1], [y0, y1], transform=IdentityTransform(), color=label.get_color(), linewidth=0.5,
        alpha=0.8, zorder=2,
    )  # fmt: skip


def _spot(axes: Axes, point: Point) -> Spot:
    """Where a point is drawn: points of the figure, as its dpi is 72."""
    x, y = axes.transData.transform((point.x, 100 * point.arm.accuracy))
    return float(x), float(y)


def _steps(axes: Axes, panel: Panel) -> list[Box]:
    """The front's level and upright stretches."""
    found = []
    spots = [_spot(axes, point) for point in panel.front]
    for (x0, y0), (x1, y1) in pairwise(spots):
        corner = (x0, y1) if panel.kind == "speed" else (x1, y0)
        for x, y in ((x0, y0), (x1, y1)):
            across, up = sorted((x, corner[0])), sorted((y, corner[1]))
            found.append(Box(across[0], up[0], across[1], up[1]))
    return found
