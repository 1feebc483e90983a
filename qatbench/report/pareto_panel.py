"""One panel of the Pareto figure: points, the front as steps, names placed where there is room."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from qatbench.report.svg import GREY, LOOKS, shown_name
from qatbench.report.tables import duration

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.transforms import Bbox

    from qatbench.report.pareto import Panel, Point

_TICKS = (0.1, 1, 10, 60, 600, 3600, 36_000, 360_000, 3_600_000)  # s
_PLACES = ((4, 3, "left", "bottom"), (4, -3, "left", "top"), (-4, 3, "right", "bottom"),
           (-4, -3, "right", "top"), (4, 12, "left", "bottom"), (4, -12, "left", "top"),
           (-4, 12, "right", "bottom"), (-4, -12, "right", "top"))  # fmt: skip
_REACH = 3.0  # points around a marker that a name keeps away from


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
    ticks = [0.0] * (len(made) < len(points))
    ticks += [tick for tick in _TICKS if least / 1.5 <= tick <= most * 1.5]
    axes.set_xticks(ticks, ["nothing" if tick == 0 else duration(tick) for tick in ticks])
    axes.minorticks_off()


def front_keys(panels: Sequence[Panel]) -> list[Line2D]:
    """The legend's entry of the front, where there is one."""
    from matplotlib.lines import Line2D

    if not any(len(panel.front) > 1 for panel in panels):
        return []
    return [Line2D([], [], color=GREY, linewidth=0.8, linestyle=(0, (3, 2)), label="best trade")]


def name_points(figure: Figure, axes: Axes, panel: Panel) -> None:
    """Name the arms on the front, or all where no front is told, each where nothing else lies."""
    named = panel.front if panel.comparable else list(panel.points)
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    renderer = FigureCanvasAgg(figure).get_renderer()  # type: ignore[no-untyped-call]
    frame = axes.get_window_extent(renderer)
    taken = [_around(axes, point) for point in panel.points]
    for point in sorted(named, key=lambda p: -p.arm.accuracy):
        label = axes.annotate(
            shown_name(point.arm.name), (point.x, 100 * point.arm.accuracy),
            textcoords="offset points", xytext=(0, 0), fontsize=7,
            color=LOOKS[point.arm.family].colour,
        )  # fmt: skip
        best: tuple[float, int] | None = None
        for k, (x, y, across, up) in enumerate(_PLACES):
            label.set(position=(x, y), horizontalalignment=across, verticalalignment=up)
            box = label.get_window_extent(renderer)
            cost = _overlap(box, taken) + 1e4 * (not _inside(box, frame))
            if best is None or cost < best[0]:
                best = cost, k
        assert best is not None
        x, y, across, up = _PLACES[best[1]]
        label.set(position=(x, y), horizontalalignment=across, verticalalignment=up)
        taken.append(label.get_window_extent(renderer))


def _around(axes: Axes, point: Point) -> Bbox:
    from matplotlib.transforms import Bbox

    x, y = axes.transData.transform((point.x, 100 * point.arm.accuracy))
    return Bbox.from_extents(x - _REACH, y - _REACH, x + _REACH, y + _REACH)


def _overlap(box: Bbox, others: Sequence[Bbox]) -> float:
    shared = 0.0
    for other in others:
        width = min(box.x1, other.x1) - max(box.x0, other.x0)
        height = min(box.y1, other.y1) - max(box.y0, other.y0)
        shared += max(0.0, width) * max(0.0, height)
    return shared


def _inside(box: Bbox, frame: Bbox) -> bool:
    across = frame.x0 <= box.x0 and box.x1 <= frame.x1
    return bool(across and frame.y0 <= box.y0 and box.y1 <= frame.y1)
