"""The verbs that make checkpoints: quantize and train-qat."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from qatbench.cli_options import (
    Bits,
    Data,
    Device,
    Dtype,
    Formats,
    GroupSize,
    Json,
    Limit,
    Model,
    Out,
    Resume,
    SaveEvery,
    Seed,
    data_paths,
)
from qatbench.cli_show import checkpoint_result
from qatbench.errors import UsageError
from qatbench.ui import Ui


def quantize_command(
    model: Model,
    out: Out,
    method: Annotated[Literal["rtn", "gptq", "awq"], typer.Option(help="PTQ method.")] = "rtn",
    bits: Bits = 4,
    group_size: GroupSize = 128,
    calib: Annotated[str | None, typer.Option(help="TASK:SPLIT[:text|image].")] = None,
    samples: Annotated[int, typer.Option(help="Calibration samples.")] = 128,
    protocol: Annotated[str, typer.Option(help="Form of the calibration prompts.")] = "qatbench",
    limit: Limit = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Calibration samples at once.")] = 8,
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
        dtype, batch_size,
    )  # fmt: skip
    paths = data_paths(data, [chosen.task]) if chosen else {}
    with ui.progress() as progress:
        record = quantize(find(model), settings, paths, out, resume=resume, progress=progress)
    checkpoint_result(ui, record, out)


def train_command(
    student: Model,
    out: Out,
    train: Annotated[str, typer.Option(help="TASK:SPLIT[:text|image].")],
    method: Annotated[Literal["grace", "qat", "kd", "sft"], typer.Option()] = "grace",
    teacher: Annotated[
        str | None, typer.Option(help="Frozen model with the same tokenizer.")
    ] = None,
    bits: Bits = 4,
    group_size: GroupSize = 128,
    steps: Annotated[int, typer.Option(min=1)] = 200,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples an optimizer step.")] = 64,
    micro_batch_size: Annotated[int, typer.Option(min=1, help="Samples a forward.")] = 16,
    lr: Annotated[float, typer.Option(help="Peak learning rate of weights.")] = 1e-4,
    scale_lr: Annotated[float, typer.Option(help="Peak learning rate of log-scales.")] = 1e-3,
    formats: Formats = None,
    limit: Limit = None,
    save_every: SaveEvery = 50,
    dtype: Dtype = None,
    data: Data = None,
    seed: Seed = 0,
    device: Device = None,
    resume: Resume = False,
    as_json: Json = False,
) -> None:
    """Train STUDENT (sft, kd: 16 bit; qat, grace: on the integer grid) and write a checkpoint.

    Example: qatbench train-qat smollm2-135m --method qat --group-size 64 --steps 20
    --train scienceqa:train --data mini-text --out out/qat
    """
    from qatbench.stages import train as stage
    from qatbench.stages.train_settings import TrainSettings
    from qatbench.tasks import selector
    from qatbench.vlm.load import find

    ui = Ui(as_json=as_json)
    if method in ("grace", "kd") and teacher is None:
        raise UsageError(f"{method} needs a teacher", hint="--teacher MODEL")
    chosen = selector.parse(train)
    settings = TrainSettings(
        method=method,
        steps=steps,
        bits=bits,
        group_size=group_size,
        batch_size=batch_size,
        micro_batch_size=micro_batch_size,
        lr=lr,
        scale_lr=scale_lr,
        formats=tuple(formats or ("qatbench",)),
        seed=seed,
    )
    folder = find(student)
    rows = stage.training_questions(chosen, data_paths(data, [chosen.task]))
    rows = selector.limit(rows, limit, seed) if limit else rows
    request = stage.TrainRequest(
        settings, folder, find(teacher) if teacher else None, rows, device, save_every, dtype
    )
    with ui.progress() as progress:
        record = stage.train(request, out, resume=resume, progress=progress)
    checkpoint_result(ui, record, out)
