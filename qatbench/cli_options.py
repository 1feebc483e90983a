"""Options that several verbs share, and what their texts mean."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from qatbench.errors import UsageError

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with an unfinished folder.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N; default: found.")]
Data = Annotated[
    list[str] | None,
    typer.Option(
        "--data", help="[TASK=]PATH: a folder, a hub id, `mini` or `mini-text`. Repeatable."
    ),
]
Out = Annotated[Path, typer.Option("--out", help="Folder to write.")]
Seed = Annotated[int, typer.Option(help="Seed of everything that is drawn.")]
Limit = Annotated[int | None, typer.Option(min=1, help="First N questions of a seeded order.")]
BatchSize = Annotated[int | None, typer.Option(min=1, help="Questions a batch; default: found.")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; default: found.")]
Bits = Annotated[int, typer.Option(help="2, 3, 4 or 8.")]
GroupSize = Annotated[int, typer.Option(help="Weights a scale; -1: a whole row.")]
LayoutName = Annotated[
    Literal["auto", "gptq", "awq"],
    typer.Option("--layout", help="Tensors of the checkpoint; auto: gptq, of AWQ at 4 bits awq."),
]
SaveEvery = Annotated[int, typer.Option(min=1, help="Steps between saved states.")]
Model = Annotated[str, typer.Argument(help="Hub id, folder or built-in name.")]
Tasks = Annotated[
    list[str],
    typer.Option(
        "--task", help="TASK[:SPLIT[:text|image]], or your own FILE[:text|image]. Repeatable."
    ),
]
Protocols = Annotated[list[str] | None, typer.Option("--protocol", help="[TASK=]NAME. Repeatable.")]
Formats = Annotated[
    list[str] | None,
    typer.Option("--format", help="Prompt format: a protocol or `choices`. Repeatable."),
]
Recipe = Annotated[Path, typer.Argument(help="A recipe (YAML).")]
Arms = Annotated[list[str] | None, typer.Option("--arm", help="Only this arm. Repeatable.")]
Results = Annotated[Path, typer.Option("--out", help="Results folder.")]
Jobs = Annotated[int, typer.Option(min=1, help="Worker processes: parts run side by side.")]


def data_paths(data: list[str] | None, tasks: list[str]) -> dict[str, str]:
    """--data [TASK=]PATH: without a task name the path is for the only task there is."""
    paths: dict[str, str] = {}
    for item in data or []:
        name, sign, path = item.partition("=")
        if sign and name not in tasks:
            raise UsageError(
                f"--data {item}: no task {name!r} is asked for",
                hint=f"tasks: {', '.join(sorted(set(tasks))) or 'none'}",
            )
        if sign:
            paths[name] = path
        elif len(set(tasks)) == 1:
            paths[tasks[0]] = item
        elif not tasks:
            raise UsageError(f"--data {item}: no task needs it", hint="a file is its own data")
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


def same_options(**values: object) -> list[str]:
    """--name value for each value that was given."""
    pairs = ((f"--{name.replace('_', '-')}", value) for name, value in values.items())
    return [part for name, value in pairs if value is not None for part in (name, str(value))]


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
                raise UsageError(
                    f"--protocol {item}: no task {task!r} was asked for",
                    hint=f"tasks: {', '.join(tasks)}",
                )
            chosen[task] = protocol if sign else item
    for name in chosen.values():
        protocols.get(name)
    return chosen
