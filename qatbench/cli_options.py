"""Options that several verbs share, and what their texts mean."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qatbench.errors import UsageError

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with an unfinished folder.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N; default: found.")]
Data = Annotated[
    list[str] | None,
    typer.Option("--data", help="[TASK=]PATH: a folder, a hub id, or `mini`. Repeatable."),
]
Out = Annotated[Path, typer.Option("--out", help="Folder to write.")]
Seed = Annotated[int, typer.Option(help="Seed of everything that is drawn.")]
Jobs = Annotated[int, typer.Option(min=1, help="Worker processes: parts run side by side.")]


def data_paths(data: list[str] | None, tasks: list[str]) -> dict[str, str]:
    """--data [TASK=]PATH: without a task name the path is for the only task there is."""
    paths: dict[str, str] = {}
    for item in data or []:
        name, sign, path = item.partition("=")
        if sign:
            paths[name] = path
        elif len(set(tasks)) == 1:
            paths[tasks[0]] = item
        else:
            raise UsageError(f"--data {item}: which task?", hint="--data TASK=PATH")
    return paths


def worker_options(
    recipe: Path, out: Path, data: list[str] | None, device: str | None
) -> list[str]:
    """What a worker's command line repeats of this one's."""
    options = [str(recipe), "--out", str(out), "--json"]
    options += [part for item in data or [] for part in ("--data", item)]
    return options + (["--device", device] if device else [])


def protocols_of(given: list[str] | None, tasks: list[str]) -> dict[str, str]:
    """--protocol [TASK=]NAME for each task asked; default `qatbench`.

    Raises: UsageError for an unknown protocol, or a task that was not asked for.
    """
    from qatbench.tasks import protocols

    chosen = dict.fromkeys(tasks, "qatbench")
    for item in given or []:
        name, sign, protocol = item.partition("=")
        for task in [name] if sign else tasks:
            if task not in chosen:
                raise UsageError(f"--protocol {item}: no task {task!r} was asked for")
            chosen[task] = protocol if sign else item
    for name in chosen.values():
        protocols.get(name)
    return chosen
