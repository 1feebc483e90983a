"""The verb that looks at the machine: doctor."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from qatbench.cli_options import Data, Device, GroupSize, Json
from qatbench.errors import UsageError
from qatbench.ui import Ui, table

Models = Annotated[
    list[str] | None,
    typer.Option("--model", help="A folder, a hub id, a built-in or a known name. Repeatable."),
]
Method = Annotated[
    Literal["rtn", "gptq", "awq", "autoround", "sft", "kd", "qat", "grace", "eval"] | None,
    typer.Option(help="What is to be done with the models."),
]


def doctor_command(
    model: Models = None,
    method: Method = None,
    teacher: Annotated[str | None, typer.Option(help="Teacher of kd and grace.")] = None,
    bits: Annotated[int | None, typer.Option(help="2, 3, 4 or 8; default 4, eval: 16.")] = None,
    group_size: GroupSize = 128,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples in one forward.")] = 8,
    length: Annotated[int, typer.Option(min=1, help="Tokens of a sample, image included.")] = 704,
    data: Data = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Say what this machine can and cannot run, and the command that fixes each failure.

    Exit 3 when something is missing that the work needs.

    Example: qatbench doctor --model LLaVA-1.5-7B --method grace --teacher LLaVA-1.5-13B
    """
    import dataclasses

    from qatbench.stages.doctor import Request, examine

    ui = Ui(as_json=as_json)
    request = Request(
        tuple(model or ()), method, teacher, bits, group_size, batch_size, length,
        dict(map(_task_of, data or ())), device,
    )  # fmt: skip
    with ui.progress() as progress:
        rows = examine(request, progress)
    failures = sum(row.state == "failure" for row in rows)
    warnings = sum(row.state == "warning" for row in rows)
    told = [dataclasses.asdict(row) for row in rows]
    shown = table("doctor", [{k: v for k, v in row.items() if k != "fix"} for row in told])
    fixes = [f"{row.check}: {row.fix}" for row in rows if row.fix]
    counted = f"{failures} failures, {warnings} warnings{', what to do:' if fixes else ''}"
    ui.result({"failures": failures, "warnings": warnings, "rows": told}, [shown, counted, *fixes])
    if failures:
        raise typer.Exit(3)
    ui.next_command("make demo   # the whole experiment on the built-in models")


def _task_of(text: str) -> tuple[str, str]:
    """[TASK=]PATH: a TSV, or a folder with one, is MMBench unless it is said otherwise.

    A .jsonl or .csv file is a task of the user's own, called by its stem.
    """
    from qatbench.tasks.selector import TASKS

    name, sign, path = text.partition("=")
    if sign and name not in TASKS:
        raise UsageError(f"--data {text}: no task {name!r}", hint=f"tasks: {', '.join(TASKS)}")
    if sign:
        return name, path
    place = Path(text)
    if place.suffix in (".jsonl", ".csv"):
        return place.stem, text
    table = place.suffix == ".tsv" or (place.is_dir() and any(place.glob("*.tsv")))
    return ("mmbench" if table else "scienceqa"), text
