"""qatbench mini: write the built-in benchmark, train the built-in models."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from qatbench.cli_options import Device, Json, Out, Seed
from qatbench.ui import Ui

app = typer.Typer(help="The built-in benchmark and models.", no_args_is_help=True)


@app.command("build")
def build_command(
    out: Out,
    kind: Annotated[
        Literal["mini", "mini-text"], typer.Argument(help="With pictures, or text only.")
    ] = "mini",
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Write a built-in benchmark in ScienceQA's layout, with an MMBench TSV beside it.

    Example: qatbench mini build --out data/mini
    """
    from qatbench.mini import benchmark, text

    ui = Ui(as_json=as_json)
    with ui.progress() as progress:
        progress(f"Drawing {kind}", 0, 0)
        made = (benchmark if kind == "mini" else text).build(out, seed=seed)
    ui.result({"folder": str(out), "kind": kind, "seed": seed}, [f"wrote {made}"])
    if seed:  # the shipped models know the world of seed 0
        ui.next_command(f"qatbench mini train student --seed {seed} --out MODELS")
    else:
        data = out.absolute()
        ui.next_command(f"qatbench eval mini/student --task scienceqa:test --data {data} --out RUN")


@app.command("train")
def train_command(
    size: Annotated[Literal["student", "teacher"], typer.Argument(help="Which model.")],
    out: Out,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 19_000,
    lr: Annotated[
        float | None, typer.Option(help="Highest learning rate. Default: 1e-3, teacher 8e-4.")
    ] = None,
    seed: Seed = 0,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Train a built-in model from scratch on the drawn world (one GPU, minutes).

    Example: qatbench mini train student --out out/student
    """
    from qatbench.mini.pretrain import PretrainSettings, pretrain
    from qatbench.vlm.load import pick_device

    ui = Ui(as_json=as_json)
    settings = PretrainSettings(size=size, seed=seed, steps=steps, lr=lr)
    with ui.progress() as progress:
        folder = pretrain(settings, out, pick_device(device), progress)
    ui.result({"model": str(folder), "size": size, "steps": steps}, [f"wrote {folder}"])
    if seed:
        ui.next_command(f"qatbench mini build --seed {seed} --out DATA")
    else:
        model = folder.absolute()
        ui.next_command(f"qatbench eval {model} --task scienceqa:test --data mini --out RUN")
