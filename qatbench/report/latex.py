"""Tables for a paper: LaTeX with booktabs, as narrow as a column of two; the CSV files hold more.

Names are escaped; of figures the signs are set as mathematics. A table a task: what was measured
stands in its caption, so that a row holds only what differs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from qatbench.report.model import Ablation, ArmResult, Comparison, PairResult, TaskComparison
from qatbench.report.svg import slugs
from qatbench.report.tables import (
    PARTS,
    UNKNOWN,
    Row,
    bits_per_weight,
    difference,
    interval,
    p_value,
    percent,
    stated_pairs,
)
from qatbench.report.verdict import margin_words

NEEDS = "% Needs \\usepackage{booktabs}. Every column is in the CSV file beside this one.\n"
_CAPTIONS = {
    "arms": "Accuracy (\\%) on {task} ($n = {n}$), and paired difference to {baseline} (points),"
    " each with its {level}\\,\\% interval. $p$: two-sided, exact, adjusted by Holm. Bits: per"
    " weight of the language model's linears, scales included.",
    "pairs": "Paired differences on {task} ($n = {n}$) in points with {level}\\,\\% intervals."
    " $p$: two-sided, exact, adjusted by Holm. Equivalent: within {margin} points.",
    "ablations": "What each part of GRACE is worth on {task} ($n = {n}$): with it minus without,"
    " in points with {level}\\,\\% intervals. $p$: two-sided, exact, adjusted by Holm. Grid: bits,"
    " and weights that share a scale. Equivalent: it does not matter, within {margin} points.",
}
_COLUMNS = {"arms": "rrrr", "pairs": "rrl", "ablations": "lrrl"}  # after the first
_FIRST = {"arms": (1.6, 10), "pairs": (2.6, 17), "ablations": (1.95, 13)}  # cm; characters in it
# `<`, `>` and `|` would print as other signs in LaTeX's first encoding.
_SPECIAL = {sign: f"\\{sign}" for sign in "&%$#_{}"} | {
    sign: rf"\text{name}{{}}"
    for sign, name in (("\\", "backslash"), ("~", "asciitilde"), ("^", "asciicircum"),
                       ("<", "less"), (">", "greater"), ("|", "bar"))
} | {"−": "$-$", "±": "$\\pm$"}  # fmt: skip


def tables(comparison: Comparison) -> dict[str, str]:
    """Path beside report.md -> LaTeX, a table a task; none for rows that are not there."""
    kinds: dict[str, Callable[[TaskComparison], list[Row]]] = {
        "arms": lambda task: [_arm(task, arm, comparison.baseline) for arm in task.arms],
        "pairs": lambda task: [_pair(pair) for pair in stated_pairs(task)],
        "ablations": lambda task: [_ablation(ablation) for ablation in task.ablations],
    }
    made = {}
    for kind, rows_of in kinds.items():
        drawn = [
            _table(kind, rows, _caption(kind, task, comparison.baseline), f"tab:{kind}-{slug}")
            for task, slug in slugs(comparison)
            if (rows := rows_of(task))
        ]
        if drawn:
            made[f"tables/{kind}.tex"] = NEEDS + "\n".join(drawn)
    return made


def name(text: str) -> str:
    """Write a name: no sign of it is read by LaTeX, two hyphens stay two, a line ends at `_`."""
    told = "".join(_SPECIAL.get(sign, sign) for sign in text).replace("--", "-{}-")
    told = told.replace("--", "-{}-")  # of three, the second pair
    told = told.replace(r"\_", r"\_\allowbreak{}")
    return f"{{}}{told}" if told[:1] in ("[", "*") else told  # else `\\` before it takes it


def figures(text: str) -> str:
    """Write figures as `tables` words them: +, -, < as mathematics, an en dash for not recorded."""
    return "--" if text == UNKNOWN else re.sub(r"[-+<]", r"$\g<0>$", text)


# --- rows: heading -> cell, both LaTeX; the first cell is a name as it is -----------------------


def _arm(task: TaskComparison, arm: ArmResult, baseline: str) -> Row:
    pair = task.pair(arm.name)
    against = "baseline" if arm.name == baseline else figures(UNKNOWN)
    return {
        "Arm": arm.name,
        "Accuracy": _small(f"{percent(arm.accuracy)} {interval(arm.low, arm.high)}"),
        "Difference": _small(difference(pair)) if pair else against,
        "$p$": figures(p_value(pair.p_holm) if pair else UNKNOWN),
        "Bits": figures(bits_per_weight(arm)),
    }


def _pair(pair: PairResult) -> Row:
    return {
        "Pair": f"{pair.arm} − {pair.reference}",
        "Difference": _small(difference(pair)),
        "$p$": figures(p_value(pair.p_holm)),
        "Verdict": pair.verdict,
    }


def _ablation(ablation: Ablation) -> Row:
    without = f" ({ablation.without})" if ablation.without else ""
    return {
        "Part": PARTS[ablation.part] + without,
        "Grid": name(ablation.grid.replace(" bits", "")),
        "Difference": _small(difference(ablation.pair)),
        "$p$": figures(p_value(ablation.pair.p_holm)),
        "Verdict": "equivalent" if ablation.verdict == "does not matter" else ablation.verdict,
    }


def _small(text: str) -> str:
    """A value, and its interval in a smaller size."""
    value, space, rest = figures(text).partition(" ")
    return f"{value}{space}{{\\scriptsize {rest}}}" if rest else value


# --- the table ----------------------------------------------------------------------------------


def _caption(kind: str, task: TaskComparison, baseline: str) -> str:
    definition = task.definition
    return _CAPTIONS[kind].format(
        task=name(definition.task),
        n=definition.n,
        baseline=name(baseline),
        level=f"{100 * definition.level:g}",
        margin=name(margin_words(definition)),
    )


def _table(kind: str, rows: Sequence[Row], caption: str, label: str) -> str:
    import pandas as pd  # slow to import, and only needed to write a report

    title = next(iter(rows[0]))
    column = _first_column([row[title] for row in rows], *_FIRST[kind])
    start = "" if column == "l" else r"\raggedright "
    frame = pd.DataFrame([{**row, title: start + name(row[title])} for row in rows])
    style = frame.style.hide(axis="index").set_table_styles(
        [
            {"selector": "footnotesize", "props": ":"},
            {"selector": "setlength", "props": ":{\\tabcolsep}{3pt}"},
        ]
    )
    return str(
        style.to_latex(
            hrules=True,
            column_format=f"@{{}}{column}{_COLUMNS[kind]}@{{}}",
            caption=caption,
            label=label,
            position="t",
            position_float="centering",
        )
    )


def _first_column(names: Sequence[str], width: float, fits: int) -> str:
    """One of `width` cm with several lines a name, if names are longer and all can be broken."""
    pieces = [len(piece) for told in names for piece in re.split(r"(?<=[-_ ])", told)]
    broken = max(map(len, names)) > fits >= max(pieces)
    return f"p{{{width}cm}}" if broken else "l"
