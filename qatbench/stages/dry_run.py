"""run --dry-run: what is finished, what is missing and what it would cost. No weights, no data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qatbench import store
from qatbench.errors import UsageError
from qatbench.recipe import QUANTIZED, TAUGHT, TRAINED, Arm, ArmRef, Recipe
from qatbench.stages.grid_check import peek
from qatbench.tasks import selector
from qatbench.vlm import memory
from qatbench.vlm.counts import count, stored

# Floating-point operations a second that this project's own stages reached: used for estimates
# only, which are printed as such. CPU: 2 cores, fp32; GPU: H100, bf16 with small batches.
FLOPS = {"cpu": 6e10, "cuda": 4e13}
TOKENS_PER_SAMPLE, ANSWER_TOKENS = 100, 10
GIB = 2**30


def dry_run(
    recipe: Recipe,
    results: Path,
    paths: Mapping[str, str],
    device: str,
    *,
    arms: Sequence[str] = (),
    seeds: Sequence[int] = (),
    limit: int | None = None,
) -> dict[str, Any]:
    """One row a unit (arm and seed): state, and estimates of what is missing.

    `arms`, `seeds` and `limit` narrow it down as they narrow the run.

    Returns: `units` (unit, evaluated, checkpoint, seconds, memory_gib, disk_gib) and `missing`
        (data folders that are not there). Estimates are None for a model that only the hub knows,
        or a config that leaves sizes out.
    Raises: UsageError for an unknown arm.
    """
    unknown = [name for name in arms if name not in recipe.arms]
    if unknown:
        raise UsageError(f"no arm {unknown[0]!r}", hint=f"arms: {', '.join(recipe.arms)}")
    config = peek(recipe.student)
    root = results / recipe.name
    units = []
    for name, arm in recipe.arms.items():
        for seed in recipe.seeds_of(name) if not arms or name in arms else ():
            if seeds and seed is not None and seed not in seeds:
                continue
            tail = [name] if seed is None else [name, f"seed-{seed}"]
            evaluated = (root.joinpath(*tail) / store.PROVENANCE).exists()
            made = (
                arm.kind == "base"
                or (root.joinpath("checkpoints", *tail) / store.PROVENANCE).exists()
            )
            row = {"unit": "/".join(tail), "evaluated": evaluated, "checkpoint": made}
            if evaluated:
                units.append(row | dict.fromkeys(("seconds", "memory_gib", "disk_gib"), 0.0))
            else:
                units.append(row | _estimate(recipe, arm, config, device, made, limit))
    places = recipe.data.paths | dict(paths)
    absent = [f"{task}: {path}" for task, path in places.items() if not _there(path)]
    named = {selector.parse(text) for text in recipe.data.questions}
    absent += sorted(f"{s.task}: {s.file}" for s in named if s.file and not s.file.is_file())
    return {"recipe": recipe.name, "device": device, "units": units, "missing": absent}


def _there(path: str) -> bool:
    return path in selector.BUILT_IN or selector.on_the_hub(path) or Path(path).exists()


def _estimate(
    recipe: Recipe,
    arm: Arm,
    config: Mapping[str, Any] | None,
    device: str,
    made: bool,
    limit: int | None,
) -> dict[str, float | None]:
    try:
        weights = count(config).language if config else 0
    except UsageError:  # a config without all of its sizes, which the model class knows
        weights = 0
    if config is None or not weights:
        return {"seconds": None, "memory_gib": None, "disk_gib": None}
    rate = FLOPS["cpu" if device == "cpu" else "cuda"]
    asked = limit or recipe.evaluation.limit or 4241
    work = 2.0 * weights * TOKENS_PER_SAMPLE * asked
    disk = 0.0
    if not made and arm.kind in TRAINED:
        training = recipe.training_of(arm)
        passes = 8 if arm.kind in TAUGHT else 6
        work += passes * weights * TOKENS_PER_SAMPLE * training.steps * training.batch_size
    elif not made and arm.kind != "base":
        calibration = recipe.calibration
        work += 12.0 * weights * TOKENS_PER_SAMPLE * calibration.samples
        if arm.kind == "autoround":
            shown = min(calibration.batch_size, calibration.samples) * calibration.iters
            work += 6.0 * weights * TOKENS_PER_SAMPLE * shown
    if not made and arm.kind != "base":
        grid = recipe.grid_of(arm)
        disk = stored(config, grid.bits if arm.kind in QUANTIZED else 16, grid.group_size)
    return {
        "seconds": round(work / rate, 1),
        "memory_gib": round(_memory(recipe, arm, config, device, made) / GIB, 2),
        "disk_gib": round(disk / GIB, 2),
    }


def _memory(recipe: Recipe, arm: Arm, config: Mapping[str, Any], device: str, made: bool) -> float:
    """Bytes at once on the device: of making the checkpoint, or of asking it where it is made."""
    grid, training = recipe.grid_of(arm), recipe.training_of(arm)
    work = memory.Work(
        "eval" if made else arm.kind,
        bits=grid.bits if arm.kind in QUANTIZED else 16,
        group_size=grid.group_size,
        batch_size=training.micro_batch_size,
        length=TOKENS_PER_SAMPLE,
        answer=ANSWER_TOKENS,
        accumulated=training.batch_size > training.micro_batch_size,
        weights=training.weights,
        optimizer=training.optimizer,
        checkpointing=training.checkpointing,
        teacher_dtype=training.teacher_dtype,
        device=device,
    )
    named = recipe.teacher_of(arm)
    teacher = config if isinstance(named, ArmRef) or named is None else peek(named)
    return memory.need(config, work, teacher).total
