"""The one place where an engine is picked by its name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from qatbench.engine import fast, plain, vllm
from qatbench.engine.runner import Room, Runner
from qatbench.errors import UsageError
from qatbench.vlm.load import ModelFolder

ENGINES = ("transformers", "qatbench")
MEASURED = (*ENGINES, vllm.ENGINE)  # what `speed` measures; the last one only where it is named


def check(names: Sequence[str], known: Sequence[str] = ENGINES) -> None:
    """Refuse what is no engine.

    Raises: UsageError.
    """
    for name in names:
        if name not in known:
            raise UsageError(f"no engine {name!r}", hint=f"--engine {' or '.join(known)}")


def require(names: Sequence[str], device: str) -> dict[str, str]:
    """Versions of what engines need beside this project's own packages, before one is loaded.

    Raises: PrerequisiteError where it is not installed or does not run on the device.
    """
    return vllm.require(device) if vllm.ENGINE in names else {}


def load(
    engine: str,
    folder: ModelFolder,
    *,
    device: str,
    dtype: torch.dtype,
    progress: Callable[[str, int, int], None] | None = None,
    room: Room | None = None,
) -> Runner:
    """Load a model into an engine; `room` is the most that will be asked, and needed for vLLM.

    Raises: UsageError for an unknown engine; PrerequisiteError where the engine cannot run the
        model on this device; what loading a model raises.
    """
    check([engine], MEASURED)
    if engine == vllm.ENGINE:
        if room is None:
            raise UsageError("vLLM is for speed alone", hint=f"--engine {' or '.join(ENGINES)}")
        return vllm.load(folder, device=device, dtype=dtype, room=room)
    module: Any = fast if engine == "qatbench" else plain
    runner: Runner = module.load(folder, device=device, dtype=dtype, progress=progress)
    return runner
