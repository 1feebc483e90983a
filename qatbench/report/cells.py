"""Tables of report.html: cells with what they are sorted by, from rows of `tables` or by hand."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple
from urllib.parse import quote

from markupsafe import Markup

from qatbench.report import drawings, tables
from qatbench.report.details import Agreement, Changes, GroupChange
from qatbench.report.model import ArmResult, Comparison, PairResult, TaskComparison
from qatbench.report.svg import group_of
from qatbench.report.tables import UNKNOWN, Row

_UNITS = {"": 1.0, "%": 1.0, "s": 1.0, "min": 60.0, "h": 3600.0, "GPU-hours": 3600.0}
_NUMBER = re.compile(
    r"[<±]?(?P<number>[+-]?\d+(?:\.\d+)?)(?: ?(?P<unit>%|s|min|h|GPU-hours))?"
    r"(?: \[[^\]]*\]|/\d+(?:\.\d+)?| \(\d+\))?"
)

_LOST = Markup("lost/<wbr>gained")
_ONE_LINE = 26  # characters of a cell that are kept on one line


class Cell(NamedTuple):
    """What a cell shows, and the number that it is sorted by; "" for its text, or nothing known."""

    text: str
    value: str = ""
    kind: str = ""  # class of the style sheet


class Table(NamedTuple):
    """A table; its first column names the rows."""

    label: str
    head: tuple[Cell, ...]
    rows: tuple[tuple[Cell, ...], ...]

    @property
    def sortable(self) -> bool:
        """Two rows need no sorting, and rows that belong to the one above cannot be sorted."""
        return len(self.rows) > 2 and all(row[0].text for row in self.rows)


def table(label: str, rows: Sequence[Row], titles: Mapping[str, str] | None = None) -> Table | None:
    """Lay out rows of `tables`; columns of numbers are told by their cells. None without rows."""
    if not rows:
        return None
    keys = list(rows[0])
    numeric = {
        key
        for key in keys[1:]
        if all(_NUMBER.fullmatch(row[key]) or row[key] in (UNKNOWN, "baseline") for row in rows)
    }
    kinds = {key: "number" if key in numeric else _width(row[key] for row in rows) for key in keys}
    head = tuple(Cell((titles or {}).get(key, key), "", kinds[key]) for key in keys)
    return Table(
        label,
        head,
        tuple(
            tuple(
                Cell(row[key], _sorted_by(row[key]) if key in numeric else "", kinds[key])
                for key in keys
            )
            for row in rows
        ),
    )


def _width(texts: Iterable[str]) -> str:
    """Whether a column of texts may break its lines."""
    return "text name" if max(map(len, texts)) <= _ONE_LINE else "text long"


def _sorted_by(text: str) -> str:
    """The number that a cell begins with, in seconds if it is a duration; "" if it has none."""
    found = _NUMBER.fullmatch(text)
    return f"{float(found['number']) * _UNITS[found['unit'] or '']:g}" if found else ""


def number(value: float | None, text: str) -> Cell:
    """A cell with a number behind it."""
    return Cell(text, "" if value is None else f"{value:.6g}", "number")


def link(path: str) -> str:
    """A relative reference to a file: no scheme, whatever its name."""
    return quote(path, safe="/")


def arms_table(comparison: Comparison, task: TaskComparison, shipped: set[str]) -> Table:
    """Every arm, its interval drawn on one scale; accuracies lead to the answers behind them."""
    scale = drawings.accuracy_scale(task.arms)
    base = task.arm(comparison.baseline)
    ends = f"{100 * scale.low:.0f} to {100 * scale.high:.0f}"
    titles = (
        ("arm", "name text"), ("grid", "name text"), ("accuracy %, 95 % interval", "number"),
        (f"drawn, {ends}", "drawn"), (f"minus {base.name}, points", "number"),
        ("p (Holm)", "number"), (_LOST, "number"), ("MB", "number"),
        (Markup("bits/<wbr>weight"), "number"), ("cost", "number"), ("seeds", "name text"),
    )  # fmt: skip
    rows = zip(tables.arm_rows(comparison.model_copy(update={"tasks": (task,)})), task.arms,
               strict=True)  # fmt: skip
    return Table(
        f"Arms on {task.definition.task}",
        tuple(Cell(text, "", kind) for text, kind in titles),
        tuple(
            (
                Cell(_arm_name(arm, arm.name in shipped), "", "name"),
                Cell(group_of(arm), f"{arm.bits or 16}", "name"),
                number(arm.accuracy, _accuracy(arm, row)),
                Cell(drawings.accuracy_bar(arm, scale, base.accuracy), f"{arm.accuracy:.6g}",
                     "drawn"),
                number(_difference(task, arm), row["diff"]),
                number(_p_value(task, arm), row["p"]),
                number(_lost(task, arm), row["flips"]),
                number(arm.checkpoint_bytes, row["MB"]),
                number(arm.bits_per_weight, row["bits/w"]),
                number(arm.cost_seconds, row["cost"]),
                Cell(_answers(arm, [str(seed) for seed in arm.seeds]), "", "name"),
            )
            for row, arm in rows
        ),
    )  # fmt: skip


def _arm_name(arm: ArmResult, ships: bool) -> Markup:
    badge = Markup(' <span class="badge ship">ship</span>') if ships else ""
    return Markup('<code>{}</code> <span class="family {}">{}</span>{}').format(
        arm.name, arm.family.lower(), arm.family, badge
    )


def _accuracy(arm: ArmResult, row: Row) -> Markup:
    return Markup('{} <span class="soft">{}</span>').format(
        _answers(arm, [row["acc %"]]), row["95 % CI"]
    )


def _answers(arm: ArmResult, texts: Sequence[str]) -> Markup:
    """Each text as a link to the predictions behind it; plain where their file is not recorded."""
    if not arm.predictions:
        return Markup(", ").join(texts)
    told = (
        Markup('<a href="{}" title="the answers behind it: {}">{}</a>').format(
            link(path), path, text
        )
        for text, path in zip(texts, arm.predictions, strict=False)
    )
    return Markup(", ").join(told)


def _difference(task: TaskComparison, arm: ArmResult) -> float | None:
    pair = task.pair(arm.name)
    return pair.difference if pair else None


def _p_value(task: TaskComparison, arm: ArmResult) -> float | None:
    pair = task.pair(arm.name)
    return pair.p_holm if pair else None


def _lost(task: TaskComparison, arm: ArmResult) -> float | None:
    pair = task.pair(arm.name)
    return pair.lost if pair else None


def seeds_table(task: TaskComparison) -> Table:
    """What each seed scored, with the answers behind it."""
    plain = table("", tables.seed_rows(task))
    assert plain is not None  # a task has arms
    at = [cell.text for cell in plain.head].index("accuracy %")
    rows = tuple(
        (*row[:at], Cell(_answers(arm, row[at].text.split(", ")), "", "text"), *row[at + 1 :])
        for row, arm in zip(plain.rows, task.arms, strict=True)
    )
    return Table("What each seed scored", plain.head, rows)


def pairs_table(
    label: str, pairs: Sequence[PairResult], rows: Sequence[Row], margin: float
) -> Table | None:
    """Rows of `tables.pair_rows` or alike, each difference drawn before it; None without any."""
    titles = {"diff": "difference, points", "flips": _LOST, "p Holm": "p (Holm)",
              "pair": "pair", "cost": "cost without it"}  # fmt: skip
    plain = table(label, rows, titles)
    if plain is None:
        return None
    scale = drawings.difference_scale([(pair.low, pair.high) for pair in pairs], margin)
    at = list(rows[0]).index("diff")
    drawn = [
        Cell(drawings.difference_bar(pair.low, pair.difference, pair.high, scale, margin),
             f"{pair.difference:.6g}", "drawn")
        for pair in pairs
    ]  # fmt: skip
    ends = f"drawn, ±{100 * scale.high:.0f}"
    return Table(
        plain.label,
        (*plain.head[:at], Cell(ends, "", "drawn"), *plain.head[at:]),
        tuple((*row[:at], cell, *row[at:]) for row, cell in zip(plain.rows, drawn, strict=True)),
    )


def changes_table(label: str, changes: Sequence[Changes]) -> Table | None:
    """What changed from a reference to an arm, a row a pair."""
    rows = [
        {
            "arm - reference": f"{c.arm} - {c.reference}",
            "both right": tables.count(c.both_right),
            "both wrong": tables.count(c.both_wrong),
            "lost": tables.count(c.lost),
            "gained": tables.count(c.gained),
            "same answer %": tables.percent(c.same_answer),
            "wrong, answered anew": tables.count(c.wrong_changed),
            "KL mean": _nats(c.divergence.mean if c.divergence else None),
            "KL 95 %": _nats(c.divergence.p95 if c.divergence else None),
            "KL 99 %": _nats(c.divergence.p99 if c.divergence else None),
            "margin of lost": _nats(c.lost_margin),
            "margin of gained": _nats(c.gained_margin),
        }
        for c in changes
    ]
    return table(label, rows)


def groups_table(change: Changes, margin: float) -> Table | None:
    """Where a pair differs: by subject, category, context."""
    told = [(group.low, group.high) for group in change.groups if group.low is not None]
    scale = drawings.difference_scale([(a, b) for a, b in told if b is not None], margin)
    rows = tuple(_group_row(group, scale, margin) for group in change.groups)
    titles = (("group", "text"), ("kind", "text"), ("questions", "number"),
              (f"{change.arm} %", "number"), (f"{change.reference} %", "number"),
              (f"drawn, ±{100 * scale.high:.0f}", "drawn"), ("difference, points", "number"),
              (_LOST, "number"))  # fmt: skip
    head = tuple(Cell(text, "", kind) for text, kind in titles)
    label = f"{change.arm} - {change.reference}, group by group"
    return Table(label, head, rows) if rows else None


def _group_row(group: GroupChange, scale: drawings.Scale, margin: float) -> tuple[Cell, ...]:
    low, high = group.low, group.high
    known = low is not None and high is not None
    drawn = (
        drawings.difference_bar(low, group.difference, high, scale, margin)  # type: ignore[arg-type]
        if known
        else UNKNOWN
    )
    return (
        Cell(group.name, "", "text"),
        Cell(group.kind.replace("_", " "), "", "text"),
        number(group.n, str(group.n)),
        number(group.accuracy, tables.percent(group.accuracy)),
        number(group.reference_accuracy, tables.percent(group.reference_accuracy)),
        Cell(drawn, f"{group.difference:.6g}", "drawn"),
        number(group.difference, tables.between(group.difference, low, high)),
        number(group.lost, tables.flips(group.lost, group.gained)),
    )


def agreement_table(agreement: Agreement) -> Table:
    """Share of rows answered alike; the shade of a cell goes from the lowest share to all."""
    shares = [share for row in agreement.share for share in row]
    least = min(shares)
    span = (1 - least) or 1.0
    return Table(
        "Answered alike, % of rows; each arm with itself: between its seeds",
        (Cell("arm", "", "text"), *(Cell(arm, "", "number") for arm in agreement.arms)),
        tuple(
            (
                Cell(Markup("<code>{}</code>").format(arm), "", "name"),
                *(
                    Cell(tables.percent(share), f"{share:.6g}",
                         f"number shade-{round(9 * (share - least) / span)}")
                    for share in row
                ),
            )
            for arm, row in zip(agreement.arms, agreement.share, strict=True)
        ),
    )  # fmt: skip


def _nats(value: float | None) -> str:
    return UNKNOWN if value is None else f"{value:.3f}"
