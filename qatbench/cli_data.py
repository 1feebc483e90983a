"""qatbench data: what is here of a benchmark, and how to get it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from qatbench.cli_options import Json
from qatbench.ui import Ui, table

if TYPE_CHECKING:
    from qatbench.stages.data import Checked, Part

app = typer.Typer(help="Check and fetch data.", no_args_is_help=True)

Places = Annotated[
    list[str] | None,
    typer.Option("--data", help="[TASK=]PATH: a folder or a file; default: ./data. Repeatable."),
]


@app.command("check")
def check_command(
    data: Places = None,
    images: Annotated[bool, typer.Option("--images", help="Decode every image.")] = False,
    as_json: Json = False,
) -> None:
    """Count what is here, against the figures of the published releases; say what is missing.

    Exit 0: usable for what it is; 1: something is wrong or damaged; 3: nothing is there.

    Example: qatbench data check --data scienceqa=DIR --data mmbench=dev.tsv
    """
    from qatbench.stages.data import check
    from qatbench.stages.data_places import places

    ui = Ui(as_json=as_json)
    with ui.progress() as progress:
        found = check(places(data), images=images, progress=progress)
    rows = [_row(one, part) for one in found for part in one.parts]
    shown: list[Any] = [table("data", rows, right=("rows", "images here", "questions"))]
    told = [line for one in found for line in _lines(one)]
    ui.result({"places": [_value(one) for one in found]}, [*(shown if rows else []), *told])
    if any(one.is_wrong for one in found):
        raise typer.Exit(1)
    absent = [one for one in found if one.absent]
    if absent:
        ui.next_command(f"qatbench data fetch {_task(absent[0])} --to data/{_task(absent[0])}")
        raise typer.Exit(3)
    first = found[0].place
    task = str(first.path) if first.task not in ("scienceqa", "mmbench") else first.task
    where = f" --data {first.path}" if task == first.task else ""
    ui.next_command(f"qatbench eval MODEL --task {task}{where} --out RUN")


@app.command("fetch")
def fetch_command(
    task: Annotated[Literal["scienceqa", "mmbench"], typer.Argument(help="Which benchmark.")],
    to: Annotated[
        Path | None, typer.Option("--to", help="Folder to make; default: data/TASK.")
    ] = None,
    source: Annotated[
        str | None, typer.Option("--from", help="Hub id, owner/name[/CONFIGURATION].")
    ] = None,
    as_json: Json = False,
) -> None:
    """Get a benchmark's parquet files from the hub into a folder, and check them.

    Exit 3 when the hub cannot be reached. What was cut off goes on.

    Example: qatbench data fetch mmbench --from lmms-lab/MMBench/cn --to data/mmbench-cn
    """
    from qatbench.stages.data import check
    from qatbench.stages.data_fetch import fetch
    from qatbench.stages.data_places import HERE, places

    ui = Ui(as_json=as_json)
    with ui.progress() as progress:
        folder = fetch(task, source, to or HERE / task, progress=progress)
        found = check(places([f"{task}={folder}"]), images=False, progress=progress)
    told = [line for one in found for line in _lines(one)]
    value = {"folder": str(folder), "places": [_value(one) for one in found]}
    ui.result(value, [f"wrote {folder}", *told])
    if any(one.is_wrong for one in found):
        raise typer.Exit(1)
    ui.next_command(f"qatbench eval MODEL --task {task} --data {folder} --out RUN")


def _task(one: Checked) -> str:
    return one.place.task if one.place.task in ("scienceqa", "mmbench") else "scienceqa"


def _row(one: Checked, part: Part) -> dict[str, str]:
    found, known = part.figures, part.known
    return {
        "data": one.place.task,
        "split": part.split,
        "rows": f"{found['rows']} of {known}" if known else str(found["rows"]),
        "questions": str(found["questions"]),
        "images here": f"{found['image_here']} of {found['image']}",
        "release": part.release or "-",
        "state": part.state,
    }


def _lines(one: Checked) -> list[str]:
    lines = [f"{one.place.path}"] if one.parts or one.wrong else []
    if one.absent:
        lines.append(f"absent: {one.absent}")
    lines += [f"  wrong: {text}" for text in one.wrong]
    for part in one.parts:
        lines += [f"  {part.split}: wrong: {text}" for text in part.wrong]
        lines += [f"  {part.split}: missing: {text}" for text in part.missing]
        if part.figures["unanswered"]:
            none = part.figures["unanswered"]
            lines.append(f"  {part.split}: {none} rows have no answer: they cannot be scored")
        if part.figures["repeated"]:
            lines.append(f"  {part.split}: {part.figures['repeated']} rows repeat an earlier one")
    lines += [f"  missing: {text}" for text in one.missing]
    lines += [f"  sha256 {digest}  {name}" for name, digest in one.files.items()]
    return lines


def _value(one: Checked) -> dict[str, Any]:
    value = dataclasses.asdict(one)
    value["place"] = {"task": one.place.task, "path": str(one.place.path)}
    for told, part in zip(value["parts"], one.parts, strict=True):
        told["state"] = part.state
    return value
