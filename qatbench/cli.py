"""The command line: parse, call one stage, print. `main` maps errors to exit codes.

Stages are imported inside the commands: `--help` and usage errors never wait for torch.
"""

from __future__ import annotations

import sys
import traceback
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from qatbench import __version__
from qatbench.errors import QatbenchError, UsageError
from qatbench.ui import Ui, report_error, table

app = typer.Typer(
    name="qatbench",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Is post-training quantization enough, or is quantization-aware training worth its cost?",
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with an unfinished folder.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N; default: found.")]
Data = Annotated[
    list[str] | None,
    typer.Option("--data", help="[TASK=]PATH: a folder, a hub id, or `mini`. Repeatable."),
]
Out = Annotated[Path, typer.Option("--out", help="Folder to write.")]
Seed = Annotated[int, typer.Option(help="Seed of everything that is drawn.")]


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit


@app.command("quantize")
def quantize_command(
    model: Annotated[str, typer.Argument(help="Hub id, folder or built-in name.")],
    out: Out,
    method: Annotated[Literal["rtn", "gptq", "awq"], typer.Option(help="PTQ method.")] = "rtn",
    bits: Annotated[int, typer.Option(help="2, 3, 4 or 8.")] = 4,
    group_size: Annotated[int, typer.Option(help="Weights a scale; -1: a whole row.")] = 128,
    calib: Annotated[str | None, typer.Option(help="TASK:SPLIT[:text|image].")] = None,
    samples: Annotated[int, typer.Option(help="Calibration samples.")] = 128,
    protocol: Annotated[str, typer.Option(help="Form of the calibration prompts.")] = "qatbench",
    data: Data = None,
    seed: Seed = 0,
    device: Device = None,
    resume: Resume = False,
    as_json: Json = False,
) -> None:
    """Quantize MODEL without training and write a checkpoint that was proven to load.

    Example: qatbench quantize smollm2-135m --method gptq --group-size 64 --calib scienceqa:train:text --data mini --out out/gptq
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
        method, bits, group_size, chosen, samples, protocol, seed, device
    )
    paths = _paths(data, [chosen.task] if chosen else [])
    with ui.progress() as progress:
        record = quantize(find(model), settings, paths, out, resume=resume, progress=progress)
    _checkpoint_result(ui, record, out)


@app.command("train-qat")
def train_command(
    student: Annotated[str, typer.Argument(help="Hub id, folder or built-in name.")],
    out: Out,
    train: Annotated[str, typer.Option(help="TASK:SPLIT[:text|image].")],
    method: Annotated[Literal["grace", "qat", "kd", "sft"], typer.Option()] = "grace",
    teacher: Annotated[str | None, typer.Option(help="Frozen model with the same tokenizer.")] = None,
    bits: Annotated[int, typer.Option(help="2, 3, 4 or 8.")] = 4,
    group_size: Annotated[int, typer.Option(help="Weights a scale; -1: a whole row.")] = 128,
    steps: Annotated[int, typer.Option(min=1)] = 200,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples an optimizer step.")] = 64,
    micro_batch_size: Annotated[int, typer.Option(min=1, help="Samples a forward.")] = 16,
    lr: Annotated[float, typer.Option(help="Peak learning rate of weights.")] = 1e-4,
    scale_lr: Annotated[float, typer.Option(help="Peak learning rate of log-scales.")] = 1e-3,
    formats: Annotated[list[str] | None, typer.Option("--format", help="Prompt format: a protocol or `choices`. Repeatable.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Use N questions of the split.")] = None,
    save_every: Annotated[int, typer.Option(min=1, help="Steps between saved states.")] = 50,
    data: Data = None,
    seed: Seed = 0,
    device: Device = None,
    resume: Resume = False,
    as_json: Json = False,
) -> None:
    """Train STUDENT (sft, kd: 16 bit; qat, grace: on the integer grid) and write a checkpoint.

    Example: qatbench train-qat smollm2-135m --method qat --group-size 64 --train scienceqa:train --data mini --steps 20 --out out/qat
    """
    from qatbench.stages.train import TrainRequest, TrainSettings, training_questions
    from qatbench.stages.train import train as run_training
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
    rows = training_questions(chosen, _paths(data, [chosen.task]))
    rows = selector.limit(rows, limit, seed) if limit else rows
    request = TrainRequest(
        settings, folder, find(teacher) if teacher else None, rows, device, save_every
    )
    with ui.progress() as progress:
        record = run_training(request, out, resume=resume, progress=progress)
    _checkpoint_result(ui, record, out)


@app.command("eval")
def eval_command(
    model: Annotated[str, typer.Argument(help="Hub id, folder or built-in name.")],
    task: Annotated[list[str], typer.Option("--task", help="TASK[:SPLIT[:text|image]]. Repeatable.")],
    out: Out,
    protocol: Annotated[list[str] | None, typer.Option("--protocol", help="[TASK=]NAME. Repeatable.")] = None,
    mode: Annotated[Literal["options", "generate"], typer.Option(help="Score options, or write an answer.")] = "options",
    limit: Annotated[int | None, typer.Option(min=1, help="First N questions of a seeded order.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Questions a batch; default: found.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")] = None,
    kernel: Annotated[Literal["auto", "library", "dense"], typer.Option(help="How packed linears multiply.")] = "auto",
    max_errors: Annotated[float, typer.Option(min=0, max=1, help="Share of error rows allowed.")] = 0.01,
    data: Data = None,
    seed: Seed = 0,
    device: Device = None,
    resume: Resume = False,
    as_json: Json = False,
) -> None:
    """Answer the questions of a task and write predictions.jsonl and metrics.json.

    Example: qatbench eval smollm2-135m --task scienceqa:test:text --data mini --limit 50 --out out/base
    """
    from qatbench import store
    from qatbench.stages.evaluate import EvalSettings, evaluate
    from qatbench.tasks import selector
    from qatbench.vlm.load import find

    ui = Ui(as_json=as_json)
    chosen = tuple(selector.parse(text) for text in task)
    tasks = [one.task for one in chosen]
    settings = EvalSettings(
        selectors=chosen,
        protocol=_protocols(protocol, tasks),
        mode=mode,
        dtype=dtype,
        kernel=kernel,
        limit=limit,
        seed=seed,
        device=device,
        batch_size=batch_size,
        max_errors=max_errors,
    )
    with ui.progress() as progress:
        evaluate(find(model), settings, _paths(data, tasks), out, resume=resume, progress=progress)
    metrics = store.read_json(out / "metrics.json")
    rows = [_metric_row(item) for item in metrics["tasks"]]
    ui.result(metrics | {"out": str(out)}, [table(f"{model}", rows)])
    ui.next_command(f"qatbench compare {out} OTHER_RUN --baseline {out} --out comparison")


@app.command("compare")
def compare_command(
    runs: Annotated[list[Path], typer.Argument(help="Run folders; an arm is named by its folder.")],
    baseline: Annotated[Path, typer.Option(help="Run that differences are taken to.")],
    out: Out = Path("comparison"),
    margin: Annotated[float, typer.Option(help="Points within which arms are equivalent.")] = 1.0,
    intersection: Annotated[bool, typer.Option(help="Compare on shared questions only.")] = False,
    max_drop: Annotated[float | None, typer.Option(help="Exit 1 if an arm is more points below.")] = None,
    draws: Annotated[int, typer.Option(min=100, help="Bootstrap draws.")] = 10_000,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Compare runs question by question; write comparison.json, report.md and tables.

    Example: qatbench compare out/base out/gptq --baseline out/base --out out/comparison
    """
    from qatbench.stages.compare import compare, write

    ui = Ui(as_json=as_json)
    if margin <= 0:
        raise UsageError("--margin must be above 0 points")
    result = compare(
        runs, baseline, margin=margin / 100, intersection=intersection, draws=draws, seed=seed
    )
    write(result, out)
    _comparison_result(ui, result, out)
    if max_drop is not None and _worst_drop(result) * 100 > max_drop:
        ui.note(f"verdict: an arm is {_worst_drop(result) * 100:.2f} points below the baseline")
        raise typer.Exit(1)


@app.command("run")
def run_command(
    recipe: Annotated[Path, typer.Argument(help="A recipe (YAML).")],
    arm: Annotated[list[str] | None, typer.Option("--arm", help="Only this arm. Repeatable.")] = None,
    seed: Annotated[list[int] | None, typer.Option("--seed", help="Only this seed. Repeatable.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Ask N questions only.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what is missing and its cost.")] = False,
    out: Annotated[Path, typer.Option("--out", help="Results folder.")] = Path("results"),
    save_every: Annotated[int, typer.Option(min=1, help="Steps between saved states.")] = 50,
    data: Data = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Run a whole recipe: make and evaluate what is missing, then compare. Resumes by itself.

    Example: qatbench run recipes/demo.yaml --data mini
    """
    from qatbench.recipe_file import load_recipe
    from qatbench.stages.grid_check import check_grid
    from qatbench.tasks import selector

    ui = Ui(as_json=as_json)
    checked = load_recipe(recipe, check_grid)
    tasks = sorted({selector.parse(text).task for text in checked.data.eval})
    paths = _paths(data, tasks)
    if dry_run:
        from qatbench.stages.dry_run import dry_run as look

        found = look(checked, out, paths, device or "cpu")
        rows = [{k: "-" if v is None else str(v) for k, v in row.items()} for row in found["units"]]
        ui.result(found, [table(f"{checked.name}: estimates", rows), *found["missing"]])
        return
    from qatbench.stages.plan import Plan
    from qatbench.stages.run import run

    with ui.progress() as progress:
        progress("Reading models and data", 0, 0)
        plan = Plan(checked, out, paths=paths, limit=limit, device=device)
        result = run(
            plan, arm or [], seeds=seed or [], progress=progress, save_every=save_every
        )
    if result is None:
        ui.result({"recipe": checked.name, "finished": False, "arms": arm or []})
        ui.next_command(f"qatbench run {recipe}")
    else:
        _comparison_result(ui, result, plan.root)


@app.command("tune")
def tune_command(
    recipe: Annotated[Path, typer.Argument(help="A recipe with a `tuning` section.")],
    arm: Annotated[list[str] | None, typer.Option("--arm", help="Only this arm. Repeatable.")] = None,
    fold: Annotated[list[int] | None, typer.Option("--fold", help="Only this fold. Repeatable.")] = None,
    out: Annotated[Path, typer.Option("--out", help="Results folder.")] = Path("results"),
    data: Data = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Cross-validate hyper-parameters on the training data; the test split is never read.

    Example: qatbench tune recipes/smol-scienceqa.yaml --data DIR
    """
    from qatbench.recipe_file import load_recipe
    from qatbench.stages.grid_check import check_grid
    from qatbench.stages.tune import tune
    from qatbench.tasks import selector

    ui = Ui(as_json=as_json)
    checked = load_recipe(recipe, check_grid)
    if checked.tuning is None:
        raise UsageError(f"{recipe} has no `tuning` section", hint="see docs/recipes.md")
    paths = _paths(data, [selector.parse(checked.tuning.data).task])
    with ui.progress() as progress:
        found = tune(checked, out, paths, arms=arm, folds=fold, device=device, progress=progress)
    rows = [{k: str(v) for k, v in row.items() if k != "folds"} for row in found["candidates"]]
    ui.result(found, [table(f"{checked.name}: cross-validation", rows)])


# --- helpers ------------------------------------------------------------------------------------


def _paths(data: list[str] | None, tasks: list[str]) -> dict[str, str]:
    """--data [TASK=]PATH: without a task name the path is for the only task there is."""
    paths: dict[str, str] = {}
    for item in data or []:
        name, sign, path = item.partition("=")
        if sign:
            paths[name] = path
        elif len(set(tasks)) == 1:
            paths[tasks[0]] = item
        else:
            raise UsageError(f"--data {item}: which task?", hint="--data TASK=PATH")
    return paths


def _protocols(given: list[str] | None, tasks: list[str]) -> dict[str, str]:
    from qatbench.tasks import protocols

    chosen = dict.fromkeys(tasks, "qatbench")
    for item in given or []:
        name, sign, protocol = item.partition("=")
        for task in [name] if sign else tasks:
            if task not in chosen:
                raise UsageError(f"--protocol {item}: no task {task!r} was asked for")
            chosen[task] = protocol if sign else item
    for name in chosen.values():
        protocols.get(name)
    return chosen


def _checkpoint_result(ui: Ui, record: dict[str, Any], out: Path) -> None:
    figures = record["figures"]
    shown = {
        "checkpoint": str(out),
        "method": str(figures["method"]),
        "bits/weight": f"{figures['bits_per_weight']:.2f}",
        "reload error": str(figures["reload"]["text"]),
        "seconds": f"{record['seconds']:.0f}",
    }
    extra = []
    layers = figures.get("layers")
    if layers:
        n = len(layers["rtn"])
        extra.append(f"layer output error below RTN's in {n - len(layers['above_rtn'])} of {n} layers")
        if layers["above_rtn"]:
            extra.append(f"not below in {layers['above_rtn']}: {layers['reason']}")
    ui.result(figures | {"out": str(out)}, [table("checkpoint", [shown]), *extra])
    ui.next_command(f"qatbench eval {out} --task scienceqa:test:text --out RUN")


def _metric_row(item: dict[str, Any]) -> dict[str, str]:
    overall = item["overall"]
    return {
        "task": item["task"],
        "protocol": item["protocol"],
        "mode": item["mode"],
        "n": str(overall["n"]),
        "accuracy": f"{100 * overall['accuracy']:.1f}",
        "95 %": f"[{100 * overall['low']:.1f}, {100 * overall['high']:.1f}]",
        "chance": f"{100 * overall['chance']:.1f}",
        "unparsed": str(item["unparsed"]),
        "errors": str(item["errors"]),
    }


def _comparison_result(ui: Ui, result: Any, out: Path) -> None:
    from qatbench.report.tables import arm_rows

    rows = arm_rows(result)
    if len(result.tasks) == 1:
        rows = [{k: v for k, v in row.items() if k != "task"} for row in rows]
    title = f"accuracy, difference to {result.baseline}"
    shown = [table(title, rows, right=("acc %", "n", "MB", "bits/w", "cost"))]
    ui.result(result.model_dump(mode="json"), [*shown, f"report: {out / 'report.md'}"])


def _worst_drop(result: Any) -> float:
    return max((-pair.difference for task in result.tasks for pair in task.pairs), default=0.0)


def main(argv: list[str] | None = None) -> None:
    """Run the command line; exit codes as in the README."""
    try:
        code = app(argv, standalone_mode=False)
    except QatbenchError as error:
        report_error(error)
        code = error.exit_code
    except KeyboardInterrupt:
        sys.stderr.write("error: interrupted\nhint: the same command with --resume goes on\n")
        code = 130
    except typer.Abort:
        code = 130
    except Exception as error:
        code = _other(error)
    sys.exit(code if isinstance(code, int) else 0)


def _other(error: Exception) -> int:
    """click's usage errors in our two lines (exit 2); anything else is a bug (exit 70)."""
    if hasattr(error, "format_message") and hasattr(error, "exit_code"):
        where = getattr(getattr(error, "ctx", None), "command_path", "qatbench")
        sys.stderr.write(f"error: {error.format_message()}\nhint: {where} --help\n")
        return 2
    traceback.print_exc()
    sys.stderr.write("error: this is a bug in qatbench\nhint: please report it with the lines above\n")
    return 70
