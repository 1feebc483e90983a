"""The verb `eval`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from qatbench.cli_options import (
    BatchSize,
    Data,
    Device,
    Dtype,
    Jobs,
    Json,
    Limit,
    Model,
    Out,
    Protocols,
    Resume,
    Seed,
    Tasks,
    data_paths,
    protocols_of,
    same_options,
)
from qatbench.cli_show import evaluation_result
from qatbench.ui import Ui

if TYPE_CHECKING:
    from qatbench.stages.evaluate import EvalSettings
    from qatbench.stages.workers import Job


Mode = Annotated[
    Literal["options", "generate"], typer.Option(help="Score options, or write an answer.")
]
Images = Annotated[
    Literal["shown", "none", "shuffled"],
    typer.Option(help="Control: without pictures, or with another question's."),
]

Kernel = Annotated[
    Literal["auto", "library", "dense"], typer.Option(help="How packed linears multiply.")
]
Engine = Annotated[
    Literal["auto", "transformers", "qatbench"],
    typer.Option(help="What writes answers in generate mode."),
]


def eval_command(
    model: Model,
    task: Tasks,
    out: Out,
    protocol: Protocols = None,
    mode: Mode = "options",
    limit: Limit = None,
    images: Images = "shown",
    batch_size: BatchSize = None,
    dtype: Dtype = None,
    kernel: Kernel = "auto",
    engine: Engine = "auto",
    max_errors: Annotated[
        float, typer.Option(min=0, max=1, help="Share of error rows allowed.")
    ] = 0.01,
    data: Data = None,
    seed: Seed = 0,
    device: Device = None,
    jobs: Jobs = 1,
    part: Annotated[str | None, typer.Option(hidden=True)] = None,
    resume: Resume = False,
    as_json: Json = False,
) -> None:
    """Answer the questions of a task and write predictions.jsonl and metrics.json.

    Example: qatbench eval smollm2-135m --task scienceqa --data mini-text --limit 50 --out out/base
    """
    from qatbench.stages.evaluate import EvalSettings, evaluate, evaluate_part
    from qatbench.tasks import selector
    from qatbench.vlm.load import find

    ui = Ui(as_json=as_json)
    chosen = selector.parse_all(task)
    tasks = [one.task for one in chosen]
    settings = EvalSettings(
        selectors=chosen,
        protocol=protocols_of(protocol, tasks),
        mode=mode,
        dtype=dtype,
        kernel=kernel,
        engine=engine,
        limit=limit,
        images=images,
        seed=seed,
        device=device,
        batch_size=batch_size,
        max_errors=max_errors,
    )
    paths = data_paths(data, selector.with_paths(chosen))
    with ui.progress() as progress:
        if part:
            number, _, parts = part.partition("/")
            numbers = int(number), int(parts)
            evaluate_part(find(model), settings, paths, out, numbers, progress)
            return
        workers = _workers(jobs, model, settings, task, protocol, data, out)
        evaluate(find(model), settings, paths, out, resume=resume, progress=progress, jobs=workers)
    evaluation_result(ui, model, out)


def _workers(
    jobs: int,
    model: str,
    settings: EvalSettings,
    task: list[str],
    protocol: list[str] | None,
    data: list[str] | None,
    out: Path,
) -> list[Job]:
    """This command line for each of several processes, with the part that it answers."""
    from qatbench.stages.workers import Job

    repeated = [("--task", one) for one in task]
    repeated += [("--protocol", one) for one in protocol or []]
    repeated += [("--data", one) for one in data or []]
    same = same_options(
        mode=settings.mode, limit=settings.limit, images=settings.images, dtype=settings.dtype,
        batch_size=settings.batch_size, kernel=settings.kernel, engine=settings.engine,
        seed=settings.seed, device=settings.device,
    )  # fmt: skip
    line = ("eval", model, "--out", str(out), *(part for two in repeated for part in two), *same)
    parts = range(1, jobs + 1) if jobs > 1 else ()
    return [Job(f"part-{k}", (*line, "--part", f"{k}/{jobs}")) for k in parts]
