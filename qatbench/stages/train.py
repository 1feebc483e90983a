"""train-qat: a 16-bit student -> a trained checkpoint, packed when the method is QAT or GRACE.

sft   cross-entropy, 16 bit.           kd     plus plain distillation, 16 bit.
qat   cross-entropy through group-wise LSQ fake quantization.
grace qat plus gated decoupled distillation, relational CKA and the adaptive beta.
All four share data, steps, schedule and optimizer: a comparison is fair by construction.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from qatbench import store
from qatbench.errors import NumericsError, PrerequisiteError, UsageError
from qatbench.grace.controller import BetaController
from qatbench.quant import lsq
from qatbench.quant.grid import Grid
from qatbench.quant.result import Quantized, QuantizedLinear, layout_of
from qatbench.stages import distributed, export, optimizers, train_state
from qatbench.stages.common import Progress, silent
from qatbench.stages.distributed import ALONE, World, gather
from qatbench.stages.objective import Distillation, StepLoss, accumulate
from qatbench.stages.quantize import check_grid, notes
from qatbench.stages.student import check_init, language_linears, prepare, rebuilt
from qatbench.stages.teacher import load_teacher
from qatbench.stages.train_request import TrainRequest
from qatbench.stages.train_settings import QUANTIZED, TAUGHT, schedule
from qatbench.vlm import load as models
from qatbench.vlm.load import Loaded
from qatbench.vlm.training import TrainingData

__all__ = ["TrainRequest", "TrainingRun", "train"]


def train(request: TrainRequest, out: Path, *, resume: bool, progress: Progress) -> dict[str, Any]:
    """Train, export and prove a checkpoint in `out`; returns its provenance.

    Several processes of a launcher train together; the first one writes.

    Raises: UsageError for a grid, teacher or start that does not fit; NumericsError when a loss is
        not finite; PrerequisiteError when the teacher is missing.
    """
    settings, started = request.settings, time.monotonic()
    if settings.method in QUANTIZED:
        check_grid(request.student, settings.bits, settings.group_size)
        layout_of(settings.layout, settings.method, settings.bits)
    spec = _spec(request)
    world = distributed.join(request.device)
    world.check(settings.batch_size)
    device = world.device or models.pick_device(request.device)
    models.pick_dtype(request.dtype, device)
    folder = store.RunFolder(out, "train", spec)
    if distributed.begin(folder, resume, world) is store.State.DONE:
        return store.read_json(out / store.PROVENANCE)
    progress = progress if world.main else silent
    progress("Loading the models", 0, 0)
    run = TrainingRun(request, device, out, world)
    run.fit(progress)
    progress("Writing and reloading the checkpoint", 0, 0)
    figures = run.figures() if world.main else {}
    figures |= run.export(figures)
    if world.main:
        shutil.rmtree(out / "state", ignore_errors=True)
        folder.finish(
            inputs={
                "student": {
                    "name": Path(request.student.name).name,
                    "fingerprint": spec["student"],
                },
                "teacher": spec["teacher"],
            },
            seconds=time.monotonic() - started,
            machine=models.machine(device),
            figures=figures,
        )
    world.wait()
    return store.read_json(out / store.PROVENANCE)


def _spec(request: TrainRequest) -> dict[str, Any]:
    """What decides the checkpoint; what is left at its default is left out of it."""
    teacher = request.teacher.fingerprint() if request.teacher else None
    if request.init:
        check_init(request.student, request.init)
    init = request.init.fingerprint() if request.init else None
    student = request.student.fingerprint()
    return request.settings.spec(student, teacher, request.questions, init, request.teacher_dtype)


class TrainingRun:
    """One training run: models, optimizer, controller and the loop.

    Raises: UsageError for settings, a teacher or a start that do not fit; PrerequisiteError for
        what is not there.
    """

    def __init__(self, request: TrainRequest, device: str, out: Path, world: World = ALONE) -> None:
        self.request, self.settings, self.out = request, request.settings, out
        self.device, self.world = torch.device(device), world
        self.dtype = self._dtype(device)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        torch.manual_seed(self.settings.seed)
        if world.sharded and request.compile_blocks:
            raise UsageError("compiled blocks cannot be sharded", hint="leave one of the two out")
        how = request.how(self.device.type)
        made = prepare(self.settings, request.student, request.init, device, **how)
        self.student, self.notes = made.loaded, made.notes
        self.teacher = self._teacher(device)
        self.data = TrainingData(
            self.student, request.questions, self.settings.formats, self.settings.seed,
            max_length=self.settings.max_length, packing=self.settings.packing,
        )  # fmt: skip
        if world.sharded:
            for loaded in (self.student, self.teacher):
                if loaded is not None:
                    distributed.shard(loaded, world)
        named = self.student.model.named_parameters()
        self.parameters = {name: p for name, p in named if p.requires_grad}
        self.optimizer = optimizers.build(self.settings, self.parameters, self.device)
        control = self.settings.controller
        self.controller = BetaController(**dataclasses.asdict(control))
        self.seconds, self.saw_images = 0.0, False

    def _dtype(self, device: str) -> torch.dtype:
        """Of activations and the teacher; 16-bit weights compute in their own."""
        if self.settings.weights == "float32":
            return models.pick_dtype(self.request.dtype, device)
        if self.request.dtype not in (None, "bfloat16"):
            raise UsageError(
                f"bfloat16 weights compute in bfloat16, not {self.request.dtype}",
                hint="leave --dtype out",
            )
        return torch.bfloat16

    def _teacher(self, device: str) -> Loaded | None:
        request, weights = self.request, self.request.teacher_dtype
        if self.settings.method not in TAUGHT:
            return None
        if request.teacher is None:
            raise PrerequisiteError(
                f"{self.settings.method} needs a teacher", hint="--teacher MODEL"
            )
        if weights == "int8" and self.world.sharded:
            raise UsageError("an int8 teacher cannot be sharded", hint="leave one of the two out")
        return load_teacher(
            request.teacher, self.student, device, self.dtype, weights,
            compile_blocks=request.compile_blocks,
        )  # fmt: skip

    def fit(self, progress: Progress) -> None:
        """Run the remaining steps, saving the state now and then."""
        states = self.out / "state"
        step, before = train_state.restore(states, self.parameters, self.optimizer, self.controller)
        self.seconds = before
        log: train_state.StepLog | train_state.Silent = train_state.Silent()
        if self.world.main:
            log = train_state.StepLog(self.out / "train.jsonl", step)
            self.saw_images = log.saw_images
            self.data.skipped |= log.skipped
        started = time.monotonic()
        try:
            for number in range(step, self.settings.steps):
                log.write(self.step(number))
                self.seconds = before + time.monotonic() - started
                progress(f"Training {self.settings.method}", number + 1, self.settings.steps)
                if (number + 1) % self.request.save_every == 0:
                    train_state.save(
                        states, number + 1, self.parameters, self.optimizer, self.controller,
                        self.seconds, self.world,
                    )  # fmt: skip
        except torch.OutOfMemoryError as error:
            raise PrerequisiteError(
                f"out of GPU memory at step {number + 1}",
                hint="resume with --checkpointing (training.checkpointing: true); a lower"
                " --micro-batch-size (training.micro_batch_size) is another run",
            ) from error
        finally:
            log.close()

    def step(self, number: int) -> dict[str, Any]:
        """Optimizer step `number`, from 0; returns its line of train.jsonl."""
        settings = self.settings
        factor = schedule(number, settings.steps, settings.warmup)
        rates = {"weights": settings.lr * factor, "scales": settings.scale_lr * factor}
        optimizers.set_rates(self.optimizer, rates)
        known = len(self.data.skipped)
        rows = self.world.share(self.data.step(number, settings.batch_size))
        skipped = dict(itertools.islice(self.data.skipped.items(), known, None))
        pixels = torch.bfloat16 if settings.weights == "bfloat16" else torch.float32
        batches = [
            self.data.collate(rows[i : i + settings.micro_batch_size], self.device, pixels)
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
            self.world.sum,
        )
        self._check(number, loss)
        self.world.add_gradients(self.parameters.values())
        norm = self.world.clip(self.parameters.values(), settings.clip)
        optimizers.step(self.optimizer, settings.seed, number)
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
            "grad_norm": float(norm),
            **({"skipped": skipped} if skipped else {}),
        }

    def _terms(self) -> Distillation:
        if self.settings.method == "kd":
            return dataclasses.replace(self.settings.distillation, kl="plain", rcka=False)
        if self.settings.method == "grace":
            return self.settings.distillation
        return Distillation(kl="none", rcka=False)

    def _autocast(self) -> Callable[[], contextlib.AbstractContextManager[Any]]:
        """16-bit activations over fp32 weights where asked for: bf16 by default on CUDA."""
        if self.dtype == torch.float32 or self.settings.weights == "bfloat16":
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
        told = [*notes(self.request.student, self.request.samples), *self.request.remarks]
        if self.data.skipped:
            told.append(
                f"{len(self.data.skipped)} training samples could not be used: others of their"
                " source stood in"
            )
        if settings.method == "grace" and settings.distillation.rcka and not self.saw_images:
            told.append("RCKA inactive: no images")
        told += self.notes
        if self.teacher is not None and self.request.teacher_dtype == "int8":
            told.append("teacher's linears held in 8 bits")
        figures: dict[str, Any] = {
            "method": settings.method,
            "label": self.request.student.figures.get("label"),
            "seed": settings.seed,
            "steps": settings.steps,
            "training_seconds": round(self.seconds, 3),
            "making_seconds": round(self.seconds, 3),
            "samples_seen": settings.steps * settings.batch_size,
            "device": self.device.type,
            "dtype": str(self.dtype).removeprefix("torch."),
            "notes": told,
            "origin": self.request.origin,
        }
        if settings.method in QUANTIZED:
            figures |= {"bits": settings.bits, "group_size": settings.group_size}
            figures["layout"] = layout_of(settings.layout, settings.method, settings.bits)
        if self.device.type == "cuda":
            figures["peak_memory_bytes"] = torch.cuda.max_memory_allocated(self.device)
        if self.world.size > 1:
            figures["processes"] = self.world.size
        if self.request.leakage:
            figures["leakage"] = list(self.request.leakage)
        return figures

    def export(self, told: dict[str, Any] | None = None) -> dict[str, Any]:
        """Write the trained model: packed codes and scales, or bf16 weights; returns its figures.

        All processes must call; those that do not write return {}.
        """
        self.teacher = None
        whole = gather(self.parameters, self.world) if self.world.sharded else None
        if not self.world.main:
            return {}
        if whole is not None:
            self.student = rebuilt(self.settings, self.request.student, self.request.init, whole)
        model = self.student.model.eval()
        if self.settings.method not in QUANTIZED:
            return export.write_dense(self.request.student, self.student, self.out, told)
        grid = Grid(self.settings.bits, self.settings.group_size)
        linears = {}
        for name in language_linears(self.request.student):
            codes, scales = model.get_submodule(name).codes_and_scales()
            linears[name] = QuantizedLinear.from_codes(codes, scales, grid).to("cpu")
        lsq.detach(model)
        layout = layout_of(self.settings.layout, self.settings.method, self.settings.bits)
        quantized = Quantized(self.settings.method, layout, linears)
        to = (self.request.student, self.student, quantized, self.out, told)
        return export.write_packed(*to, device=str(self.device))
