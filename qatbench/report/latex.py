"""Tables for a paper: LaTeX with booktabs, the rows of the CSV files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from qatbench.report.model import Comparison
from qatbench.report.tables import Row, ablation_rows, arm_rows, of_task, pair_rows

NEEDS = "% Needs \\usepackage{booktabs}\n"
_CAPTIONS = {
    "arms": "Accuracy on {task} with 95\\,\\% intervals, and differences to {baseline} in points.",
    "pairs": "Paired differences on {task} in points; p-values are exact, and adjusted by Holm.",
    "ablations": "What each part of GRACE is worth on {task}, in points.",
}


def tables(comparison: Comparison) -> dict[str, str]:
    """Path beside report.md -> LaTeX, a table a task; none for rows that are not there."""
    rows = {
        "arms": arm_rows(comparison),
        "pairs": pair_rows(comparison),
        "ablations": ablation_rows(comparison),
    }
    return {
        f"tables/{name}.tex": NEEDS + "\n".join(_of_tasks(comparison, name, some))
        for name, some in rows.items()
        if some
    }


def _of_tasks(comparison: Comparison, name: str, rows: Sequence[Row]) -> list[str]:
    made = []
    for task in comparison.tasks:
        told = task.definition.task
        if mine := of_task(rows, told):
            words = {"task": _escaped(told), "baseline": _escaped(comparison.baseline)}
            caption = _CAPTIONS[name].format_map(words)
            made.append(_table(mine, caption, f"tab:{name}-{told}"))
    return made


def _table(rows: Sequence[Mapping[str, str]], caption: str, label: str) -> str:
    import pandas as pd  # slow to import, and only needed to write a report

    frame = pd.DataFrame(list(rows))
    style = frame.style.hide(axis="index").format(escape="latex")
    style = style.format_index(escape="latex", axis="columns")
    return str(
        style.to_latex(
            hrules=True,
            column_format="l" + "r" * (len(frame.columns) - 1),
            caption=caption,
            label=label,
            position="t",
            position_float="centering",
        )
    )


def _escaped(text: str) -> str:
    """A name in a caption; what pandas does to the cells of a table."""
    special = {sign: f"\\{sign}" for sign in "&%$#_{}"}
    named = (("\\", "backslash"), ("~", "asciitilde"), ("^", "asciicircum"))
    special |= {sign: rf"\text{name}{{}}" for sign, name in named}
    return "".join(special.get(sign, sign) for sign in text)
