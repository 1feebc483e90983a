"""Writing a benchmark's folder, whole or not at all."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qatbench.errors import UsageError

MINI = 10  # minitrain, minival, minitest hold one question in ten


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder beside `out` to write into, renamed to `out` at the end.

    Raises: UsageError if `out` is a file or a folder that is not empty.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} exists and is not empty", hint="name a new folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as scratch:
        new = Path(scratch) / out.name
        (new / "images").mkdir(parents=True)
        yield new
        os.rename(new, out)  # POSIX: replaces an empty folder, fails on one filled meanwhile


def write_problems(
    folder: Path, problems: dict[str, dict[str, Any]], splits: dict[str, list[str]]
) -> None:
    """Write problems.json and pid_splits.json, with `trainval` and the mini splits added."""
    pids = splits | {"trainval": sorted(splits["train"] + splits["val"], key=int)}
    pids |= {f"mini{name}": its[: max(1, len(its) // MINI)] for name, its in splits.items()}
    for name, content in (("problems", problems), ("pid_splits", pids)):
        body = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
        (folder / f"{name}.json").write_bytes(body.encode())
