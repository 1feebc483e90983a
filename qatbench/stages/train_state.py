"""What a training run needs to go on exactly: weights, optimizer moments, controller, step.

Safetensors and JSON, written to a temporary folder and renamed; one state is kept. Data order and
schedule follow from the step, so nothing else has to be remembered.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from qatbench import store
from qatbench.errors import ArtifactError
from qatbench.grace.controller import BetaController
from qatbench.stages import optimizers
from qatbench.stages.distributed import ALONE, World, like, whole


def save(
    folder: Path,
    step: int,
    parameters: dict[str, torch.nn.Parameter],
    optimizer: optimizers.Optimizer,
    controller: BetaController,
    seconds: float,
    world: World = ALONE,
) -> None:
    """Write the state after `step` optimizer steps and drop older ones.

    Of several processes all must call: sharded tensors are gathered. The first one writes.
    """
    tensors: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        parts = {"weight": whole(parameter.detach()).cpu().contiguous()}
        parts |= optimizers.tensors_of(optimizer, parameter, step)
        if world.main:
            tensors |= {f"{part}/{name}": value for part, value in parts.items()}
    if not world.main:
        return
    scratch = folder / "writing"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    save_file(tensors, scratch / "state.safetensors")
    store.write_json(
        scratch / "state.json",
        {"step": step, "seconds": seconds, "controller": controller.state_dict()},
    )
    final = folder / f"step-{step:07d}"
    shutil.rmtree(final, ignore_errors=True)
    scratch.rename(final)
    for old in folder.glob("step-*"):
        if old != final:
            shutil.rmtree(old)


def restore(
    folder: Path,
    parameters: dict[str, torch.nn.Parameter],
    optimizer: optimizers.Optimizer,
    controller: BetaController,
) -> tuple[int, float]:
    """Load the newest state; returns (step, seconds so far), (0, 0.0) when there is none.

    It may have been written by another number of processes.

    Raises: ArtifactError when the state is damaged or of another model.
    """
    found = sorted(folder.glob("step-*"))
    if not found:
        return 0, 0.0
    facts = store.read_json(found[-1] / "state.json")
    try:
        parts: dict[str, dict[str, Tensor]] = {}
        for key, value in load_file(found[-1] / "state.safetensors").items():
            part, _, name = key.partition("/")
            parts.setdefault(name, {})[part] = value
        for name, parameter in parameters.items():
            with torch.no_grad():
                parameter.copy_(like(parts[name].pop("weight"), parameter))
            optimizers.put_back(optimizer, parameter, parts[name], facts["step"])
        controller.load_state_dict(facts["controller"])
    except (SafetensorError, KeyError, RuntimeError, OSError, ValueError) as error:
        raise ArtifactError(
            f"damaged training state {found[-1]}: {error}",
            hint="delete that folder; the run then starts from the beginning",
        ) from error
    return int(facts["step"]), float(facts["seconds"])


class Silent:
    """The log of a process that does not write."""

    def write(self, record: dict[str, Any]) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


class StepLog:
    """train.jsonl: one line an optimizer step; lines after the restored step are dropped.

    Where tensorboard is installed, the terms of each step go into its files beside it too.
    """

    def __init__(self, path: Path, step: int) -> None:
        kept = []
        self.saw_images = False
        self.skipped: dict[str, str] = {}  # samples that could not be used, and why
        if path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    record = json.loads(line)
                except ValueError:  # torn by a kill: that step is done again
                    break
                if record["step"] > step:
                    break
                kept.append(line)
                self.saw_images |= bool(record.get("images"))
                self.skipped |= record.get("skipped", {})
        if len(kept) < step:
            raise ArtifactError(f"{path} ends at step {len(kept)}, the saved state at {step}")
        store.write_text(path, "".join(line + "\n" for line in kept))
        self._stream = path.open("a", encoding="utf-8")
        self._board = _tensorboard(path.parent / "tensorboard", step)

    def write(self, record: dict[str, Any]) -> None:
        """Append one line and flush it."""
        self._stream.write(json.dumps(record) + "\n")
        self._stream.flush()
        if self._board is not None:
            for key, value in record.items():
                if value is not None and key != "step":
                    self._board.add_scalar(f"train/{key}", value, record["step"])

    def close(self) -> None:
        """Close the files."""
        self._stream.close()
        if self._board is not None:
            self._board.close()


def _tensorboard(folder: Path, step: int) -> Any | None:
    """A writer that hides what an earlier try logged after `step`; None without tensorboard."""
    with contextlib.suppress(ImportError):
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(str(folder), purge_step=step + 1)
    return None
