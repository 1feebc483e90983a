"""Arms as folders: read the runs of each, refuse what cannot be trusted, line up questions."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from qatbench.errors import ArtifactError, PrerequisiteError
from qatbench.records import Metrics, Prediction, TaskMetrics
from qatbench.report.model import CheckpointFacts
from qatbench.stages.metrics import units as questions
from qatbench.store import prediction_lines, predictions_file

PREDICTIONS, METRICS, PROVENANCE = "predictions.jsonl", "metrics.json", "provenance.json"
CHECKPOINT = "checkpoint.json"  # provenance of the checkpoint, kept beside the answers by `run`
_SEED_FOLDER = re.compile(r"seed-(\d+)")

Units = dict[str, tuple[Prediction, ...]]  # what is counted as one question -> its rows


class Run(NamedTuple):
    """One finished evaluation: one seed of an arm."""

    seed: int
    folder: Path
    units: dict[str, Units]  # by task
    metrics: dict[str, TaskMetrics]  # by task
    provenance: dict[str, Any]  # {} where there is none: predictions made elsewhere
    checkpoint: dict[str, Any]  # {} where there is none: a model that nothing was done to
    facts: CheckpointFacts


class Arm(NamedTuple):
    """One arm with its seeds, in rising order."""

    name: str
    runs: tuple[Run, ...]

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seed of each run."""
        return tuple(run.seed for run in self.runs)

    def facts(self) -> CheckpointFacts:
        """Join the facts of its seeds: durations are means, the rest the first one stated."""
        merged: dict[str, Any] = {}
        for field in CheckpointFacts.model_fields:
            values = [getattr(run.facts, field) for run in self.runs]
            known = [value for value in values if value is not None]
            if field in ("notes", "leakage"):
                merged[field] = tuple(dict.fromkeys(line for lines in known for line in lines))
            elif known:
                merged[field] = _joined(field, known)
        return CheckpointFacts(**merged)


def _joined(field: str, known: list[Any]) -> Any:
    """One value of those that the seeds state."""
    if field.endswith("_seconds"):
        return sum(known) / len(known)
    return max(known) if field == "peak_memory_bytes" else known[0]


def load_arms(folders: Sequence[Path]) -> list[Arm]:
    """Read every arm; a folder holds predictions.jsonl or seed-N folders that each hold one.

    Raises: PrerequisiteError if a folder is missing or unfinished; ArtifactError if a file is
        damaged, repeats an id or disagrees with its metrics.json.
    """
    found = [(name, _run_folders(folder)) for name, folder in _named(folders)]
    arms = [Arm(name, tuple(_load_run(*run) for run in runs)) for name, runs in found]
    made = {_model(run): run for arm in arms for run in arm.runs if run.checkpoint}
    return [Arm(arm.name, tuple(_with_sources(run, made) for run in arm.runs)) for arm in arms]


def _named(folders: Sequence[Path]) -> list[tuple[str, Path]]:
    """Name arms by as few trailing path parts as tell them apart."""
    paths = [folder.resolve().parts for folder in folders]
    names = []
    for mine in paths:
        depth, others = 1, [path for path in paths if path != mine]
        while any(path[-depth:] == mine[-depth:] for path in others):
            depth += 1
        names.append("/".join(mine[-depth:]))
    return list(zip(names, folders, strict=True))


def _run_folders(folder: Path) -> list[tuple[int, Path]]:
    """Each seed with its folder; everything finished, nothing read yet."""
    if not folder.is_dir():
        raise PrerequisiteError(
            f"no such run folder: {folder}",
            hint=f"make it with qatbench eval MODEL --task TASK --out {folder}",
        )
    matches = [(_SEED_FOLDER.fullmatch(child.name), child) for child in folder.iterdir()]
    seeds = sorted((int(m[1]), child) for m, child in matches if m and child.is_dir())
    if seeds and predictions_file(folder).exists():
        raise ArtifactError(
            f"{folder} holds both {PREDICTIONS} and seed folders",
            hint="keep one of the two: an arm is one run, or one folder a seed",
        )
    runs = seeds or [(0, folder)]
    for _, run in runs:
        files = {PREDICTIONS: predictions_file(run), METRICS: run / METRICS}
        missing = [name for name, file in files.items() if not file.is_file()]
        if missing:
            raise PrerequisiteError(
                f"{run} is not finished: no {' and no '.join(missing)}",
                hint=f"finish it with qatbench eval ... --out {run} --resume",
            )
    return runs


