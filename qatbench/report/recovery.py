"""How much of what PTQ lost training won back, and how much answers change by themselves."""

from __future__ import annotations

from qatbench.report import tables
from qatbench.report.model import TaskComparison

METHOD = """\
- **won back**: (QAT - PTQ) / (16 bit - PTQ) with Fieller's interval, of the bootstrap's spread \
over the same questions; withheld where 16 bit - PTQ is not shown to be above 0, as there may have \
been nothing to win back.
- **noise floor**: flips between two evaluations of one model, or between seeds of one 16-bit arm: \
differences of that size say nothing about quantization."""


def sentences(task: TaskComparison) -> list[str]:
    """One a grid on recovery, then one a noise floor."""
    return [*_recoveries(task), *_noise(task)]


def section(task: TaskComparison) -> str:
    """The same for report.md; "" where nothing is known."""
    return "\n".join(f"- {sentence}" for sentence in sentences(task))


def _recoveries(task: TaskComparison) -> list[str]:
    told = []
    for row in task.recovery:
        head = f"{row.grid}: " if len(task.recovery) > 1 else ""
        names = f"`{row.arm}` over `{row.ptq}`, against `{row.full}` at 16 bits"
        if row.share is None or row.low is None or row.high is None:
            told.append(f"{head}won back: withheld, {row.withheld} ({names}).")
        else:
            share = f"{100 * row.share:.0f} % [{100 * row.low:.0f}, {100 * row.high:.0f}]"
            told.append(f"{head}won back: {share} of what PTQ lost ({names}).")
    return told


def _noise(task: TaskComparison) -> list[str]:
    told = []
    for row in task.noise:
        who = (
            f"`{row.arm}` and `{row.other}`, evaluations of one model"
            if row.kind == "repeat"
            else f"seeds of `{row.arm}`"
        )
        told.append(
            f"noise floor, {who}: {row.flips:.1f} questions ({tables.percent(row.share)} %) are"
            f" right in one and wrong in the other; scores {100 * row.difference:.1f} points apart."
        )
    return told
