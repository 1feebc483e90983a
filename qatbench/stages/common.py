"""What stages share: the progress callback, and work in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

Progress = Callable[[str, int, int], None]
"""Called as progress(what, done, total); total 0 means: a step without a length."""


def silent(what: str, done: int, total: int) -> None:
    """Report nothing."""


def own_process(
    module: str, *arguments: str, timeout: float | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a module of this package in a new Python, whatever the current folder is.

    Raises: subprocess.TimeoutExpired.
    """
    root = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    return subprocess.run(
        [sys.executable, "-m", module, *arguments], env=os.environ | {"PYTHONPATH": path},
        capture_output=True, text=True, timeout=timeout, check=False,
    )  # fmt: skip
