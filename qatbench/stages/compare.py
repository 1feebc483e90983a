"""Compare finished runs question by question, and write the comparison with its report.

Everything is worked out here from predictions.jsonl; `qatbench.report` only words it.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable
from math import prod
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

from qatbench import stats
from qatbench.records import Prediction
from qatbench.report.figures import TRAINING_FIGURE, figures
from qatbench.report.markdown import render
from qatbench.report.model import (
    ArmResult,
    Comparison,
    Course,
    Definition,
    PairResult,
    Setting,
    TaskComparison,
)
from qatbench.report.tables import ablation_rows, arm_rows, pair_rows
from qatbench.report.warnings import warnings_of
from qatbench.stages.ablations import settled, with_ablations
from qatbench.stages.arms import Arm, Run, Sheet, line_up, load_arms, right_of, section
from qatbench.stages.courses import courses
from qatbench.stages.paired import LEVEL, Scores, pair_result, wilson_of_mean
from qatbench.store import write_text

ARMS_TABLE, PAIRS_TABLE = "tables/arms.csv", "tables/pairs.csv"
ABLATIONS_TABLE = "tables/ablations.csv"


class _Settings(NamedTuple):
    margin: float
    intersection: bool
    draws: int
    seed: int


def compare(
    runs: list[Path],
    baseline: Path,
    *,
    margin: float = 0.01,
    intersection: bool = False,
    draws: int = 10_000,
    seed: int = 0,
) -> Comparison:
    """Compare every arm with the baseline on the questions that all of them answered.

    Args:
        runs: arm folders, each a run or a folder of seed-N runs; the baseline may be among them.
        baseline: the arm that differences are taken to (arm minus baseline).
        margin: of equivalence, a fraction (0.01 = 1 point).
        intersection: compare on the shared questions where the arms' question sets differ.
        draws: of the bootstrap over questions.
        seed: of the bootstrap.

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
    settings = _Settings(margin, intersection, draws, seed)
    sheets = line_up(arms, intersection=intersection)
    training = courses(arms)
    tasks = [_compare_task(arms, sheet, reference, settings, training) for sheet in sheets]
    return Comparison(baseline=reference, tasks=settled(_adjusted(tasks)), training=training)


def write(comparison: Comparison, out: Path) -> tuple[Path, ...]:
    """Write the tables, the figures, comparison.json and, last, report.md.

    Each file is replaced whole or not at all; a table or figure that this comparison does not have
    is removed. Returns: the paths written, in that order.
    """
    rows = {
        ARMS_TABLE: arm_rows(comparison),
        PAIRS_TABLE: pair_rows(comparison),
        ABLATIONS_TABLE: ablation_rows(comparison),
    }
    texts = {name: _csv(some) for name, some in rows.items() if some or name != ABLATIONS_TABLE}
    texts |= figures(comparison)
    for name in {ABLATIONS_TABLE, TRAINING_FIGURE} - texts.keys():
        (out / name).unlink(missing_ok=True)
    texts["comparison.json"] = _numbers_in_a_line(comparison.model_dump_json(indent=1)) + "\n"
    texts["report.md"] = render(comparison)
    for name, text in texts.items():
        write_text(out / name, text)
    return tuple(out / name for name in texts)


def _numbers_in_a_line(text: str) -> str:
    """Indented JSON with each list of numbers on one line: a curve has up to 60."""
    numbers = r"\[\n([-+0-9.eE,\snul]+)\n\s*\]"  # a raw line break is in no JSON string
    return re.sub(numbers, lambda found: f"[{' '.join(found[1].split())}]", text)


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
            arm, reference, margin=settings.margin, draws=settings.draws, seed=settings.seed
        )

    def against(arm: str, reference: str) -> PairResult:
        return scored(sheet.scores[arm], sheet.scores[reference])

    block = TaskComparison(
        definition=_definition(arms, sheet, settings),
        arms=tuple(_arm_result(arm, sheet) for arm in arms),
        pairs=tuple(against(arm.name, baseline) for arm in arms if arm.name != baseline),
        contests=(),
        warnings=(),
    )
    grids = dict.fromkeys(arm.grid for arm in block.arms if arm.family in ("QAT", "PTQ"))
    rivals = [(block.best("QAT", grid), block.best("PTQ", grid)) for grid in grids]
    contests = tuple(against(qat.name, ptq.name) for qat, ptq in rivals if qat and ptq)
    disagree = tuple(arm.name for arm in arms if _metrics_disagree(arm, sheet.task))
    warnings = warnings_of(block.definition, block.arms, block.pairs, disagree, training)
    block = block.model_copy(update={"contests": contests, "warnings": warnings})
    return with_ablations(block, arms, training, sheet.scores, scored)


