"""A comparison in which every part of a report has something to show, made from results/mini.

The scores and the flips are the committed ones; the rest is filled in by hand, as the report only
lays out what it is given.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qatbench.records import Prediction
from qatbench.report.details import (
    Agreement,
    Changes,
    Claim,
    Divergence,
    Flip,
    GroupChange,
    Noise,
    Recovery,
)
from qatbench.report.model import ArmResult, Comparison, TaskComparison
from qatbench.store import prediction_lines, predictions_file

MINI = Path(__file__).resolve().parents[2] / "results" / "mini"
KINDS = ("subject", "category", "l2_category")
KEPT = 10  # flips of a contest
CLAIMS = (
    ("ptq-4-bit", "At 4 bits PTQ is close to 16 bits.", "reproduced", "-0.5 [-1.3, +0.3] points"),
    ("grace-above-qat", "GRACE is above plain QAT at INT4.", "contradicted",
     "-0.2 [-0.5, +0.2] points"),
    ("gate", "The confidence gate brings +0.6 points.", "undecided", "+0.1 [-0.4, +0.6] points"),
    ("llava-13b", "LLaVA-1.5-13B at INT4 keeps 99 % of BF16.", "not testable here", ""),
)  # fmt: skip


def full(folder: Path = MINI) -> Comparison:
    """The comparison of `folder` with every part filled in."""
    read = Comparison.model_validate_json((folder / "comparison.json").read_bytes())
    claims = tuple(
        Claim(id=key, claim=claim, source="arXiv:2601.22709, Table 2", published="+1.9 points",
              verdict=verdict, here=here, reason="The interval says so." if here else
              "its weights are not here.")
        for key, claim, verdict, here in CLAIMS
    )  # fmt: skip
    tasks = tuple(_filled(task, folder) for task in read.tasks)
    return read.model_copy(update={"tasks": tasks, "claims": claims})


def _filled(task: TaskComparison, folder: Path) -> TaskComparison:
    rows = {arm.name: _rows(folder, arm, task.definition.task) for arm in task.arms}
    named = task.definition.model_copy(update={"recipe": "mini-bits"})
    changes = [
        _changes(pair.arm, pair.reference, rows, flips=pair in task.contests)
        for pair in (*task.pairs[:3], *task.contests)
    ]
    update: dict[str, Any] = {
        "definition": named,
        "arms": tuple(_with_files(arm, folder) for arm in task.arms),
        "changes": tuple(changes),
        "agreement": _agreement([arm.name for arm in task.arms], rows),
        "recovery": tuple(
            Recovery(arm=p.arm, ptq=p.reference, full="base", grid=task.arm(p.arm).grid,
                     share=share, low=0.2 if share else None, high=0.7 if share else None,
                     withheld=None if share else "16 bits minus PTQ may be 0")
            for p, share in zip(task.contests, (None, 0.42, 0.3), strict=True)
        ),
        "noise": (
            Noise(kind="seeds", arm="sft", other="sft", flips=24.7, share=0.0103, difference=0.002,
                  same_answer=0.981),
        ),
    }  # fmt: skip
    return task.model_copy(update=update)


def _with_files(arm: ArmResult, folder: Path) -> ArmResult:
    files = tuple(path.relative_to(folder).as_posix() for path in _files(folder, arm.name))
    return arm.model_copy(update={"predictions": files})


def _files(folder: Path, arm: str) -> list[Path]:
    seeds = sorted((folder / arm).glob("seed-*"))
    return [predictions_file(run) for run in seeds or [folder / arm]]


def _rows(folder: Path, arm: ArmResult, task: str) -> dict[str, Prediction]:
    """Of the first seed."""
    text = b"\n".join(prediction_lines(_files(folder, arm.name)[0]))
    lines = [json.loads(line) for line in text.splitlines()]
    return {line["id"]: Prediction.model_validate(line) for line in lines if line["task"] == task}


def _changes(arm: str, reference: str, rows: dict[str, dict[str, Prediction]], *, flips: bool
             ) -> Changes:  # fmt: skip
    pairs = [(mine, rows[reference][key]) for key, mine in rows[arm].items()]
    changed = [(mine, other) for mine, other in pairs if mine.right != other.right]
    changed.sort(key=lambda pair: -abs((_margin(pair[0]) or 0) - (_margin(pair[1]) or 0)))
    gained = sum(mine.right for mine, _ in changed)
    shown = changed[:KEPT] if flips else []
    return Changes(
        arm=arm, reference=reference,
        both_right=sum(a.right and b.right for a, b in pairs),
        both_wrong=sum(not a.right and not b.right for a, b in pairs),
        lost=len(changed) - gained, gained=gained, rows=len(pairs),
        same_answer=sum(a.chosen == b.chosen for a, b in pairs) / len(pairs),
        wrong_changed=12, divergence=Divergence(mean=0.041, median=0.01, p95=0.2, p99=0.6,
                                                largest=2.1),
        lost_margin=0.21, gained_margin=0.34,
        groups=tuple(_groups(pairs)),
        flips=tuple(
            Flip(
                id=mine.id, question=str(mine.meta.get("group", mine.id)), gold=str(mine.gold),
                chosen=mine.chosen, reference_chosen=other.chosen, margin=_margin(mine),
                reference_margin=_margin(other), has_image=mine.meta.get("has_image"),
                groups={kind: mine.meta[kind] for kind in KINDS if kind in mine.meta},
            )
            for mine, other in shown
        ),
        flips_left_out=len(changed) - len(shown) if flips else 0,
    )  # fmt: skip


def _margin(row: Prediction) -> float | None:
    if row.scores is None or row.gold is None:
        return None
    return row.scores[row.gold] - max(s for key, s in row.scores.items() if key != row.gold)


def _groups(pairs: list[tuple[Prediction, Prediction]]) -> list[GroupChange]:
    found: dict[tuple[str, str], list[tuple[Prediction, Prediction]]] = {}
    for pair in pairs:
        for kind in KINDS:
            if kind in pair[0].meta:
                found.setdefault((kind, pair[0].meta[kind]), []).append(pair)
    told = []
    for (kind, name), mine in found.items():
        n = len(mine)
        accuracy, reference = (sum(row[k].right for row in mine) / n for k in (0, 1))
        lost = sum(b.right and not a.right for a, b in mine)
        gained = sum(a.right and not b.right for a, b in mine)
        told.append(
            GroupChange(kind=kind, name=name, n=n, accuracy=accuracy, reference_accuracy=reference,
                        difference=accuracy - reference, low=accuracy - reference - n**-0.5,
                        high=accuracy - reference + n**-0.5, lost=lost, gained=gained)
        )  # fmt: skip
    return told


def _agreement(arms: list[str], rows: dict[str, dict[str, Prediction]]) -> Agreement:
    some = list(rows[arms[0]])[:300]

    def share(one: str, other: str) -> float:
        return sum(rows[one][k].chosen == rows[other][k].chosen for k in some) / len(some)

    return Agreement(arms=tuple(arms), share=tuple(tuple(share(a, b) for b in arms) for a in arms))
