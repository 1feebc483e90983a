"""A recipe: one YAML file is one experiment. No torch here.

Models, data, prompts, protocol, grid, training and seeds are said once; arms differ in `kind`, so a
comparison is fair by construction. `recipe_file` reads and checks the file.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Kind = Literal["base", "sft", "kd", "rtn", "gptq", "awq", "autoround", "qat", "grace"]
PTQ: tuple[str, ...] = ("rtn", "gptq", "awq", "autoround")
CALIBRATED: tuple[str, ...] = ("gptq", "awq", "autoround")
TRAINED: tuple[str, ...] = ("sft", "kd", "qat", "grace")
QUANTIZED: tuple[str, ...] = (*PTQ, "qat", "grace")
TAUGHT: tuple[str, ...] = ("kd", "grace")
SELF = "self"  # as a teacher: the student before training
NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class GridSpec(_Section):
    """Width of the integers, how many weights share a scale (-1: a whole row), and the tensors."""

    bits: Literal[2, 3, 4, 8] = 4
    group_size: Literal[-1, 16, 32, 64, 128, 256] = 128
    layout: Literal["auto", "gptq", "awq"] = "auto"

    @model_validator(mode="after")
    def _layout_has_width(self) -> GridSpec:
        if self.layout == "awq" and self.bits != 4:
            raise ValueError(f"the awq layout is defined for 4 bits, not {self.bits}")
        return self


class SourceSpec(_Section):
    """Training data of one kind: questions, or LLaVA-style conversations with their images."""

    questions: str | None = None  # TASK:SPLIT[:all|text|image]
    conversations: str | None = None  # a JSON or JSONL file
    images: str | None = None  # the folder that its image paths are relative to
    weight: float = Field(1.0, gt=0)  # share of the samples, relative to the other sources

    @model_validator(mode="after")
    def _one_kind(self) -> SourceSpec:
        if (self.questions is None) == (self.conversations is None):
            raise ValueError("a source has either `questions` or `conversations`")
        if self.images and not self.conversations:
            raise ValueError("`images` belongs to `conversations`")
        return self


class DataSpec(_Section):
    """TASK:SPLIT[:all|text|image] of each purpose, and where each task's data lies."""

    train: tuple[SourceSpec, ...] = ()  # one text: the only source of questions
    calibration: str | None = None
    eval: tuple[str, ...] = Field(min_length=1)
    paths: dict[str, str] = Field(default_factory=dict)

    @field_validator("eval", mode="before")
    @classmethod
    def _one_or_many(cls, value: object) -> object:
        return [value] if isinstance(value, str) else value

    @property
    def questions(self) -> list[str]:
        """Every TASK:SPLIT that is named."""
        named = [*self.eval, *(source.questions for source in self.train), self.calibration]
        return [text for text in named if text]

    @field_validator("train", mode="before")
    @classmethod
    def _one_source(cls, value: object) -> object:
        if value is None:
            return ()
        return [{"questions": value}] if isinstance(value, str) else value


class CalibrationSpec(_Section):
    """Samples shown to GPTQ, AWQ and AutoRound."""

    samples: int = Field(128, ge=1)
    batch_size: int = Field(8, ge=1)
    iters: int = Field(200, ge=1)


class EvaluationSpec(_Section):
    """How questions are put and answered."""

    protocol: str = "qatbench"
    mode: Literal["options", "generate"] = "options"
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    kernel: Literal["auto", "library", "dense"] = "auto"
    limit: int | None = Field(None, ge=1)


class TrainingSpec(_Section):
    """Shared by sft, kd, qat and grace; an arm may override it."""

    steps: int = Field(200, ge=1)
    batch_size: int = Field(64, ge=1)
    micro_batch_size: int = Field(16, ge=1)
    lr: float = Field(1e-4, gt=0)
    scale_lr: float = Field(1e-3, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    warmup: float = Field(0.1, ge=0, le=1)
    clip: float = Field(1.0, gt=0)
    formats: tuple[str, ...] = Field(("qatbench",), min_length=1)
    projector: Literal["trained", "frozen", "quantized"] = "trained"
    scale_gradient: Literal["log", "lsq"] = "log"
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    weights: Literal["float32", "bfloat16"] = "float32"
    packing: Literal["pack", "group"] = "pack"
    max_length: int = Field(2048, ge=16)
    teacher_dtype: Literal["auto", "int8"] = "auto"
    checkpointing: bool = False
    kept_blocks: int = Field(0, ge=0)
    compile_blocks: bool = False
    seeds: tuple[int, ...] = Field((0,), min_length=1)


class BetaSpec(_Section):
    """The controller of GRACE's distillation weight (GRACE.md item 3)."""

    target: float = 3.0
    rate: float = Field(0.003, ge=0)
    initial: float = Field(0.5, ge=0)
    low: float = Field(0.1, ge=0)
    high: float = Field(1.0, ge=0)
    ema: float = Field(0.99, ge=0, lt=1)

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, value: object) -> object:
        if isinstance(value, str):
            if value not in CONTROLLERS:
                raise ValueError(f"no preset {value!r}: {', '.join(CONTROLLERS)}, or its values")
            return CONTROLLERS[value]
        return value