def _adjusted(tasks: list[TaskComparison]) -> tuple[TaskComparison, ...]:
    """Fill in Holm's p-values: one family of all pairs, a pair stated twice counted once."""
    ids = [(k, pair) for k, task in enumerate(tasks) for pair in (*task.pairs, *task.contests)]
    family = {(k, frozenset((pair.arm, pair.reference))): pair.p for k, pair in ids}
    adjusted = dict(zip(family, stats.holm(list(family.values())), strict=True)) if family else {}

    def fill(k: int, pair: PairResult) -> PairResult:
        p_holm = adjusted[k, frozenset((pair.arm, pair.reference))]
        return pair.model_copy(update={"p_holm": p_holm})

    return tuple(
        task.model_copy(
            update={
                "pairs": tuple(fill(k, pair) for pair in task.pairs),
                "contests": tuple(fill(k, pair) for pair in task.contests),
                "definition": task.definition.model_copy(update={"family_size": len(family)}),
            }
        )
        for k, task in enumerate(tasks)
    )


def _arm_result(arm: Arm, sheet: Sheet) -> ArmResult:
    n, right = len(sheet.keys), sheet.scores[arm.name].right.sum(axis=1).tolist()
    accuracies = tuple(k / n for k in right)
    low, high = wilson_of_mean(accuracies, n)
    rows = [[row for key in sheet.keys for row in run.units[sheet.task][key]] for run in arm.runs]
    return ArmResult(
        **arm.facts().model_dump(),
        name=arm.name,
        seeds=arm.seeds,
        fingerprints=tuple(_text(run.provenance.get("fingerprint")) for run in arm.runs),
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


def _definition(arms: list[Arm], sheet: Sheet, settings: _Settings) -> Definition:
    runs = [run for arm in arms for run in arm.runs]
    metrics = [run.metrics[sheet.task] for run in runs]
    data = [section(section(run.provenance, "inputs"), "data") for run in runs]
    mine = [
        {key: digest for key, digest in digests.items() if f"{key}:".startswith(f"{sheet.task}:")}
        for digests in data
    ]
    rows = [row for run in runs for key in sheet.keys for row in run.units[sheet.task][key]]
    pictured = {row.meta.get("has_image") for row in rows}
    images = _distinct(section(run.provenance, "spec").get("images", "shown") for run in runs)
    text_only = False if True in pictured else True if pictured == {False} else None
    recipes = [_text(_stated(run, "recipe")) for run in runs]
    return Definition(
        task=sheet.task,
        protocol=_distinct(metric.protocol for metric in metrics),
        mode=_distinct(metric.mode for metric in metrics),
        n=len(sheet.keys),
        dropped=sheet.dropped,
        intersection=settings.intersection,
        text_only=text_only if images == ("shown",) else None,
        images=images,
        data=_distinct_by_key(mine),
        prompt_form=_distinct(_stated(run, "prompt_form") for run in runs),
        dtype=_distinct(_stated(run, "dtype") for run in runs),
        device=_distinct(_stated(run, "device") for run in runs),
        batch=_distinct(_stated(run, "batch_size", "batch") for run in runs),
        versions=_distinct_by_key([section(run.provenance, "versions") for run in runs]),
        seeds={arm.name: arm.seeds for arm in arms},
        margin=settings.margin,
        level=LEVEL,
        bootstrap_draws=settings.draws,
        bootstrap_seed=settings.seed,
        family_size=0,
        recipe=next(filter(None, recipes), None),
    )


def _stated(run: Run, *names: str) -> object:
    """Find a setting: what was found out (figures) before what was asked for (spec)."""
    parts = [section(run.provenance, part) for part in ("figures", "spec", "machine")]
    return next((part[key] for part in parts for key in names if part.get(key) is not None), None)


def _text(value: object) -> str | None:
    return None if value is None else str(value)


def _distinct(values: Iterable[object]) -> Setting:
    return tuple(dict.fromkeys(str(value) for value in values if value is not None))


def _distinct_by_key(mappings: list[dict[str, Any]]) -> dict[str, Setting]:
    keys = dict.fromkeys(key for mapping in mappings for key in mapping)
    return {key: _distinct(mapping.get(key) for mapping in mappings) for key in keys}


def _csv(rows: list[dict[str, str]]) -> str:
    text = io.StringIO()
    if rows:
        writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return text.getvalue()
