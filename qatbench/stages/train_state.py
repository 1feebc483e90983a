"""What a training run needs to go on exactly: weights, optimizer moments, controller, step.

Safetensors and JSON, written to a temporary folder and renamed; one state is kept. Data order and
schedule follow from the step, so nothing else has to be remembered.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from qatbench import store
from qatbench.errors import ArtifactError
from qatbench.grace.controller import BetaController

MOMENTS = ("exp_avg", "exp_avg_sq")


def save(
    folder: Path,
    step: int,
    parameters: dict[str, torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    controller: BetaController,
    seconds: float,
) -> None:
    """Write the state after `step` optimizer steps and drop older ones."""
    scratch = folder / "writing"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    tensors = {}
    for name, parameter in parameters.items():
        tensors[f"weight/{name}"] = parameter.detach().cpu().contiguous()
        for moment in MOMENTS:
            tensors[f"{moment}/{name}"] = optimizer.state[parameter][moment].cpu().contiguous()
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
    optimizer: torch.optim.Optimizer,
    controller: BetaController,
) -> tuple[int, float]:
    """Load the newest state; returns (step, seconds so far), (0, 0.0) when there is none.

    Raises: ArtifactError when the state is damaged or of another model.
    """
    found = sorted(folder.glob("step-*"))
    if not found:
        return 0, 0.0
    facts = store.read_json(found[-1] / "state.json")
    fused = bool(optimizer.defaults.get("fused"))
    try:
        tensors = load_file(found[-1] / "state.safetensors")
        for name, parameter in parameters.items():
            device = parameter.device
            with torch.no_grad():
                parameter.copy_(tensors[f"weight/{name}"].to(device))
            optimizer.state[parameter] = {
                "step": torch.tensor(float(facts["step"]), device=device if fused else "cpu"),
                **{m: tensors[f"{m}/{name}"].to(device) for m in MOMENTS},
            }
        controller.load_state_dict(facts["controller"])
    except (SafetensorError, KeyError, RuntimeError, OSError, ValueError) as error:
        raise ArtifactError(
            f"damaged training state {found[-1]}: {error}",
            hint="delete that folder; the run then starts from the beginning",
        ) from error
    return int(facts["step"]), float(facts["seconds"])


class StepLog:
    """train.jsonl: one line an optimizer step; lines after the restored step are dropped."""

    def __init__(self, path: Path, step: int) -> None:
        kept = []
        if path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    record = json.loads(line)
                except ValueError:  # torn by a kill: that step is done again
                    break
                if record["step"] > step:
                    break
                kept.append(line)
        if len(kept) < step:
            raise ArtifactError(f"{path} ends at step {len(kept)}, the saved state at {step}")
        store.write_text(path, "".join(line + "\n" for line in kept))
        self._stream = path.open("a", encoding="utf-8")

    def write(self, record: dict[str, Any]) -> None:
        """Append one line and flush it."""
        self._stream.write(json.dumps(record) + "\n")
        self._stream.flush()

    def close(self) -> None:
        """Close the file."""
        self._stream.close()
