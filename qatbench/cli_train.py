"""The verb that trains: train-qat."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import typer

from qatbench.cli_options import (
    Bits,
    Data,
    Device,
    Dtype,
    Formats,
    GroupSize,
    Json,
    LayoutName,
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

Train = Annotated[
    list[str],
    typer.Option("--train", help="TASK:SPLIT or FILE, [:text|image][@WEIGHT]. Repeatable."),
]
Images = Annotated[str | None, typer.Option(help="Folder of the images that FILE.json names.")]
Method = Annotated[Literal["grace", "qat", "kd", "sft"], typer.Option(help="What trains.")]
Teacher = Annotated[str | None, typer.Option(help="Frozen model with the same tokenizer.")]
Init = Annotated[str | None, typer.Option(help="A packed checkpoint of STUDENT to start from.")]
Steps = Annotated[int, typer.Option(min=1, help="Optimizer steps.")]
Batch = Annotated[int, typer.Option("--batch-size", min=1, help="Samples an optimizer step.")]
Micro = Annotated[int, typer.Option("--micro-batch-size", min=1, help="Samples a forward.")]
Lr = Annotated[float, typer.Option(help="Peak learning rate of weights.")]
ScaleLr = Annotated[float, typer.Option(help="Peak learning rate of log-scales.")]
ScaleGradient = Annotated[
    Literal["log", "lsq"], typer.Option(help="Of log-scales; lsq: times 1 / sqrt(n * qmax).")
]
Gate = Annotated[bool, typer.Option(help="grace: weigh tokens by the teacher's confidence.")]
Rcka = Annotated[bool, typer.Option(help="grace: relational CKA of visual tokens.")]
Beta = Annotated[Literal["adaptive", "fixed"], typer.Option(help="grace: weight of distillation.")]
Kl = Annotated[Literal["decoupled", "plain"], typer.Option(help="grace: distillation loss.")]
Tokens = Annotated[Literal["supervised", "all"], typer.Option(help="grace: what is distilled.")]
Controller = Annotated[
    Literal["launch-script", "class-defaults"], typer.Option(help="grace: constants of beta.")
]
Projector = Annotated[
    Literal["trained", "frozen", "quantized"], typer.Option(help="What happens to the projector.")
]
Optimizer = Annotated[Literal["adamw", "adamw8bit"], typer.Option(help="adamw8bit: torchao's.")]
Weights = Annotated[
    Literal["float32", "bfloat16"], typer.Option(help="What the optimizer updates.")
]
TeacherDtype = Annotated[Literal["auto", "int8"], typer.Option(help="Weights of the teacher.")]
Checkpointing = Annotated[
    bool, typer.Option("--checkpointing", help="Recompute activations: less memory.")
]
KeptBlocks = Annotated[
    int, typer.Option(min=0, help="With --checkpointing: but for the last decoder blocks.")
]
CompileBlocks = Annotated[
    bool, typer.Option("--compile-blocks", help="The decoder blocks too: for large models.")
]
Compile = Annotated[
    bool | None,
    typer.Option("--compile/--no-compile", help="The fake quantization; default: on CUDA."),
]
Packing = Annotated[
    Literal["pack", "group"], typer.Option(help="Samples side by side, or like lengths padded.")
]
MaxLength = Annotated[int, typer.Option(min=16, help="Tokens of a sample.")]


def train_command(
    student: Model,
    out: Out,
    train: Train,
    images: Images = None,
    method: Method = "grace",
    teacher: Teacher = None,
    init: Init = None,
    bits: Bits = 4,
    group_size: GroupSize = 128,
    layout: LayoutName = "auto",
    steps: Steps = 200,
    batch_size: Batch = 64,
    micro_batch_size: Micro = 16,
    lr: Lr = 1e-4,
    scale_lr: ScaleLr = 1e-3,
    scale_gradient: ScaleGradient = "log",
    gate: Gate = True,
    rcka: Rcka = True,
    beta: Beta = "adaptive",
    kl: Kl = "decoupled",
    tokens: Tokens = "supervised",
    controller: Controller = "launch-script",
    projector: Projector = "trained",
    optimizer: Optimizer = "adamw",
    weights: Weights = "float32",
    teacher_dtype: TeacherDtype = "auto",
    checkpointing: Checkpointing = False,
    kept_blocks: KeptBlocks = 0,
    compile: Compile = None,
    compile_blocks: CompileBlocks = False,
    packing: Packing = "pack",
    max_length: MaxLength = 2048,
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

    Several processes: accelerate launch --multi_gpu --num_processes N -m qatbench train-qat ...

    Example: qatbench train-qat smollm2-135m --method qat --group-size 64 --steps 20
    --train scienceqa:train --data mini-text --out out/qat
    """
    given = dict(locals())
    ui = Ui(as_json=as_json)
    if method in ("grace", "kd") and teacher is None:
        raise UsageError(f"{method} needs a teacher", hint="--teacher MODEL")
    _train(ui, given)


def _train(ui: Ui, given: dict[str, Any]) -> None:
    """Run the stage with the command's options, by their names."""
    from qatbench.stages import train as stage
    from qatbench.stages import training_sources
    from qatbench.stages.distributed import join
    from qatbench.tasks import selector
    from qatbench.vlm.load import find

    specs = [training_sources.parse(text, given["images"]) for text in given["train"]]
    chosen = [selector.parse(spec.questions) for spec in specs if spec.questions]
    paths = data_paths(given["data"], selector.with_paths(chosen))
    rows = training_sources.load(specs, paths)
    rows = rows.limited(given["limit"], given["seed"])
    request = stage.TrainRequest(
        _settings(given),
        find(given["student"]),
        find(given["teacher"]) if given["teacher"] else None,
        rows.sources,
        given["device"],
        given["save_every"],
        given["dtype"],
        init=find(given["init"]) if given["init"] else None,
        teacher_dtype=given["teacher_dtype"],
        checkpointing=given["checkpointing"],
        kept_blocks=given["kept_blocks"],
        compile=given["compile"],
        compile_blocks=given["compile_blocks"],
        remarks=tuple(rows.notes()),
        places=selector.places(paths),
    )
    with ui.progress() as progress:
        record = stage.train(request, given["out"], resume=given["resume"], progress=progress)
    if join(given["device"]).main:  # of several processes the first one tells
        checkpoint_result(ui, record, given["out"])


def _settings(given: dict[str, Any]) -> Any:
    """What decides the checkpoint."""
    from qatbench.recipe import CONTROLLERS
    from qatbench.stages.objective import Distillation
    from qatbench.stages.train_settings import ControllerSettings, TrainSettings

    same = (
        "method", "steps", "bits", "group_size", "batch_size", "micro_batch_size", "lr", "scale_lr",
        "seed", "scale_gradient", "projector", "optimizer", "weights", "packing", "max_length",
        "layout",
    )  # fmt: skip
    constants = CONTROLLERS[given["controller"]]
    if given["beta"] == "fixed":
        constants = constants | {"rate": 0.0}
    terms = {key: given[key] for key in ("kl", "gate", "rcka", "tokens")}
    return TrainSettings(
        **{key: given[key] for key in same},
        formats=tuple(given["formats"] or ("qatbench",)),
        distillation=Distillation(**terms),
        controller=ControllerSettings(**constants),
    )