# The two sets of constants in GRACE's released code (GRACE.md item 3).
CONTROLLERS: dict[str, dict[str, float]] = {
    "launch-script": {
        "target": 3.0, "rate": 0.003, "initial": 0.5, "low": 0.1, "high": 1.0, "ema": 0.99,
    },
    "class-defaults": {
        "target": 0.35, "rate": 0.0015, "initial": 1.0, "low": 0.1, "high": 5.0, "ema": 0.99,
    },
}  # fmt: skip


class DistillationSpec(_Section):
    """Constants of kd and grace."""

    temperature: float = Field(2.0, gt=0)
    target_weight: float = Field(1.0, ge=0)
    nontarget_weight: float = Field(4.0, ge=0)
    omega: float = Field(3.0, ge=0)
    omega_warmup: int = Field(400, ge=0)
    tokens: Literal["supervised", "all"] = "supervised"
    controller: BetaSpec = BetaSpec()


class TuningSpec(_Section):
    """Cross-validation of hyper-parameters on the training data; the test split is not read."""

    data: str  # TASK:SPLIT[:subset]
    folds: int = Field(3, ge=2)
    candidates: dict[str, tuple[dict[str, Any], ...]]  # arm -> overrides of `training`


class ArmRef(_Section):
    """A model that another arm makes."""

    arm: str


class Arm(_Section):
    """One row of the result table."""

    kind: Kind
    of: str | None = None  # the arm whose checkpoint is quantized or trained on
    init: str | None = None  # qat, grace: the quantized arm whose weights training starts from
    teacher: str | ArmRef | None = None  # kd, grace: instead of the recipe's; `self`: the student
    grid: GridSpec | None = None
    training: dict[str, Any] = Field(default_factory=dict)  # overrides of `training`
    controller: BetaSpec | None = None  # grace: instead of distillation.controller
    gate: bool = True  # grace: ablations, one term off
    rcka: bool = True
    beta: Literal["adaptive", "fixed"] = "adaptive"
    kl: Literal["decoupled", "plain"] = "decoupled"
    tokens: Literal["supervised", "all"] | None = None  # instead of distillation.tokens


class Recipe(_Section):
    """The whole experiment."""

    name: str = Field(pattern=NAME)
    student: str
    teacher: str | ArmRef | None = None
    data: DataSpec
    grid: GridSpec = GridSpec()
    calibration: CalibrationSpec = CalibrationSpec()
    evaluation: EvaluationSpec = EvaluationSpec()
    training: TrainingSpec = TrainingSpec()
    distillation: DistillationSpec = DistillationSpec()
    tuning: TuningSpec | None = None
    seed: int = 0
    baseline: str | None = None  # arm that differences are taken to; default: the first
    margin: float = Field(1.0, gt=0)  # points, for the equivalence verdict
    arms: dict[str, Arm] = Field(min_length=1)

    def grid_of(self, arm: Arm) -> GridSpec:
        """The arm's grid."""
        return arm.grid or self.grid

    def training_of(self, arm: Arm) -> TrainingSpec:
        """The arm's training settings."""
        return TrainingSpec.model_validate(self.training.model_dump() | arm.training)

    def teacher_of(self, arm: Arm) -> str | ArmRef | None:
        """The arm's teacher: a model or the arm that makes it; None for arms without one."""
        if arm.kind not in TAUGHT:
            return None
        chosen = arm.teacher if arm.teacher is not None else self.teacher
        if chosen != SELF:
            return chosen
        return ArmRef(arm=arm.of) if arm.of else self.student

    def seeds_of(self, name: str) -> tuple[int | None, ...]:
        """Seeds of an arm: those of training, or of the arm it is made of; (None,) if untrained."""
        arm = self.arms[name]
        if arm.kind in TRAINED:
            return self.training_of(arm).seeds
        return self.seeds_of(arm.of) if arm.of else (None,)

    def needs(self, name: str) -> list[str]:
        """Arms whose checkpoints this one is made from, in the order given."""
        arm = self.arms[name]
        teacher = self.teacher_of(arm)
        taught = teacher.arm if isinstance(teacher, ArmRef) else None
        return [other for other in (arm.of, arm.init, taught) if other]

    def order(self, wanted: tuple[str, ...] = ()) -> list[str]:
        """Arm names, each after the arms it needs; only `wanted` and what they need if given."""
        done: list[str] = []

        def visit(name: str) -> None:
            for other in self.needs(name):
                visit(other)
            if name not in done:
                done.append(name)

        for name in wanted or tuple(self.arms):
            visit(name)
        return done
