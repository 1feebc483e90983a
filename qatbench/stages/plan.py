"""From a recipe to the artifacts it asks for: arms x seeds with settings and fingerprints.

Fingerprints follow from settings and inputs alone, so what is finished is recognised even where
its checkpoint is not there any more, as in a fresh clone with committed results.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qatbench import store
from qatbench.errors import PrerequisiteError, QatbenchError
from qatbench.recipe import PTQ, TRAINED, Arm, ArmRef, Recipe
from qatbench.records import Question
from qatbench.stages import training_sources
from qatbench.stages.evaluate import EvalSettings, questions_of
from qatbench.stages.leakage import leakage
from qatbench.stages.objective import Distillation
from qatbench.stages.quantize import QuantizeSettings, calibration_questions
from qatbench.stages.train_settings import ControllerSettings, TrainSettings
from qatbench.stages.training_sources import TrainingSet
from qatbench.tasks import selector
from qatbench.vlm import load as models
from qatbench.vlm.load import ModelFolder


@dataclass(frozen=True)
class Unit:
    """One arm with one seed: what the run makes and evaluates."""

    arm: str
    seed: int | None
    folder: Path  # predictions, metrics, provenance
    checkpoint: Path | None  # None: the student as it is
    source: Unit | None  # the unit whose checkpoint is quantized or trained on
    teacher: Unit | ModelFolder | None
    init: Unit | None  # the quantized unit that training starts from
    settings: QuantizeSettings | TrainSettings | None
    fingerprint: str

    @property
    def title(self) -> str:
        """For people."""
        return self.arm if self.seed is None else f"{self.arm} (seed {self.seed})"


class Plan:
    """All units of a recipe, in an order in which each comes after what it needs."""

    def __init__(
        self,
        recipe: Recipe,
        results: Path,
        *,
        paths: dict[str, str],
        limit: int | None = None,
        device: str | None = None,
    ) -> None:
        self.recipe, self.device = recipe, device
        self.paths = recipe.data.paths | paths
        self.root = results / recipe.name
        self.student = models.find(recipe.student)
        self._folders: dict[str, ModelFolder] = {recipe.student: self.student}
        self.train_set = self._train_set()
        self._asked: dict[str, list[Question]] | None = None
        self._leakage: tuple[str, ...] | None = None
        self._calibration: list[Question] | None = None
        self._units: dict[tuple[str, int | None], Unit] = {}
        self.evaluation = EvalSettings(
            selectors=selector.parse_all(recipe.data.eval),
            protocol={
                selector.parse(text).task: recipe.evaluation.protocol for text in recipe.data.eval
            },
            mode=recipe.evaluation.mode,
            dtype=recipe.evaluation.dtype,
            kernel=recipe.evaluation.kernel,
            limit=limit or recipe.evaluation.limit,
            seed=recipe.seed,
            device=device,
        )

    def answer_with(self, *, dtype: str | None, batch_size: int | None) -> None:
        """Evaluate in another dtype or batch size than the recipe and the device suggest."""
        settings = replace(self.evaluation, batch_size=batch_size)
        self.evaluation = replace(settings, dtype=dtype) if dtype else settings

    def units(self, arms: Sequence[str]) -> list[Unit]:
        """The units of the given arms."""
        return [self.unit(arm, seed) for arm in arms for seed in self.recipe.seeds_of(arm)]

    def unit(self, name: str, seed: int | None) -> Unit:
        """One unit, with those it is made from."""
        if (name, seed) not in self._units:
            self._units[name, seed] = self._make(name, seed)
        return self._units[name, seed]

    def _make(self, name: str, seed: int | None) -> Unit:
        arm = self.recipe.arms[name]
        tail = [name] if seed is None else [name, f"seed-{seed}"]
        source = self.unit(arm.of, self._seed_in(arm.of, seed)) if arm.of else None
        init = self.unit(arm.init, self._seed_in(arm.init, seed)) if arm.init else None
        teacher = self._teacher(arm, seed)
        origin = source.fingerprint if source else self.student.fingerprint()
        folder, checkpoint = self.root.joinpath(*tail), self.root.joinpath("checkpoints", *tail)
        if arm.kind == "base":
            return Unit(name, seed, folder, None, None, None, None, None, origin)
        if arm.kind in PTQ:
            quantize = self._quantize_settings(arm)
            rows = [] if arm.kind == "rtn" else self.calibration()
            made = store.RunFolder(checkpoint, "quantize", quantize.spec(origin, rows))
            made_by = made.fingerprint
            return Unit(name, seed, folder, checkpoint, source, None, None, quantize, made_by)
        train = self._train_settings(arm, seed or 0)
        taught = teacher.fingerprint() if isinstance(teacher, ModelFolder) else None
        taught = teacher.fingerprint if isinstance(teacher, Unit) else taught
        start = init.fingerprint if init else None
        how = self.recipe.training_of(arm).teacher_dtype
        spec = train.spec(origin, taught, self.train_set.sources, start, how)
        made = store.RunFolder(checkpoint, "train", spec)
        made_by = made.fingerprint
        return Unit(name, seed, folder, checkpoint, source, teacher, init, train, made_by)

    def _seed_in(self, name: str, seed: int | None) -> int | None:
        seeds = self.recipe.seeds_of(name)
        return seed if seed in seeds else seeds[0]

    def _teacher(self, arm: Arm, seed: int | None) -> Unit | ModelFolder | None:
        teacher = self.recipe.teacher_of(arm)
        if isinstance(teacher, ArmRef):
            return self.unit(teacher.arm, self._seed_in(teacher.arm, seed))
        if teacher is not None and teacher not in self._folders:
            self._folders[teacher] = models.find(teacher)
        return self._folders[teacher] if teacher is not None else None

    def _train_set(self) -> TrainingSet:
        trains = any(arm.kind in TRAINED for arm in self.recipe.arms.values())
        specs = self.recipe.data.train if trains else ()
        return training_sources.load(specs, self.paths)

    def asked(self) -> dict[str, list[Question]]:
        """The questions of the evaluation by selector, loaded once."""
        if self._asked is None:
            chosen = self.evaluation
            self._asked = questions_of(chosen.selectors, self.paths, chosen.limit, chosen.seed)
        return self._asked

    def leakage(self) -> tuple[str, ...]:
        """Which of them are among the training data, for the report; looked for once."""
        if self._leakage is None:
            asked = [question for questions in self.asked().values() for question in questions]
            self._leakage = tuple(leakage(self.train_set.items, asked).as_lines())
        return self._leakage

    def calibration(self) -> list[Question]:
        """Calibration questions, loaded once."""
        if self._calibration is None:
            self._calibration = calibration_questions(
                self._quantize_settings(Arm(kind="gptq")), self.paths
            )
        return self._calibration

    def _quantize_settings(self, arm: Arm) -> QuantizeSettings:
        grid, text = self.recipe.grid_of(arm), self.recipe.data.calibration
        return QuantizeSettings(
            method=arm.kind,  # type: ignore[arg-type]  # checked: one of PTQ
            bits=grid.bits,
            group_size=grid.group_size,
            layout=grid.layout,
            calibration=selector.parse(text) if text else None,
            samples=self.recipe.calibration.samples,
            batch_size=self.recipe.calibration.batch_size,
            iters=self.recipe.calibration.iters,
            protocol=self.recipe.evaluation.protocol,
            seed=self.recipe.seed,
            device=self.device,
        )

    def _train_settings(self, arm: Arm, seed: int) -> TrainSettings:
        return train_settings(self.recipe, arm, seed)


# Of `training`: where and how a run runs.
HOW = ("teacher_dtype", "checkpointing", "kept_blocks", "compile_blocks")


def train_settings(recipe: Recipe, arm: Arm, seed: int, **overrides: Any) -> TrainSettings:
    """Training settings of an arm, with overrides of the `training` section."""
    grid, distil = recipe.grid_of(arm), recipe.distillation
    shared = recipe.training_of(arm).model_dump() | overrides
    for key in ("seeds", *HOW):
        shared.pop(key)
    control = (arm.controller or distil.controller).model_dump()
    for key in [k for k in shared if k.startswith("beta_")]:
        control[key.removeprefix("beta_")] = shared.pop(key)
    if arm.beta == "fixed":
        control["rate"] = 0.0
    return TrainSettings(
        method=arm.kind,  # type: ignore[arg-type]  # checked: one of TRAINED
        bits=grid.bits,
        group_size=grid.group_size,
        layout=grid.layout,
        seed=seed,
        distillation=Distillation(
            kl=arm.kl,
            gate=arm.gate,
            rcka=arm.rcka,
            temperature=distil.temperature,
            target_weight=distil.target_weight,
            nontarget_weight=distil.nontarget_weight,
            tokens=arm.tokens or distil.tokens,
        ),
        controller=ControllerSettings(**control),
        omega=distil.omega,
        omega_warmup=distil.omega_warmup,
        **shared,
    )


def model_of(plan: Plan, unit: Unit) -> ModelFolder:
    """The model folder a unit evaluates.

    Raises: PrerequisiteError when its checkpoint is not there.
    """
    if unit.checkpoint is None:
        return plan.student
    try:
        return models.find(str(unit.checkpoint))
    except QatbenchError as error:
        raise PrerequisiteError(f"{unit.title}: {error.message}", hint=error.hint) from error
