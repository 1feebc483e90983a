"""What accuracy costs on one task: against bytes, making and speed, with the arms to choose from.

An arm is on the front if no other is at least as good in both, and better in one; of what making
costs, among quantized arms: a model taken as it came costs nothing. That is said of the estimates;
how sure each is, its interval tells.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from qatbench.report.model import ArmResult, TaskComparison
from qatbench.report.pareto_panel import draw_panel, front_keys, name_points
from qatbench.report.speed_model import cases
from qatbench.report.svg import family_keys, styled, text_of
from qatbench.report.tables import duration, figure, percent

Kind = Literal["size", "cost", "speed"]

_WIDTH, _PANEL, _AROUND = 5.0, 2.15, 0.3  # inches


class Point(NamedTuple):
    """An arm in one panel; `x` in the panel's unit."""

    arm: ArmResult
    x: float


class Panel(NamedTuple):
    """Accuracy against one cost."""

    kind: Kind
    label: str
    points: tuple[Point, ...]
    comparable: bool  # else no front is told: what was measured on different devices
    left_out: tuple[str, ...]  # arms whose cost was not recorded

    @property
    def front(self) -> list[Point]:
        """The points that no other dominates, from low to high `x`; none if not comparable."""
        if not self.comparable:
            return []
        sign = 1 if self.kind == "speed" else -1  # of the better end
        meant = [p for p in self.points if self.kind != "cost" or p.arm.family in ("PTQ", "QAT")]
        best = [mine for mine in meant if not any(_dominates(other, mine, sign) for other in meant)]
        return sorted(best, key=lambda point: (point.x, point.arm.accuracy))


def panels(task: TaskComparison) -> list[Panel]:
    """List the costs that at least two arms have recorded and that tell arms apart."""
    found = [_size(task), _cost(task), _speed(task)]
    return [panel for panel in found if len({point.x for point in panel.points}) > 1]


def draw(task: TaskComparison) -> str:
    """Draw the panels below each other: SVG text."""
    from matplotlib.figure import Figure

    shown = panels(task)
    with styled():
        size = (_WIDTH, _AROUND + _PANEL * len(shown))
        figure = Figure(figsize=size, layout="constrained")
        rows = figure.subplots(len(shown), squeeze=False)[:, 0]
        for axes, panel in zip(rows, shown, strict=True):
            draw_panel(axes, panel)
        keys = [*family_keys(task.arms), *front_keys(shown)]
        figure.legend(
            handles=keys, loc="outside upper left", ncols=len(keys), columnspacing=1.2,
            handletextpad=0.4, handlelength=1.6, borderaxespad=0, borderpad=0.1,
        )  # fmt: skip
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # the panels stay where they are: labels are placed now
        for axes, panel in zip(rows, shown, strict=True):
            name_points(figure, axes, panel)
        return text_of(figure)


def words(task: TaskComparison) -> str:
    """Say what it shows: the text alternative."""
    told = []
    for panel in panels(task):
        best = [f"{p.arm.name} ({_figure(panel, p.x)}, {percent(p.arm.accuracy)})"
                for p in panel.front]  # fmt: skip
        told.append(f"Against {panel.label}{': ' if best else ''}{', '.join(best)}.")
    return (
        f"Accuracy in percent on {task.definition.task} against what it costs, and the arms that no"
        f" other beats in both. {' '.join(told)}"
    )


# --- what is drawn ------------------------------------------------------------------------------


def _size(task: TaskComparison) -> Panel:
    known = [arm for arm in task.arms if arm.checkpoint_bytes is not None]
    points = [Point(arm, (arm.checkpoint_bytes or 0) / 1e6) for arm in known]
    return _made("size", "checkpoint, MB", points, task)


def _cost(task: TaskComparison) -> Panel:
    """Making, with what the arm was made from; a model taken as it came cost nothing here."""
    costs = {arm.name: 0.0 if as_it_came(arm) else arm.cost_seconds for arm in task.arms}
    points = [Point(arm, x) for arm in task.arms if (x := costs[arm.name]) is not None]
    made = [point.arm for point in points if point.x > 0]
    devices = dict.fromkeys(arm.gpu or (arm.device or "unknown device") for arm in made)
    kinds = dict.fromkeys((arm.device or "").split(":")[0] for arm in made)
    on = " and ".join(devices)
    label = f"GPU time to make it, {on}" if set(kinds) == {"cuda"} else f"time to make it, {on}"
    return _made("cost", label, points, task, comparable=len(devices) < 2)


def _speed(task: TaskComparison) -> Panel:
    """Decoding where it was measured in one case, else questions/s in option mode."""
    known = cases(task.arms)
    if known:
        rows = [(arm, arm.speed.row(known[0])) for arm in task.arms if arm.speed]
        decoded = [(arm, row.decode_tokens_per_second) for arm, row in rows if row]
        points = [Point(arm, rate.median) for arm, rate in decoded if rate]
        return _made("speed", f"decoded tokens/s, {known[0].words()}", points, task)
    measured = [arm for arm in task.arms if arm.questions_per_second is not None]
    points = [Point(arm, arm.questions_per_second or 0) for arm in measured]
    on = dict.fromkeys(arm.speed.on for arm in measured if arm.speed)
    return _made("speed", f"questions/s in option mode, {' and '.join(on)}", points, task)


def _made(
    kind: Kind,
    label: str,
    points: Sequence[Point],
    task: TaskComparison,
    *,
    comparable: bool = True,
) -> Panel:
    there = {point.arm.name for point in points}
    missing = tuple(arm.name for arm in task.arms if arm.name not in there)
    told = label if comparable else f"{label}: not to be compared"
    return Panel(kind, told, tuple(points), comparable, missing)


def as_it_came(arm: ArmResult) -> bool:
    """Whether the arm is a 16-bit model that nothing was done to."""
    return arm.family == "16-bit" and arm.method in (None, "base") and not arm.cost_seconds


def _dominates(one: Point, other: Point, sign: int) -> bool:
    gains = (sign * (one.x - other.x), one.arm.accuracy - other.arm.accuracy)
    return min(gains) >= 0 and max(gains) > 0


def _figure(panel: Panel, x: float) -> str:
    if panel.kind == "cost":
        return "nothing" if x == 0 else duration(x)
    unit = panel.label.split()[0].rstrip(",")  # questions/s, or decoded
    told = {"decoded": "tokens/s"}.get(unit, unit)
    return f"{x:.1f} MB" if panel.kind == "size" else f"{figure(x)} {told}"