def _load_run(seed: int, folder: Path) -> Run:
    units = _read_predictions(predictions_file(folder))
    path = folder / METRICS
    try:
        metrics = Metrics.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise _damaged(path, error) from error
    by_task = {task.task: task for task in metrics.tasks}
    for task in sorted(units.keys() | by_task.keys()):
        mine = units.get(task, {})
        rows = sum(map(len, mine.values()))
        stated = by_task[task].overall.n if task in by_task else 0
        if stated == 0 or stated not in (len(mine), rows):
            raise ArtifactError(
                f"{folder / PREDICTIONS} has {rows} rows of {task}, {METRICS} counts {stated}",
                hint=f"one of the two is stale: evaluate {folder} again",
            )
    provenance = _read_provenance(folder / PROVENANCE)
    checkpoint = _read_provenance(folder / CHECKPOINT)
    facts = _facts(section(section(provenance, "inputs"), "model"), folder / PROVENANCE)
    made_on = section(checkpoint, "machine").get("gpu")
    facts = facts.model_copy(update={"gpu": None if made_on is None else str(made_on)})
    leakage = {"leakage": section(checkpoint, "figures").get("leakage")}
    found = _facts(leakage, folder / CHECKPOINT).leakage
    facts = facts.model_copy(update={"leakage": found or facts.leakage})
    return Run(seed, folder, units, by_task, provenance, checkpoint, facts)


def _model(run: Run) -> str:
    return str(model_of(run))


def model_of(run: Run) -> str | None:
    """Fingerprint of the model that was asked; None where it was not recorded."""
    found = section(section(run.provenance, "inputs"), "model").get("fingerprint")
    return None if found is None else str(found)


def _with_sources(run: Run, made: dict[str, Run]) -> Run:
    """Add what it took to make the compared checkpoints that this one was made from."""
    seconds = [made[name].facts.making_seconds for name in _sources(run, made)]
    known = [value for value in seconds if value is not None]
    facts = run.facts.model_copy(update={"source_seconds": sum(known) if known else None})
    return run._replace(facts=facts)


def _sources(run: Run, made: dict[str, Run]) -> set[str]:
    """Fingerprints of the compared checkpoints behind a run, those behind them included."""
    inputs = section(run.checkpoint, "inputs")
    names = [section(inputs, part).get("fingerprint") for part in ("model", "student")]
    near = {name for name in (*names, inputs.get("teacher")) if name in made} - {_model(run)}
    return near.union(*(_sources(made[name], made) for name in near))


def _read_predictions(path: Path) -> dict[str, Units]:
    """Rows by task and question, as metrics.json counts them: see `metrics.units`."""
    seen: dict[tuple[str, str], int] = {}
    by_task: dict[str, list[Prediction]] = {}
    for number, line in enumerate(b"\n".join(prediction_lines(path)).splitlines(), start=1):
        try:
            row = Prediction.model_validate({"choices": (), **json.loads(line)})
        except (ValueError, TypeError) as error:  # ValidationError and bad UTF-8 are ValueErrors
            raise _damaged(f"{path}, line {number}", error) from error
        if row.gold is None:
            raise ArtifactError(
                f"{path}, line {number}: question {row.id} has no gold answer",
                hint="a split without answers cannot be compared: evaluate one that has them",
            )
        first = seen.setdefault((row.task, row.id), number)
        if first != number:
            raise ArtifactError(
                f"{path}, line {number}: id {row.id} of {row.task} is already on line {first}",
                hint="each question is answered once: evaluate again into an empty folder",
            )
        by_task.setdefault(row.task, []).append(row)
    return {
        task: {_key(rows[0]): rows for rows in questions(mine)} for task, mine in by_task.items()
    }


def _key(row: Prediction) -> str:
    """Name of the question that a row belongs to."""
    group = row.meta.get("group")
    return row.id if group is None else str(group)


def _read_provenance(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise _damaged(path, error) from error
    if not isinstance(content, dict):
        raise _damaged(path, TypeError("not a JSON object"))
    return content


def _facts(card: dict[str, Any], path: Path) -> CheckpointFacts:
    stated = {key: card[key] for key in CheckpointFacts.model_fields if card.get(key) is not None}
    try:
        return CheckpointFacts.model_validate(stated)
    except ValidationError as error:
        raise _damaged(path, error) from error


def section(content: dict[str, Any], key: str) -> dict[str, Any]:
    """Look up a nested object; {} where it is missing or something else."""
    value = content.get(key)
    return value if isinstance(value, dict) else {}


def _damaged(where: Path | str, error: Exception) -> ArtifactError:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        what = f"{'.'.join(map(str, first['loc'])) or 'content'}: {first['msg']}"
    else:
        what = str(error)
    return ArtifactError(
        f"{where} is damaged: {what}", hint="evaluate again, or restore the file from its source"
    )
