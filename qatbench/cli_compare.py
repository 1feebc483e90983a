"""compare: runs -> a comparison with its report; a report drawn again from its comparison."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qatbench.cli_options import Data, Json, Seed, data_paths
from qatbench.cli_show import comparison_result, worst_drop
from qatbench.errors import UsageError
from qatbench.ui import Ui

if TYPE_CHECKING:
    from qatbench.report.model import Comparison


def compare_command(
    runs: Annotated[
        list[Path] | None, typer.Argument(help="Run folders; an arm is named by its folder.")
    ] = None,
    baseline: Annotated[
        Path | None, typer.Option(help="Run that differences are taken to.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the comparison.")] = Path("comparison"),
    margin: Annotated[float, typer.Option(help="Points within which arms are equivalent.")] = 1.0,
    intersection: Annotated[bool, typer.Option(help="Compare on shared questions only.")] = False,
    cluster: Annotated[
        str, typer.Option(help="What is resampled: question, image, skill, category ...")
    ] = "question",
    max_drop: Annotated[
        float | None, typer.Option(help="Exit 1 if an arm is more points below.")
    ] = None,
    draws: Annotated[int, typer.Option(min=100, help="Bootstrap draws.")] = 10_000,
    seed: Seed = 0,
    render: Annotated[
        Path | None, typer.Option(help="Draw the report of this comparison again; no runs needed.")
    ] = None,
    speed: Annotated[
        Path | None, typer.Option(help="speed.json of `qatbench speed` with these models.")
    ] = None,
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Compare runs question by question; write comparison.json, report.html, report.md, tables.

    With --data the gallery of report.html shows questions and pictures: for your own eyes where
    the data may not be passed on. Of the built-in data (mini) it always does.

    Example: qatbench compare out/base out/gptq --baseline out/base --out out/comparison
    """
    from qatbench.stages.compare import compare
    from qatbench.stages.report_files import read, write
    from qatbench.stages.speeds import read_speed, with_speed

    ui = Ui(as_json=as_json)
    _check(runs, baseline, render, margin)
    measured = read_speed(speed) if speed is not None else None
    if render is not None:
        result, out = read(render), render
    else:
        assert runs  # checked above
        assert baseline
        result = compare(
            runs, baseline, margin=margin / 100, intersection=intersection, cluster=cluster,
            draws=draws, seed=seed, out=out,
        )  # fmt: skip
    if measured is not None:
        result = with_speed(result, measured)
    tasks = [task.definition.task for task in result.tasks]
    write(result, out, data_paths(data, tasks))
    again = "" if render else f"{' '.join(map(str, runs or []))} --baseline {baseline}"
    _told(ui, result, out, again, max_drop)


def _told(ui: Ui, result: Comparison, out: Path, again: str, max_drop: float | None) -> None:
    """Show the comparison; end with 1 if an arm fell further than the gate allows."""
    comparison_result(ui, result, out)
    if again:
        ui.next_command(f"qatbench compare {again} --max-drop 1.0   # a gate")
    if max_drop is not None and worst_drop(result) * 100 > max_drop + 1e-9:
        ui.note(f"verdict: an arm is {worst_drop(result) * 100:.2f} points below the baseline")
        raise typer.Exit(1)


def _check(
    runs: list[Path] | None, baseline: Path | None, render: Path | None, margin: float
) -> None:
    """Either runs with their baseline, or a comparison to draw again.

    Raises: UsageError otherwise, and for a margin that is not above 0.
    """
    if render is not None and (runs or baseline is not None):
        raise UsageError(
            "--render draws a finished comparison again: it takes no runs and no --baseline",
            hint=f"qatbench compare --render {render}",
        )
    if render is None and (not runs or baseline is None):
        raise UsageError(
            "compare needs run folders and --baseline",
            hint="qatbench compare RUN... --baseline RUN, or --render DIR",
        )
    if margin <= 0:
        raise UsageError("--margin must be above 0 points")
