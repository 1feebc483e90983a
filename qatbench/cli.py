"""The command line: parse, call one stage, print. `main` maps errors to exit codes.

Stages are imported inside the commands: `--help` and usage errors never wait for torch.
"""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path
from typing import Annotated, Any

import typer

from qatbench import __version__
from qatbench.cli_compare import compare_command
from qatbench.cli_data import app as data_app
from qatbench.cli_doctor import doctor_command
from qatbench.cli_eval import eval_command
from qatbench.cli_make import card_command, quantize_command
from qatbench.cli_mini import app as mini_app
from qatbench.cli_options import (
    Arms,
    BatchSize,
    Data,
    Device,
    Dtype,
    Jobs,
    Json,
    Limit,
    Recipe,
    Results,
    Resume,
    SaveEvery,
    data_paths,
    same_options,
    worker_options,
)
from qatbench.cli_score import protocols_command, score_command
from qatbench.cli_show import (
    comparison_result,
    dry_run_result,
)
from qatbench.cli_speed import ask_command, speed_command
from qatbench.cli_train import train_command
from qatbench.cli_verify import verify_command
from qatbench.errors import QatbenchError, UsageError
from qatbench.ui import Ui, report_error, table

app = typer.Typer(
    name="qatbench",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Is post-training quantization enough, or is quantization-aware training worth its cost?",
)


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit


app.command("quantize")(quantize_command)
app.command("train-qat")(train_command)
app.command("verify")(verify_command)
app.command("card")(card_command)
app.command("doctor")(doctor_command)
app.command("eval")(eval_command)
app.command("compare")(compare_command)
app.command("speed")(speed_command)
app.command("ask")(ask_command)
app.command("score")(score_command)
app.command("protocols")(protocols_command)
app.add_typer(data_app, name="data")
app.add_typer(mini_app, name="mini")


@app.command("run")
def run_command(
    recipe: Recipe,
    arm: Arms = None,
    seed: Annotated[
        list[int] | None, typer.Option("--seed", help="Only this seed. Repeatable.")
    ] = None,
    limit: Limit = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what is missing and its cost.")
    ] = False,
    out: Results = Path("results"),
    batch_size: BatchSize = None,
    dtype: Dtype = None,
    save_every: SaveEvery = 50,
    jobs: Jobs = 1,
    data: Data = None,
    device: Device = None,
    resume: Resume = True,
    as_json: Json = False,
) -> None:
    """Run a whole recipe: make and evaluate what is missing, then compare. Resumes by itself.

    Example: qatbench run recipes/mini.yaml
    """
    from qatbench.recipe_file import load_recipe
    from qatbench.stages.grid_check import check_grid, check_name
    from qatbench.tasks import selector

    ui = Ui(as_json=as_json)
    if not resume:
        raise UsageError("run always goes on where it stopped", hint="delete its results folder")
    checked = load_recipe(recipe, check_grid, check_name)
    chosen = [selector.parse(text) for text in checked.data.questions]
    paths = data_paths(data, sorted(set(selector.with_paths(chosen))))
    if dry_run:
        from qatbench.stages.dry_run import dry_run as look

        only: dict[str, Any] = {"arms": arm or [], "seeds": seed or [], "limit": limit}
        return dry_run_result(ui, look(checked, out, paths, device or "cpu", **only))
    from qatbench.stages.plan import Plan
    from qatbench.stages.run import jobs_of, run
    from qatbench.stages.workers import run_jobs

    with ui.progress() as progress:
        progress("Reading models and data", 0, 0)
        plan = Plan(checked, out, paths=paths, limit=limit, device=device)
        plan.answer_with(dtype=dtype, batch_size=batch_size)
        if jobs > 1:
            same: dict[str, object] = {"save_every": save_every, "limit": limit}
            same |= {"dtype": dtype, "batch_size": batch_size}
            shared = [*worker_options(recipe, out, data, device), *same_options(**same)]
            parts = jobs_of(plan, arm or [], seed or [], ["run", *shared])
            run_jobs(parts, jobs, plan.root / "logs", progress)
        result = run(plan, arm or [], seeds=seed or [], progress=progress, save_every=save_every)
    if result is None:
        ui.result({"recipe": checked.name, "finished": False, "arms": arm or []})
        ui.next_command(f"qatbench run {recipe}")
    else:
        comparison_result(ui, result, plan.root)


@app.command("tune")
def tune_command(
    recipe: Recipe,
    arm: Arms = None,
    fold: Annotated[
        list[int] | None, typer.Option("--fold", help="Only this fold. Repeatable.")
    ] = None,
    out: Results = Path("results"),
    jobs: Jobs = 1,
    data: Data = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Cross-validate hyper-parameters on the training data; the test split is never read.

    Example: qatbench tune recipes/smol-scienceqa.yaml --data DIR
    """
    from qatbench.recipe_file import load_recipe
    from qatbench.stages.grid_check import check_grid, check_name
    from qatbench.stages.tune import jobs_of, tune
    from qatbench.stages.workers import run_jobs
    from qatbench.tasks import selector

    ui = Ui(as_json=as_json)
    checked = load_recipe(recipe, check_grid, check_name)
    if checked.tuning is None:
        raise UsageError(f"{recipe} has no `tuning` section", hint="see docs/recipes.md")
    paths = data_paths(data, selector.with_paths([selector.parse(checked.tuning.data)]))
    with ui.progress() as progress:
        if jobs > 1 and not arm and not fold:
            shared = worker_options(recipe, out, data, device)
            parts = jobs_of(checked, ["tune", *shared])
            run_jobs(parts, jobs, out / checked.name / "logs", progress)
        found = tune(checked, out, paths, arms=arm, folds=fold, device=device, progress=progress)
    rows = [{k: str(v) for k, v in row.items() if k != "folds"} for row in found["candidates"]]
    ui.result(found, [table(f"{checked.name}: cross-validation", rows)])


def main(argv: list[str] | None = None) -> None:
    """Run the command line; exit codes as in the README."""
    try:
        code = app(argv, standalone_mode=False, prog_name="qatbench")
        sys.stdout.flush()
    except QatbenchError as error:
        report_error(error)
        code = error.exit_code
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except SystemExit:  # click's only use of it: the reader of our output went away
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - for the interpreter's last flush
        code = 0
    except Exception as error:  # noqa: BLE001 - the last stop: a usage error of click, or a bug
        code = _other(error)
    if code == 130:
        sys.stderr.write("error: interrupted\nhint: the same command, with --resume, goes on\n")
    sys.exit(code if isinstance(code, int) else 0)


def _other(error: Exception) -> int:
    """Usage errors of click in our two lines (exit 2); anything else is a bug (exit 70)."""
    if type(error).__name__ == "NoArgsIsHelpError":
        return 2
    if hasattr(error, "format_message") and hasattr(error, "exit_code"):
        where = getattr(getattr(error, "ctx", None), "command_path", "qatbench")
        sys.stderr.write(f"error: {error.format_message()}\nhint: {where} --help\n")
        return 2
    traceback.print_exc()
    sys.stderr.write(
        "error: this is a bug in qatbench\nhint: please report it with the lines above\n"
    )
    return 70
