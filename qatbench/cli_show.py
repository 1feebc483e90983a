"""How a verb's result looks on a terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qatbench import store
from qatbench.ui import Ui, table


def checkpoint_result(ui: Ui, record: dict[str, Any], out: Path) -> None:
    """Show what quantize or train-qat made."""
    figures = record["figures"]
    proven = {
        kind: figures["reload"][kind] for kind in ("text", "image") if kind in figures["reload"]
    }
    shown = {
        "checkpoint": str(out),
        "method": str(figures["method"]),
        "bits/weight": f"{figures['bits_per_weight']:.2f}",
        "reload error": str(max(proven.values())),
        "seconds": f"{record['seconds']:.0f}",
    }
    extra = []
    layers = figures.get("layers")
    if layers:
        n = len(layers["rtn"])
        extra.append(
            f"layer output error below RTN's in {n - len(layers['above_rtn'])} of {n} layers"
        )
        if layers["above_rtn"]:
            extra.append(f"not below in {layers['above_rtn']}: {layers['reason']}")
    ui.result(figures | {"out": str(out)}, [table("checkpoint", [shown]), *extra])
    subset = "" if "image" in proven else ":text"
    ui.next_command(f"qatbench eval {out} --task scienceqa:test{subset} --out RUN")


def dry_run_result(ui: Ui, found: dict[str, Any]) -> None:
    """Show what a run would do."""
    rows = [{k: "-" if v is None else str(v) for k, v in row.items()} for row in found["units"]]
    missing = [f"missing: {what}" for what in found["missing"]]
    ui.result(found, [table(f"{found['recipe']}: estimates", rows), *missing])


def evaluation_result(ui: Ui, model: str, out: Path) -> None:
    """Show the metrics of a finished evaluation, and why its engine is not the one to expect."""
    metrics = store.read_json(out / "metrics.json")
    rows = [metric_row(item) for item in metrics["tasks"]]
    ui.result(metrics | {"out": str(out)}, [table(model, rows)])
    if why := store.read_json(out / store.PROVENANCE)["figures"].get("engine_note"):
        ui.note(f"note: answers {why}")
    ui.next_command(f"qatbench compare {out} OTHER_RUN --baseline {out} --out comparison")
    if Path(model, store.PROVENANCE).is_file():
        ui.next_command(f"qatbench card {model} {out}   # the scores, in its README.md")


def metric_row(item: dict[str, Any]) -> dict[str, str]:
    """One task of metrics.json as a row."""
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


def comparison_result(ui: Ui, result: Any, out: Path) -> None:
    """Show a table a task of a comparison, and where its report is."""
    from qatbench.report.tables import arm_rows

    shown = []
    for task in (task.definition.task for task in result.tasks):
        rows = [row for row in arm_rows(result) if row["task"] == task]
        rows = [{k: v for k, v in row.items() if k != "task"} for row in rows]
        title = f"{task}: accuracy, difference to {result.baseline}"
        shown.append(table(title, rows, right=("acc %", "n", "MB", "bits/w", "cost")))
    ui.result(result.model_dump(mode="json"), [*shown, f"report: {out / 'report.md'}"])


def worst_drop(result: Any) -> float:
    """Largest loss against the baseline over all arms and tasks, a fraction."""
    return max((-pair.difference for task in result.tasks for pair in task.pairs), default=0.0)
