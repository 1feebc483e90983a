"""What a recipe names: grids that must fit, questions, protocols, formats. No torch is imported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qatbench import store
from qatbench.errors import PrerequisiteError, UsageError
from qatbench.tasks import protocols, selector
from qatbench.vlm import builtin, layout, shapes


def check_grid(student: str, bits: int, group_size: int) -> list[str]:
    """Problems of a grid with a model, from its config alone; [] for a hub id not looked up yet."""
    config = peek(student)
    return layout.grid_problems(config, bits, group_size) if config else []


def check_name(kind: str, text: str) -> str | None:
    """Say what is wrong with the name of `questions`, a `protocol` or a `format`; else None."""
    try:
        if kind == "questions":
            selector.parse(text)
        elif not (kind == "format" and text == protocols.CHOICES):
            protocols.get(text)
    except UsageError as error:
        return f"{error.message} ({error.hint})"
    return None


def peek(name: str) -> dict[str, Any] | None:
    """config.json of a local, built-in or well-known model; None for what only the hub knows.

    Raises: PrerequisiteError when it is neither.
    """
    if name == builtin.SMOLLM2:
        return dict(shapes.SHAPES["HuggingFaceTB/SmolLM2-135M-Instruct"])
    if name in builtin.MINI:
        return store.read_json(builtin.mini_folder(name) / "config.json")
    if Path(name).is_dir():
        return store.read_json(Path(name) / "config.json")
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        return shapes.SHAPES.get(name)
    raise PrerequisiteError(f"no model at {name}", hint="a folder, a hub id, or a built-in name")
