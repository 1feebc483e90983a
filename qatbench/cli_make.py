"""The verbs that make checkpoints without training, and their cards: quantize, card."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from qatbench.cli_options import (
    Bits,
    Data,
    Device,
    Dtype,
    GroupSize,
    Json,
    LayoutName,
    Limit,
    Model,
    Out,
    Resume,
    Seed,
    data_paths,
)
from qatbench.cli_show import checkpoint_result
from qatbench.errors import UsageError
from qatbench.ui import Ui, table


def quantize_command(
    model: Model,
    out: Out,
    method: Annotated[
        Literal["rtn", "gptq", "awq", "autoround"], typer.Option(help="PTQ method.")
    ] = "rtn",
    bits: Bits = 4,
    group_size: GroupSize = 128,
    layout: LayoutName = "auto",
    calib: Annotated[str | None, typer.Option(help="TASK:SPLIT or FILE, [:text|image].")] = None,
    samples: Annotated[int, typer.Option(help="Calibration samples.")] = 128,
    protocol: Annotated[str, typer.Option(help="Form of the calibration prompts.")] = "qatbench",
    limit: Limit = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Calibration samples at once.")] = 8,
    iters: Annotated[int, typer.Option(min=1, help="Steps a layer, of autoround alone.")] = 200,
    dtype: Dtype = None,
    data: Data = None,
    seed: Seed = 0,
    device: Device = None,
    resume: Resume = False,
    as_json: Json = False,
) -> None:
    """Quantize MODEL without training and write a checkpoint that was proven to load.

    Example: qatbench quantize smollm2-135m --method rtn --group-size 64 --out out/rtn
    """
    from qatbench.quant.grid import Grid
    from qatbench.stages.quantize import QuantizeSettings, quantize
    from qatbench.tasks import protocols, selector
    from qatbench.vlm.load import find

    ui = Ui(as_json=as_json)
    Grid(bits, group_size)
    protocols.get(protocol)
    chosen = selector.parse(calib) if calib else None
    settings = QuantizeSettings(
        method, bits, group_size, chosen, min(samples, limit or samples), protocol, seed, device,
        dtype, batch_size, layout, iters,
    )  # fmt: skip
    paths = data_paths(data, selector.with_paths([chosen])) if chosen else {}
    with ui.progress() as progress:
        record = quantize(find(model), settings, paths, out, resume=resume, progress=progress)
    checkpoint_result(ui, record, out)


def card_command(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint that qatbench made.")],
    runs: Annotated[list[Path] | None, typer.Argument(help="Evaluations of it.")] = None,
    as_json: Json = False,
) -> None:
    """Write the README.md of CHECKPOINT anew, with the scores of RUNS in the hub's metadata.

    Example: qatbench card out/gptq runs/gptq
    """
    from qatbench.stages.card import README, rewrite
    from qatbench.vlm.load import find

    ui = Ui(as_json=as_json)
    if not checkpoint.is_dir():
        raise UsageError(f"{checkpoint} is no folder", hint="the --out of quantize or train-qat")
    scores = rewrite(find(str(checkpoint.absolute())), runs or [])
    keys = ("task", "protocol", "mode", "n", "accuracy", "low", "high")
    rows = [{key: str(row[key]) for key in keys} for row in scores]
    page = checkpoint / README
    shown = [table("scores on the card", rows)] if rows else []
    ui.result({"card": str(page), "scores": scores}, [*shown, f"wrote {page}"])
