"""train-qat: a 16-bit student -> a trained checkpoint, packed when the method is QAT or GRACE.

sft   cross-entropy, 16 bit.           kd     plus plain distillation, 16 bit.
qat   cross-entropy through group-wise LSQ fake quantization.
grace qat plus gated decoupled distillation, relational CKA and the adaptive beta.
All four share data, steps, schedule and optimizer: a comparison is fair by construction.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from qatbench import store
from qatbench.errors import NumericsError, PrerequisiteError, UsageError
from qatbench.grace.controller import BetaController
from qatbench.quant import lsq
from qatbench.quant.grid import Grid
from qatbench.quant.result import Quantized, QuantizedLinear
from qatbench.records import Question
from qatbench.stages import export, train_state
from qatbench.stages.common import Progress
from qatbench.stages.objective import Distillation, StepLoss, accumulate
from qatbench.stages.quantize import check_grid, notes
from qatbench.stages.train_settings import QUANTIZED, TAUGHT, TrainSettings, schedule
from qatbench.tasks import selector
from qatbench.tasks.selector import Selector
from qatbench.vlm import layout
from qatbench.vlm import load as models
from qatbench.vlm.load import Loaded, ModelFolder
from qatbench.vlm.training import TrainingData


@dataclass(frozen=True)
class TrainRequest:
    """Settings, inputs and how to run them."""

    settings: TrainSettings
    student: ModelFolder
    teacher: ModelFolder | None
    questions: Sequence[Question]
    device: str | None = None
    save_every: int = 50
    dtype: str | None = None  # of activations and the teacher; default by device
    init: ModelFolder | None = None  # a packed checkpoint of the student to start from
    teacher_dtype: Literal["auto", "int8"] = "auto"  # of the frozen teacher's weights
    checkpointing: bool = False  # recompute activations in the backward pass
    compile: bool | None = None  # the fake quantization; default: on CUDA


def training_questions(chosen: Selector, paths: Mapping[str, str]) -> list[Question]:
    """Load a training split."""
    return selector.load(chosen, paths)


def train(request: TrainRequest, out: Path, *, resume: bool, progress: Progress) -> dict[str, Any]:
    """Train, export and prove a checkpoint in `out`; returns its provenance.

    Raises: UsageError for a grid or teacher that does not fit; NumericsError when a loss is not
        finite; PrerequisiteError when the teacher is missing.
    """
    settings, started = request.settings, time.monotonic()
    if settings.method in QUANTIZED:
        check_grid(request.student, settings.bits, settings.group_size)
    teacher_fp = request.teacher.fingerprint() if request.teacher else None
    spec = settings.spec(request.student.fingerprint(), teacher_fp, request.questions)
    device = models.pick_device(request.device)
    models.pick_dtype(request.dtype, device)
    folder = store.RunFolder(out, "train", spec)
    if folder.begin(resume=resume) is store.State.DONE:
        return store.read_json(out / store.PROVENANCE)
    progress("Loading the models", 0, 0)
    run = TrainingRun(request, device, out)
    run.fit(progress)
    progress("Writing and reloading the checkpoint", 0, 0)
    figures = run.figures() | run.export()
    shutil.rmtree(out / "state", ignore_errors=True)
    return folder.finish(
        inputs={
            "student": {"name": Path(request.student.name).name, "fingerprint": spec["student"]},
            "teacher": spec["teacher"],
        },
        seconds=time.monotonic() - started,
        machine=models.machine(device),
        figures=figures,
    )


class TrainingRun:
    """One training run: models, optimizer, controller and the loop."""

    def __init__(self, request: TrainRequest, device: str, out: Path) -> None:
        self.request, self.settings, self.out = request, request.settings, out
        self.device = torch.device(device)
        self.dtype = models.pick_dtype(request.dtype, device)
        torch.manual_seed(self.settings.seed)
        self.student = models.load(request.student, device=device, dtype=torch.float32)
        self.teacher = self._load_teacher(device)
        self.data = TrainingData(
            self.student, request.questions, self.settings.formats, self.settings.seed
        )
        self.parameters = self._trainable()
        self.optimizer = self._optimizer()
        control = self.settings.controller
        self.controller = BetaController(**dataclasses.asdict(control))
        self.seconds, self.saw_images = 0.0, False
        self.betas: list[float] = []

    def _load_teacher(self, device: str) -> Loaded | None:
        if self.settings.method not in TAUGHT:
            return None
        if self.request.teacher is None:
            raise PrerequisiteError(
                f"{self.settings.method} needs a teacher", hint="--teacher MODEL"
            )
        teacher = models.load(self.request.teacher, device=device, dtype=self.dtype)
        if teacher.tokenizer.get_vocab() != self.student.tokenizer.get_vocab():
            raise UsageError(
                f"{self.request.teacher.name} and {self.request.student.name} have different "
                "vocabularies",
                hint="distillation needs a teacher with the student's tokenizer",
            )
        teacher.model.requires_grad_(False)
        return teacher

    def _trainable(self) -> dict[str, torch.nn.Parameter]:
        model, arch = self.student.model, self.student.arch
        if self.settings.method in QUANTIZED:
            grid = Grid(self.settings.bits, self.settings.group_size)
            lsq.attach(model, list(layout.linear_shapes(self.request.student.config)), grid)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not name.startswith(arch.vision or ("\0",)))
        model.train()
        return {name: p for name, p in model.named_parameters() if p.requires_grad}

    def _optimizer(self) -> torch.optim.Optimizer:
        scales = [p for name, p in self.parameters.items() if name.endswith("log_scale")]
        weights = [p for name, p in self.parameters.items() if not name.endswith("log_scale")]
        groups = [
            {"params": weights, "lr": self.settings.lr, "weight_decay": self.settings.weight_decay},
            {"params": scales, "lr": self.settings.scale_lr, "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(
            [group for group in groups if group["params"]],
            betas=self.settings.betas,
            fused=self.device.type == "cuda",
        )

    def fit(self, progress: Progress) -> None:
        """Run the remaining steps, saving the state now and then."""
        states = self.out / "state"
        step, before = train_state.restore(states, self.parameters, self.optimizer, self.controller)
        log = train_state.StepLog(self.out / "train.jsonl", step)
        started = time.monotonic()
        try:
            for number in range(step, self.settings.steps):
                log.write(self._step(number))
                self.seconds = before + time.monotonic() - started
                progress(f"Training {self.settings.method}", number + 1, self.settings.steps)
                if (number + 1) % self.request.save_every == 0:
                    train_state.save(
                        states, number + 1, self.parameters, self.optimizer, self.controller,
                        self.seconds,
                    )  # fmt: skip
        except torch.OutOfMemoryError as error:
            raise PrerequisiteError(
                f"out of GPU memory at step {number + 1}",
                hint="lower --micro-batch-size (training.micro_batch_size) and resume",
            ) from error
        finally:
            log.close()

    def _step(self, number: int) -> dict[str, Any]:
        settings = self.settings
        factor = schedule(number, settings.steps, settings.warmup)
        for group, base in zip(
            self.optimizer.param_groups, (settings.lr, settings.scale_lr), strict=False
        ):
            group["lr"] = base * factor
        rows = self.data.step(number, settings.batch_size)
        batches = [
            self.data.collate(rows[i : i + settings.micro_batch_size], self.device, torch.float32)
            for i in range(0, len(rows), settings.micro_batch_size)
        ]
        beta = self.controller.beta if settings.method == "grace" else 1.0
        omega = settings.omega * min(1.0, (number + 1) / max(1, settings.omega_warmup))
        loss = accumulate(
            self.student.model,
            self.teacher.model if self.teacher else None,
            batches,
            self._terms(),
            beta,
            omega,
            self._autocast(),
        )
        self._check(number, loss)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), settings.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if settings.method == "grace" and loss.kd is not None:
            self.controller.update(loss.kd)
        self.saw_images |= loss.images > 0
        return {
            "step": number + 1,
            **dataclasses.asdict(loss),
            "beta": beta if loss.kd is not None else None,
            "omega": omega if loss.images else None,
            "lr": settings.lr * factor,
            "scale_lr": settings.scale_lr * factor if settings.method in QUANTIZED else None,
            "grad_norm": norm.item(),
        }

    def _terms(self) -> Distillation:
        if self.settings.method == "kd":
            return dataclasses.replace(self.settings.distillation, kl="plain", rcka=False)
        if self.settings.method == "grace":
            return self.settings.distillation
        return Distillation(kl="none", rcka=False)

    def _autocast(self) -> Callable[[], contextlib.AbstractContextManager[Any]]:
        """16-bit activations over fp32 weights where asked for: bf16 by default on CUDA."""
        if self.dtype == torch.float32:
            return contextlib.nullcontext
        return lambda: torch.autocast(self.device.type, dtype=self.dtype)

    @staticmethod
    def _check(number: int, loss: StepLoss) -> None:
        for name in ("ce", "kd", "rcka"):
            value = getattr(loss, name)
            if value is not None and not math.isfinite(value):
                raise NumericsError(
                    f"{name} is {value} at step {number + 1}",
                    hint="lower the learning rates; a run that is resumed starts at its last state",
                )

    def figures(self) -> dict[str, Any]:
        """What the report needs to know of this run."""
        settings = self.settings
        told = notes(self.request.student, self.request.questions)
        if settings.method == "grace" and settings.distillation.rcka and not self.saw_images:
            told.append("RCKA inactive: no images")
        figures: dict[str, Any] = {
            "method": settings.method,
            "label": self.request.student.figures.get("label"),
            "seed": settings.seed,
            "steps": settings.steps,
            "training_seconds": round(self.seconds, 3),
            "making_seconds": round(self.seconds, 3),
            "samples_seen": settings.steps * settings.batch_size,
            "device": self.device.type,
            "notes": told,
        }
        if settings.method in QUANTIZED:
            figures |= {"bits": settings.bits, "group_size": settings.group_size, "layout": "gptq"}
        if self.device.type == "cuda":
            figures["peak_memory_bytes"] = torch.cuda.max_memory_allocated(self.device)
        return figures

    def export(self) -> dict[str, Any]:
        """Write the trained model: packed codes and scales, or bf16 weights."""
        self.teacher = None
        model = self.student.model.eval()
        if self.settings.method not in QUANTIZED:
            return export.write_dense(self.request.student, self.student, self.out)
        grid = Grid(self.settings.bits, self.settings.group_size)
        linears = {}
        for name, layer in lsq.quantized_layers(model).items():
            codes, scales = layer.codes_and_scales()
            linears[name] = QuantizedLinear.from_codes(codes.cpu(), scales.cpu(), grid)
        lsq.detach(model)
        quantized = Quantized(self.settings.method, "gptq", linears)
        return export.write_packed(self.request.student, self.student, quantized, self.out)
