"""The one place where an engine is picked by its name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from qatbench.engine import fast, plain
from qatbench.engine.runner import Runner
from qatbench.errors import UsageError
from qatbench.vlm.load import ModelFolder

ENGINES = ("transformers", "qatbench")


def check(names: list[str]) -> None:
    """Refuse what is no engine.

    Raises: UsageError.
    """
    for name in names:
        if name not in ENGINES:
            raise UsageError(f"no engine {name!r}", hint=f"--engine {' or '.join(ENGINES)}")


def load(
    engine: str,
    folder: ModelFolder,
    *,
    device: str,
    dtype: torch.dtype,
    progress: Callable[[str, int, int], None] | None = None,
) -> Runner:
    """Load a model into an engine.

    Raises: UsageError for an unknown engine; PrerequisiteError where the engine cannot run the
        model on this device; what loading a model raises.
    """
    check([engine])
    module: Any = fast if engine == "qatbench" else plain
    runner: Runner = module.load(folder, device=device, dtype=dtype, progress=progress)
    return runner
