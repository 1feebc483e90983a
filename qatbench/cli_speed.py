"""The verbs that run a checkpoint in an engine: ask."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from qatbench.cli_options import Device, Dtype, Json
from qatbench.ui import Ui, table

Models = Annotated[list[str], typer.Argument(help="Hub ids, folders or built-in names.")]


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
