"""The verb that makes checkpoints without training: quantize."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from qatbench.cli_options import (
    Bits,
    Data,
    Device,
    Dtype,
    GroupSize,
    Json,
    Limit,
    Model,
    Out,
    Resume,
    Seed,
    data_paths,
)
from qatbench.cli_show import checkpoint_result
from qatbench.ui import Ui


def quantize_command(
    model: Model,
    out: Out,
    method: Annotated[
        Literal["rtn", "gptq", "awq", "autoround"], typer.Option(help="PTQ method.")
    ] = "rtn",
    bits: Bits = 4,
    group_size: GroupSize = 128,
    calib: Annotated[str | None, typer.Option(help="TASK:SPLIT[:text|image].")] = None,
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
        dtype, batch_size, iters,
    )  # fmt: skip
    paths = data_paths(data, [chosen.task]) if chosen else {}
    with ui.progress() as progress:
        record = quantize(find(model), settings, paths, out, resume=resume, progress=progress)
    checkpoint_result(ui, record, out)
