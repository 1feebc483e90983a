"""The accuracies of one task: a row an arm, grid by grid, its interval a line."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qatbench.report.model import ArmResult, TaskComparison
from qatbench.report.svg import (
    FULL,
    GREY,
    LOOKS,
    family_keys,
    group_of,
    shown_name,
    styled,
    text_of,
)
from qatbench.report.tables import interval, percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.lines import Line2D

_WIDTH, _ROW, _AROUND = 5.0, 0.165, 0.85  # inches; around: legend, ticks and label
_LEAST = 0.4  # of the axis is left to the arms; a chance further away is told by an arrow


def draw(task: TaskComparison, baseline: str) -> str:
    """Draw the forest plot: SVG text."""
    from matplotlib.figure import Figure

    groups = grouped(task)
    rows = sum(map(len, groups.values())) + len(groups)
    with styled():
        figure = Figure(figsize=(_WIDTH, _AROUND + _ROW * rows), layout="constrained")
        axes = figure.subplots()
        _rows(axes, groups)
        keys = [*family_keys(task.arms), *_lines(axes, task, baseline)]
        figure.legend(
            handles=keys, loc="outside upper left", ncols=len(keys), columnspacing=1.2,
            handletextpad=0.4, handlelength=1.4, borderaxespad=0, borderpad=0.1,
        )  # fmt: skip
        axes.set_ylim(rows - 0.4, -0.6)
        axes.set_xlabel("accuracy, %; line: 95 % interval; strokes: seeds")
        axes.grid(visible=True, axis="x")
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="y", length=0)
        return text_of(figure)


def words(task: TaskComparison, baseline: str) -> str:
    """Say what it shows: the text alternative."""
    told = [
        f"{group}: {', '.join(f'{arm.name} {percent(arm.accuracy)}' for arm in arms)}"
        for group, arms in grouped(task).items()
    ]
    chance = _chance(task)
    guess = "" if chance is None else f" Guessing gives {percent(chance)}."
    return (
        f"Accuracy in percent on {task.definition.task} with 95 % intervals, grid by grid, against"
        f" the baseline {baseline}. {'; '.join(told)}.{guess}"
    )


def grouped(task: TaskComparison) -> dict[str, list[ArmResult]]:
    """Arms under their headings, those of 16 bits first, else in the order asked for."""
    groups: dict[str, list[ArmResult]] = {FULL: []}
    for arm in task.arms:
        groups.setdefault(group_of(arm), []).append(arm)
    return {title: arms for title, arms in groups.items() if arms}


def _rows(axes: Axes, groups: dict[str, list[ArmResult]]) -> None:
    """Draw a row each: the group's heading, then its arms with their figures at the right."""
    labels: list[str] = []
    for title, arms in groups.items():
        if labels:
            axes.axhline(len(labels) - 0.5, color=GREY, alpha=0.25, linewidth=0.5)
        headings = len(labels)
        labels.append(title)
        for row, arm in enumerate(arms, start=headings + 1):
            _row(axes, arm, row)
            labels.append(shown_name(arm.name))
    axes.set_yticks(range(len(labels)), labels)
    heads = set(groups)
    for text, label in zip(axes.get_yticklabels(), labels, strict=True):
        text.set_fontweight("bold" if label in heads else "normal")


def _row(axes: Axes, arm: ArmResult, row: int) -> None:
    look = LOOKS[arm.family]
    axes.plot([100 * arm.low, 100 * arm.high], [row, row], color=look.colour, zorder=2)
    axes.plot(100 * arm.accuracy, row, color=look.colour, marker=look.marker,
              markersize=look.size, zorder=3)  # fmt: skip
    if len(arm.seeds) > 1:
        seeds = [100 * accuracy for accuracy in arm.accuracies]
        axes.plot(seeds, [row] * len(seeds), color=look.colour, marker="|", markersize=7,
                  markeredgewidth=0.8, linestyle="", zorder=2)  # fmt: skip
    axes.text(
        1.02, row, f"{percent(arm.accuracy)} {interval(arm.low, arm.high)}",
        transform=axes.get_yaxis_transform(), va="center_baseline", fontsize=7,
    )  # fmt: skip


def _lines(axes: Axes, task: TaskComparison, baseline: str) -> list[Line2D]:
    """Draw the baseline, and chance unless it is so far off that the arms would be squeezed."""
    at = 100 * task.arm(baseline).accuracy
    label = f"baseline {shown_name(baseline)}"
    lines = [axes.axvline(at, color=GREY, linestyle=(0, (4, 2)), zorder=1, label=label)]
    chance = _chance(task)
    if chance is None:
        return lines
    lows, highs = [100 * arm.low for arm in task.arms], [100 * arm.high for arm in task.arms]
    first, last = min(lows), max(highs)
    if first - 100 * chance > (1 / _LEAST - 1) * (last - first):
        label = f"chance ← {percent(chance)}"
    else:
        label = f"chance {percent(chance)}"
        axes.axvline(100 * chance, color=GREY, linestyle=(0, (1, 1.5)), zorder=1)
    from matplotlib.lines import Line2D

    lines.append(Line2D([], [], color=GREY, linestyle=(0, (1, 1.5)), label=label))
    return lines


def _chance(task: TaskComparison) -> float | None:
    return next((arm.chance for arm in task.arms if arm.chance is not None), None)
