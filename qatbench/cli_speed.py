"""The verbs that run checkpoints in an engine: speed and ask."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from qatbench.cli_options import (
    Data,
    Device,
    Dtype,
    Json,
    Protocols,
    Seed,
    data_paths,
    protocols_of,
)
from qatbench.errors import UsageError
from qatbench.ui import Ui, table

if TYPE_CHECKING:
    from qatbench.records_speed import Speed
    from qatbench.stages.speed_questions import Asked

FIGURES = ("batch", "context", "decode tok/s", "prefill tok/s", "first ms", "x first", "x plain",
           "cache MB", "peak MB", "limit %", "weights MB", "questions", "questions/s")  # fmt: skip
Models = Annotated[list[str], typer.Argument(help="Hub ids, folders or built-in names.")]


def speed_command(
    model: Models,
    engine: Annotated[
        list[str] | None,
        typer.Option("--engine", help="transformers, qatbench (default: both), vllm. Repeatable."),
    ] = None,
    batch: Annotated[str, typer.Option(help="Rows, as 1,8,32.")] = "1,8,32",
    context: Annotated[str, typer.Option(help="Tokens of a prompt, as 512,2048.")] = "512,2048",
    tokens: Annotated[int, typer.Option(min=1, help="Decoded a row, after the first.")] = 64,
    repeats: Annotated[int, typer.Option(min=1, help="Of each case, in turns.")] = 5,
    warm_up: Annotated[int, typer.Option(min=0, help="Runs of each case not counted.")] = 1,
    image: Annotated[
        Literal["none", "mini", "grey"], typer.Option(help="A picture in each prompt of a VLM.")
    ] = "none",
    apart: Annotated[
        bool, typer.Option("--apart", help="Load one at a time: repeats are not in turns.")
    ] = False,
    task: Annotated[
        str | None, typer.Option("--task", help="TASK[:SPLIT[:text|image]]: questions/s too.")
    ] = None,
    questions: Annotated[int, typer.Option(min=1, help="Of the task.")] = 200,
    protocol: Protocols = None,
    data: Data = None,
    dtype: Dtype = None,
    seed: Seed = 0,
    device: Device = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder for speed.json and speed.md.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure decoding, prefill, questions/s and memory of models and engines, side by side.

    Example: qatbench speed mini/student out/gptq --context 256,512 --out out/speed
    """
    from qatbench.engine.pick import ENGINES
    from qatbench.stages.speed import speed
    from qatbench.stages.speed_measure import SpeedSettings
    from qatbench.tasks import selector
    from qatbench.vlm.load import find

    ui = Ui(as_json=as_json)
    if out is not None and out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file", hint="--out FOLDER")
    asked = _asked(task, questions, protocol, seed)
    paths = data_paths(data, selector.with_paths([asked.selector] if asked else []))
    settings = SpeedSettings(
        engines=tuple(engine or ENGINES), required=bool(engine),
        batches=_numbers("--batch", batch), contexts=_numbers("--context", context),
        tokens=tokens, repeats=repeats, warm_up=warm_up, image=image, in_turns=not apart,
        seed=seed, device=device, dtype=dtype, asked=asked,
    )  # fmt: skip
    with ui.progress() as progress:
        found = speed([find(name) for name in model], settings, paths, progress)
    _speed_result(ui, found, out)


def _asked(task: str | None, questions: int, protocol: list[str] | None, seed: int) -> Asked | None:
    from qatbench.stages.speed_questions import Asked
    from qatbench.tasks import selector

    if task is None:
        if protocol:
            raise UsageError("--protocol: no task is asked", hint="--task TASK")
        return None
    (chosen,) = selector.parse_all([task])
    return Asked(chosen, protocols_of(protocol, [chosen.task])[chosen.task], questions, seed)


def _numbers(flag: str, text: str) -> tuple[int, ...]:
    """Whole numbers of at least 1, separated by commas, each once."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise UsageError(f"{flag} {text}: whole numbers from 1 on", hint=f"{flag} 1,8")
    return tuple(dict.fromkeys(map(int, parts)))


def _speed_result(ui: Ui, found: Speed, out: Path | None) -> None:
    """Show the tables, or the object, and write both."""
    from qatbench import store
    from qatbench.report import speed as words

    value = found.model_dump(mode="json")
    if out is not None:
        store.write_json(out / "speed.json", value)
        store.write_text(out / "speed.md", words.render(found))
    rows = words.speed_rows(found)
    counted = () if any(row.peak_bytes for row in found.rows) else ("peak MB",)
    left = ("prefill tok/s", "cache MB", "x plain", *counted)
    parts = (
        (f"speed on {found.on}", words.shown(rows, left)),
        (
            "prefill and cache",
            words.shown(rows, ("decode tok/s", "first ms", "x first", "limit %", "peak MB")),
        ),
        ("engines", words.engine_rows(found)),
        ("questions/s in option mode", words.question_rows(found)),
    )
    tables: list[Any] = [
        part for title, cells in parts if cells for part in (table(title, cells, FIGURES), "")
    ]
    lines = [*words.facts(found), *words.failures(found)]
    if out is not None:
        lines.append(f"wrote {out / 'speed.json'} and {out / 'speed.md'}")
    ui.result(value, [*tables, *lines])
    where = out / "speed.json" if out else "DIR/speed.json"
    ui.next_command(f"qatbench compare RUN... --baseline RUN --speed {where}")


def ask_command(
    model: Models,
    question: Annotated[str, typer.Argument(help="What is asked; the last argument.")],
    image: Annotated[
        list[Path] | None,
        typer.Option("--image", help="A picture before the question. Repeatable."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 64,
    engine: Annotated[str, typer.Option(help="transformers or qatbench.")] = "transformers",
    dtype: Dtype = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Let several checkpoints answer one question, greedily, side by side.

    Example: qatbench ask mini/student out/gptq --image tray.png "What color is the star?"
    """
    from qatbench.stages.ask import Asked, ask
    from qatbench.vlm.load import find

    ui = Ui(as_json=as_json)
    asked = Asked(question, tuple(image or ()), max_new_tokens, engine, device, dtype)
    with ui.progress() as progress:
        found = ask([find(name) for name in model], asked, progress)
    ui.result(found, _answers(found))
    ui.next_command(f"qatbench speed {' '.join(model)}")


def _answers(found: dict[str, Any]) -> list[Any]:
    rows = []
    for answer in found["answers"]:
        rate = answer["tokens_per_second"]
        rows.append(
            {
                "model": answer["model"],
                "answer": answer["text"] + ("" if answer["ended"] else " ..."),
                "tokens": str(len(answer["tokens"])),
                "s": f"{answer['seconds']:.2f}",
                "tok/s": "-" if rate is None else f"{rate:.1f}",
            }
        )
    lines = [_difference(found["answers"][0], answer) for answer in found["answers"][1:]]
    where = found.get("gpu", found["device"])
    title = f"{found['engine']}, {found['dtype']}, {where}"
    return [table(title, rows, right=("tokens", "s", "tok/s")), *lines]


def _difference(first: dict[str, Any], answer: dict[str, Any]) -> str:
    """Where an answer leaves the first model's, in words."""
    name, at = answer["model"], answer["differs_at"]
    if not answer["same_tokenizer"]:
        return f"{name}: another vocabulary, tokens are not compared"
    if at is None:
        return f"{name}: the tokens of {first['model']}"
    return f"{name}: differs from {first['model']} from token {at + 1} on"
