"""metrics.json from predictions alone: no model, no GPU."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

from qatbench.records import Accuracy, Metrics, Prediction, TaskMetrics
from qatbench.stats import wilson

Unit = tuple[Prediction, ...]  # the rows of one question
SUBJECTS = {"natural science": "NAT", "social science": "SOC", "language science": "LAN"}
OFFICIAL = (*SUBJECTS.values(), "TXT", "IMG", "NO", "G1-6", "G7-12")  # in the tables' order


def summarize(
    rows: Sequence[Prediction],
    *,
    protocols: Mapping[str, str],
    mode: str,
    seconds: float,
    timed: int | None = None,
) -> Metrics:
    """Accuracy of each task, overall and by groups, with what was not answered.

    The rows of a circular question count once: it is right when all of them are. Groups are the
    modality and, where they are known, the subject and (`official`) the groups of ScienceQA's own
    table; of circular data the two levels of category, as the first pass states them, and
    (`counted_as`) the accuracies by the other ways of counting. Unparsed rows, errors and ties are
    counted by row.

    `timed` of the rows were answered in these `seconds` (all if None): the others by a run that
    was cut off, which do not count for questions a second.
    """
    by_task: dict[str, list[Prediction]] = defaultdict(list)
    for row in rows:
        by_task[row.task].append(row)
    return Metrics(
        tasks=tuple(_task(name, some, protocols[name], mode) for name, some in by_task.items()),
        seconds=round(seconds, 3),
        questions_per_second=round((len(rows) if timed is None else timed) / seconds, 3)
        if seconds
        else 0.0,
    )


def units(rows: Sequence[Prediction]) -> list[Unit]:
    """What counts as one question: the rows of one `meta.group`, first pass first, or a row alone.

    A group without its first pass is left out, as every circular evaluator leaves it out.
    """
    joined: dict[tuple[str, ...], list[Prediction]] = defaultdict(list)
    for row in rows:
        group = row.meta.get("group")
        joined[(row.id,) if group is None else ("group", str(group))].append(row)
    ordered = [tuple(sorted(some, key=_pass)) for some in joined.values()]
    return [some for some in ordered if _pass(some[0]) == 0 or "group" not in some[0].meta]


def _pass(row: Prediction) -> int:
    return int(row.meta.get("circular_pass", 0))


def _task(name: str, rows: Sequence[Prediction], protocol: str, mode: str) -> TaskMetrics:
    questions = units(rows)
    groups: dict[str, dict[str, list[Unit]]] = defaultdict(lambda: defaultdict(list))
    for question in questions:
        meta = question[0].meta
        groups["modality"]["image" if meta.get("has_image") else "text"].append(question)
        kinds = ("category", "l2_category") if "circular_pass" in meta else ("subject",)
        for kind in kinds:
            if meta.get(kind):
                groups[kind][meta[kind]].append(question)
        for group in official_groups(meta) if name == "scienceqa" else ():
            groups["official"][group].append(question)
    if any("circular_pass" in row.meta for row in rows):
        groups["counted_as"] = {key: some for key, some in counted_as(rows).items() if some}
    return TaskMetrics(
        task=name,
        protocol=protocol,
        mode=mode,
        overall=accuracy(questions),
        unparsed=sum(row.status == "unparsed" for row in rows),
        errors=sum(row.status == "error" for row in rows),
        ties=sum(row.tie for row in rows),
        groups={k: {g: accuracy(v) for g, v in sorted(some.items())} for k, some in groups.items()},
    )


def official_groups(meta: Mapping[str, Any]) -> list[str]:
    """Groups of ScienceQA's published tables that a question belongs to, as far as is known.

    TXT has a hint, IMG an image (a question may be in both), NO neither.
    Source: lupantech/ScienceQA at 2cbf8318, tools/evaluate_acc.py.
    """
    found = [SUBJECTS.get(meta.get("subject", ""))]
    image, hint = bool(meta.get("has_image")), meta.get("has_hint")
    found += ["TXT" if hint else None, "IMG" if image else None]
    found += ["NO" if hint is False and not image else None]
    if match := re.fullmatch(r"grade(\d+)", meta.get("grade", "")):
        found.append("G1-6" if int(match[1]) <= 6 else "G7-12")
    return [group for group in found if group]


def counted_as(rows: Sequence[Prediction]) -> dict[str, list[Unit]]:
    """What counts as a question by each way of counting, whatever the protocol's own is.

    `circular`: all passes of a question; `vanilla_pass_0`: its first pass; `all_rows`: every row.
    """
    groups = [row.meta.get("group", row.meta.get("pass_of")) for row in rows]
    joined = [
        row if group is None else row.model_copy(update={"meta": row.meta | {"group": group}})
        for row, group in zip(rows, groups, strict=True)
    ]
    return {
        "circular": units(joined),
        "vanilla_pass_0": [(row,) for row in rows if _pass(row) == 0],
        "all_rows": [(row,) for row in rows],
    }


def accuracy(questions: Sequence[Unit]) -> Accuracy:
    """Right over all asked, with the 95 % Wilson interval and the level of chance.

    All rows of a question have to be right, by guessing too.
    """
    right = sum(all(row.right for row in rows) for rows in questions)
    low, high = wilson(right, len(questions))
    return Accuracy(
        n=len(questions),
        right=right,
        accuracy=right / len(questions),
        low=low,
        high=high,
        chance=sum(prod(1 / len(row.choices) for row in rows) for rows in questions)
        / len(questions),
    )
