"""run: a whole recipe; makes and evaluates what is missing, then compares.

A unit (an arm with one seed) is skipped when its predictions are finished with these settings;
its checkpoint is made only when it, or an arm made from it, needs one. Two processes can run
different arms of one recipe at the same time: each artifact is made under a lock.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import yaml

from qatbench import store
from qatbench.errors import UsageError
from qatbench.recipe import Recipe
from qatbench.records import Question
from qatbench.report.model import Comparison
from qatbench.stages import compare as comparing
from qatbench.stages.common import Progress
from qatbench.stages.evaluate import evaluate, run_folder
from qatbench.stages.plan import HOW, Plan, Unit, model_of
from qatbench.stages.quantize import QuantizeSettings, quantize
from qatbench.stages.report_files import write
from qatbench.stages.train import TrainRequest, train
from qatbench.stages.train_settings import TrainSettings
from qatbench.stages.workers import Job
from qatbench.tasks import selector
from qatbench.vlm.load import ModelFolder

KEPT_WITH_RESULTS = {"train.jsonl": "train.jsonl", store.PROVENANCE: "checkpoint.json"}


def run(
    plan: Plan,
    arms: Sequence[str],
    *,
    seeds: Sequence[int] = (),
    progress: Progress,
    save_every: int = 50,
) -> Comparison | None:
    """Bring the arms (all, if none are named) up to date; compare when every arm is.

    Args:
        plan: from a recipe.
        arms: only these.
        seeds: of trained arms and those made from them, only these.
        progress: callback.
        save_every: optimizer steps between saved training states.

    Raises: UsageError for an unknown arm; ArtifactError when results of other settings lie where
        new ones belong.
    """
    recipe = plan.recipe
    unknown = [name for name in arms if name not in recipe.arms]
    if unknown:
        raise UsageError(f"no arm {unknown[0]!r}", hint=f"arms: {', '.join(recipe.arms)}")
    asked = plan.asked()
    wanted = [name for name in recipe.order(tuple(arms)) if not arms or name in arms]
    for unit in plan.units(wanted):
        if seeds and unit.seed is not None and unit.seed not in seeds:
            continue
        folder = _eval_folder(plan, unit, asked)
        with store.locked(unit.folder):
            new = folder.state() is not store.State.DONE
            if new:
                _evaluate(plan, unit, _say(unit, progress), save_every)
            _keep(unit, replace=new)
    write_lock(recipe, plan.root / "recipe.lock.yaml")
    everything = plan.units(list(recipe.arms))
    missing = [
        u for u in everything if _eval_folder(plan, u, asked).state() is not store.State.DONE
    ]
    return None if missing else compare(recipe, plan.root, plan.paths)


def jobs_of(
    plan: Plan, arms: Sequence[str], seeds: Sequence[int], command: Sequence[str]
) -> list[Job]:
    """The unfinished units as jobs for worker processes, trained ones first.

    `command` is the verb with what every worker gets: the recipe, the data, the output folder.
    """
    recipe = plan.recipe
    wanted = [name for name in recipe.order(tuple(arms)) if not arms or name in arms]
    units = [
        unit
        for unit in plan.units(wanted)
        if not (seeds and unit.seed is not None and unit.seed not in seeds)
        and not (unit.folder / store.PROVENANCE).exists()
    ]
    units.sort(key=lambda unit: not isinstance(unit.settings, TrainSettings))
    return [
        Job(
            _job_name(unit),
            (
                *command,
                "--arm",
                unit.arm,
                *(() if unit.seed is None else ("--seed", str(unit.seed))),
            ),
            frozenset(
                _job_name(other)
                for other in (unit.source, unit.teacher, unit.init)
                if isinstance(other, Unit)
            ),
        )
        for unit in units
    ]


def _job_name(unit: Unit) -> str:
    return unit.arm if unit.seed is None else f"{unit.arm}-seed-{unit.seed}"


def compare(recipe: Recipe, root: Path, paths: Mapping[str, str]) -> Comparison:
    """Compare all arms of a finished recipe and write its report.

    The report shows questions of data that may be passed on, and of no others.
    """
    comparison = comparing.compare(
        [root / name for name in recipe.arms],
        root / (recipe.baseline or next(iter(recipe.arms))),
        margin=recipe.margin / 100,
        seed=recipe.seed,
        out=root,
        recipe=recipe.name,
    )
    shared = {task: path for task, path in paths.items() if selector.shareable(task, path)}
    write(comparison, root, shared)
    return comparison


def write_lock(recipe: Recipe, path: Path) -> None:
    """recipe.lock.yaml: the recipe with every default that was used."""
    text = yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    store.write_text(path, text)


def _say(unit: Unit, progress: Progress) -> Progress:
    return lambda what, done, total: progress(f"{unit.title}: {what}", done, total)


def _eval_folder(plan: Plan, unit: Unit, asked: dict[str, list[Question]]) -> store.RunFolder:
    return run_folder(unit.folder, plan.evaluation, unit.fingerprint, asked)


def _evaluate(plan: Plan, unit: Unit, progress: Progress, save_every: int) -> None:
    make_checkpoint(plan, unit, progress, save_every)
    evaluate(
        model_of(plan, unit), plan.evaluation, plan.paths, unit.folder, resume=True,
        progress=progress,
    )  # fmt: skip


def _keep(unit: Unit, *, replace: bool) -> None:
    """Copy what is kept with the results; a run that was killed before this does it later."""
    for name, kept in KEPT_WITH_RESULTS.items():
        source = unit.checkpoint / name if unit.checkpoint else None
        if source and source.exists() and (replace or not (unit.folder / kept).exists()):
            store.write_text(unit.folder / kept, source.read_text(encoding="utf-8"))


def make_checkpoint(plan: Plan, unit: Unit, progress: Progress, save_every: int) -> None:
    """Make a unit's checkpoint, and those it is made from, where they are not there."""
    if unit.checkpoint is None:
        return
    with store.locked(unit.checkpoint):
        if (unit.checkpoint / store.PROVENANCE).exists():
            folder = store.read_json(unit.checkpoint / store.PROVENANCE)
            if folder.get("fingerprint") == unit.fingerprint:
                return
        for other in (unit.source, unit.teacher, unit.init):
            if isinstance(other, Unit):
                make_checkpoint(plan, other, _say(other, progress), save_every)
        if isinstance(unit.settings, QuantizeSettings):
            quantize(
                _origin(plan, unit), unit.settings, plan.paths, unit.checkpoint, resume=True,
                progress=progress,
            )  # fmt: skip
        elif isinstance(unit.settings, TrainSettings):
            request = replace(request_of(plan, unit, save_every), leakage=plan.leakage())
            train(request, unit.checkpoint, resume=True, progress=progress)


def _origin(plan: Plan, unit: Unit) -> ModelFolder:
    """The 16-bit model that a unit quantizes or trains."""
    return model_of(plan, unit.source) if unit.source else plan.student


def request_of(plan: Plan, unit: Unit, save_every: int) -> TrainRequest:
    """What `train` gets for a trained unit whose source, teacher and start are made."""
    settings, teacher = unit.settings, unit.teacher
    if not isinstance(settings, TrainSettings):
        raise UsageError(f"{unit.title} is not trained")
    how = plan.recipe.training_of(plan.recipe.arms[unit.arm])
    return TrainRequest(
        settings,
        _origin(plan, unit),
        model_of(plan, teacher) if isinstance(teacher, Unit) else teacher,
        plan.train_set.sources,
        plan.device,
        save_every,
        remarks=tuple(plan.train_set.notes()),
        init=model_of(plan, unit.init) if unit.init else None,
        **{name: getattr(how, name) for name in HOW},
        places=selector.places(plan.paths),
    )
