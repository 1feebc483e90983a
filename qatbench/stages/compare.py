"""Compare finished runs question by question, and write the comparison with its report.

Everything is worked out here from predictions.jsonl; `qatbench.report` only words it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from math import prod
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

from qatbench.records import Prediction
from qatbench.report.model import (
    CONTROL_METHODS,
    ArmResult,
    Comparison,
    Course,
    Definition,
    PairResult,
    TaskComparison,
)
from qatbench.report.warnings import warnings_of
from qatbench.stages.ablations import settled, with_ablations
from qatbench.stages.adjusted import adjusted
from qatbench.stages.answers import lined
from qatbench.stages.arms import Arm, load_arms, model_of
from qatbench.stages.changes import agreement, changes
from qatbench.stages.claims import verdicts
from qatbench.stages.courses import courses
from qatbench.stages.definition import definition, text
from qatbench.stages.noise import noise
from qatbench.stages.paired import Scores, pair_result, wilson_of_mean
from qatbench.stages.recovery import recoveries
from qatbench.stages.sheets import QUESTION, Sheet, line_up, right_of
from qatbench.store import predictions_file


class _Settings(NamedTuple):
    margin: float
    intersection: bool
    draws: int
    seed: int
    out: Path | None
    recipe: str | None


def compare(
    runs: list[Path],
    baseline: Path,
    *,
    margin: float = 0.01,
    intersection: bool = False,
    draws: int = 10_000,
    seed: int = 0,
    out: Path | None = None,
    cluster: str = QUESTION,
    recipe: str | None = None,
) -> Comparison:
    """Compare every arm with the baseline on the questions that all of them answered.

    Args:
        runs: arm folders, each a run or a folder of seed-N runs; the baseline may be among them.
        baseline: the arm that differences are taken to (arm minus baseline).
        margin: of equivalence, a fraction (0.01 = 1 point).
        intersection: compare on the shared questions where the arms' question sets differ.
        draws: of the bootstrap over questions.
        seed: of the bootstrap.
        cluster: what is resampled: each question (passes of one together), or those together that
            have one value of this field of Prediction.meta, e.g. image.
        recipe: name of the recipe that made the runs, for the record.
        out: where the comparison will lie; the predictions are named relative to it.

    Raises: PrerequisiteError if a run is missing or unfinished; ArtifactError if one is damaged or
        the arms answered different questions; UsageError if a statistic cannot be had (one
        question, a margin outside (0, 1)).

    """
    wanted = {path.resolve() for path in runs}
    asked = runs if baseline.resolve() in wanted else [baseline, *runs]
    folders: dict[Path, Path] = {}  # by what it is -> as it was given; each once
    for path in asked:
        folders.setdefault(path.resolve(), path)
    arms = load_arms(list(folders.values()))
    reference = arms[list(folders).index(baseline.resolve())].name
    settings = _Settings(margin, intersection, draws, seed, out, recipe)
    sheets = line_up(arms, intersection=intersection, cluster=cluster)
    training = courses(arms)
    tasks = [_compare_task(arms, sheet, reference, settings, training) for sheet in sheets]
    blocks = settled(adjusted(tasks))
    claims = verdicts(blocks, reference)
    return Comparison(baseline=reference, tasks=blocks, training=training, claims=claims)


def _compare_task(
    arms: list[Arm],
    sheet: Sheet,
    baseline: str,
    settings: _Settings,
    training: tuple[Course, ...],
) -> TaskComparison:
    """Everything about one task but the Holm adjustments, which need all tasks."""

    def scored(arm: Scores, reference: Scores) -> PairResult:
        return pair_result(
            arm, reference, margin=settings.margin, draws=settings.draws, seed=settings.seed,
            clusters=sheet.clusters,
        )  # fmt: skip

    def against(arm: str, reference: str) -> PairResult:
        return scored(sheet.scores[arm], sheet.scores[reference])

    block = TaskComparison(
        definition=_definition(arms, sheet, settings),
        arms=tuple(_arm_result(arm, sheet, settings.out) for arm in arms),
        pairs=tuple(against(arm.name, baseline) for arm in arms if arm.name != baseline),
        contests=(),
        warnings=(),
    )
    grids = dict.fromkeys(arm.grid for arm in block.arms if arm.family in ("QAT", "PTQ"))
    rivals = [(block.best("QAT", grid), block.best("PTQ", grid)) for grid in grids]
    contests = tuple(against(qat.name, ptq.name) for qat, ptq in rivals if qat and ptq)
    block = block.model_copy(update={"contests": contests})
    claimed = tuple(against(*names) for names in _claimed(block, baseline))
    disagree = tuple(arm.name for arm in arms if _metrics_disagree(arm, sheet.task))
    warnings = warnings_of(block.definition, block.arms, block.pairs, disagree, training)
    block = block.model_copy(update={"claimed": claimed, "warnings": warnings})
    block = with_ablations(block, arms, training, sheet.scores, scored)
    return block.model_copy(update=_changed(arms, sheet, block, baseline, settings))


def _claimed(block: TaskComparison, baseline: str) -> Iterator[tuple[str, str]]:
    """Pairs that published claims are about and that are not stated otherwise."""
    stated = [{pair.arm, pair.reference} for pair in (*block.pairs, *block.contests)]
    control = max(
        (arm for arm in block.arms if arm.method in CONTROL_METHODS),
        key=lambda arm: arm.accuracy,
        default=None,
    )
    full = [arm for arm in block.arms if arm.method == "grace"]
    for grid in dict.fromkeys(arm.grid for arm in full):
        best = max((arm for arm in full if arm.grid == grid), key=lambda arm: arm.accuracy)
        for other in (block.best("PTQ", grid), control):
            if other is not None and {best.name, other.name} not in stated:
                yield best.name, other.name


def _changed(
    arms: list[Arm], sheet: Sheet, block: TaskComparison, baseline: str, settings: _Settings
) -> dict[str, object]:
    """What changed in every stated pair.

    Flipped questions are listed of contests, and of the arms that meet in them against the
    baseline.
    """
    stated = [(p.arm, p.reference) for p in (*block.pairs, *block.contests, *block.claimed)]
    met = {name for pair in block.contests for name in (pair.arm, pair.reference)}
    shown = [(p.arm, p.reference) for p in block.contests]
    shown += [(p.arm, p.reference) for p in block.pairs if p.arm in met or len(block.pairs) == 1]
    how: Any = {"clusters": sheet.clusters, "draws": settings.draws, "seed": settings.seed}
    rows = lined(arms, sheet)
    full = [arm.name for arm in block.arms if arm.family == "16-bit"]
    return {
        "changes": changes(rows, stated, shown=shown, **how),
        "agreement": agreement(rows),
        "recovery": recoveries(block, sheet.scores, baseline, **how),
        "noise": noise(arms, rows, full),
    }


def _definition(arms: list[Arm], sheet: Sheet, settings: _Settings) -> Definition:
    return definition(
        arms, sheet, margin=settings.margin, intersection=settings.intersection,
        draws=settings.draws, seed=settings.seed, recipe=settings.recipe,
    )  # fmt: skip


def _arm_result(arm: Arm, sheet: Sheet, out: Path | None) -> ArmResult:
    n, right = len(sheet.keys), sheet.scores[arm.name].right.sum(axis=1).tolist()
    accuracies = tuple(k / n for k in right)
    low, high = wilson_of_mean(accuracies, n)
    files = [predictions_file(run.folder).resolve() for run in arm.runs]
    rows = [[row for key in sheet.keys for row in run.units[sheet.task][key]] for run in arm.runs]
    return ArmResult(
        **arm.facts().model_dump(),
        name=arm.name,
        seeds=arm.seeds,
        fingerprints=tuple(text(run.provenance.get("fingerprint")) for run in arm.runs),
        models=tuple(model_of(run) for run in arm.runs),
        n=n,
        rows=len(rows[0]),
        right=tuple(right),
        accuracies=accuracies,
        accuracy=fmean(accuracies),
        low=low,
        high=high,
        spread=stdev(accuracies) if len(accuracies) > 1 else None,
        chance=_chance([arm.runs[0].units[sheet.task][key] for key in sheet.keys]),
        unparsed=tuple(sum(row.status == "unparsed" for row in mine) for mine in rows),
        errors=tuple(sum(row.status == "error" for row in mine) for mine in rows),
        ties=tuple(sum(row.tie for row in mine) for mine in rows),
        predictions=tuple(Path(os.path.relpath(file, out)).as_posix() for file in files)
        if out
        else (),
    )


def _chance(questions: list[tuple[Prediction, ...]]) -> float | None:
    """Score of a uniform guess; all rows of a question have to be guessed right."""
    if not all(row.choices for rows in questions for row in rows):
        return None
    return fmean(prod(1 / len(row.choices) for row in rows) for rows in questions)


def _metrics_disagree(arm: Arm, task: str) -> bool:
    """Whether a metrics.json that counts the same questions states other right answers."""
    for run in arm.runs:
        units = run.units[task]
        stated = run.metrics[task].overall
        if stated.n == len(units) and stated.right != sum(right_of(run, task, units)):
            return True
    return False
