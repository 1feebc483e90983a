"""The verbs about scoring: score answers made elsewhere, and list the protocols."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qatbench.cli_options import Json, data_paths
from qatbench.ui import Ui, table

if TYPE_CHECKING:
    from qatbench.stages.score_figures import Scored

Answers = Annotated[
    Path, typer.Argument(help="LLaVA jsonl, {id: index} json, MMBench xlsx, lmms-eval samples ...")
]


def score_command(
    answers: Answers,
    task: Annotated[str, typer.Option(help="scienceqa or mmbench.")],
    protocol: Annotated[str, typer.Option(help="Whose scoring: see `qatbench protocols`.")],
    data: Annotated[
        str | None,
        typer.Option(help="Folder, problems.json, TSV, hub id, `mini`; a table may be its own."),
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(help="SPLIT[:text|image]; default: test, of an MMBench table all."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Also write a run folder that compare reads.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Score answers that another tool made, as a named public evaluator scores them.

    Example: qatbench score answers.jsonl --task scienceqa --protocol llava-sqa --data DIR
    """
    from qatbench.stages.score import file_of, score, write

    ui = Ui(as_json=as_json)
    answers = file_of(answers)
    name = task.partition(":")[0]
    source = data_paths([data], [name])[name] if data else None
    scored = score(answers, task, protocol, source, split)
    if out is not None:
        write(scored, answers, out)
    figures = scored.as_json()
    notes = scored.notes()
    value = figures | {"notes": notes} | ({"out": str(out)} if out is not None else {})
    ui.result(value, _tables(answers, scored, figures))
    for note in notes:
        ui.note(f"note: {note}")
    if out is not None:
        ui.next_command(f"qatbench compare {out} OTHER_RUN --baseline {out} --out comparison")
    else:
        ui.next_command(f"qatbench protocols {protocol}   # what these figures mean")


def _tables(answers: Path, scored: Scored, figures: dict[str, Any]) -> list[Any]:
    from qatbench.stages.score_figures import shown

    overall = scored.metrics.overall
    summary = {
        "task": figures["part"],
        "protocol": figures["protocol"],
        "n": f"{overall.n} {figures['unit']}s",
        "right": str(overall.right),
        "accuracy": f"{100 * overall.accuracy:.2f}",
        "95 %": f"[{100 * overall.low:.1f}, {100 * overall.high:.1f}]",
        "unparsed": str(figures["unparsed"]),
        "missing": str(figures["missing"]),
    }
    parts: list[Any] = [table(str(answers), [summary])]
    counted = {name: one for some in figures["counts"].values() for name, one in some.items()}
    rows = [
        {"figure": name, "accuracy": _percent(share), "n": str(counted.get(name, {}).get("n", "-"))}
        for name, share in shown(figures).items()
        if name != "overall"
    ]
    parts += ["", table("of these", rows, right=("accuracy", "n"))] if rows else []
    for kind in ("l2_category", "category"):
        if scored.metrics.task == "mmbench" and kind in figures:
            sizes = {name: str(one["n"]) for name, one in figures["counts"][kind].items()}
            some = [
                {kind: name, "accuracy": _percent(share), "n": sizes[name]}
                for name, share in figures[kind].items()
            ]
            parts += ["", table(kind, some, right=("accuracy", "n"))]
    return parts


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.2f}"


# --- protocols ----------------------------------------------------------------------------------


def protocols_command(
    name: Annotated[str | None, typer.Argument(help="One of them, in full.")] = None,
    as_json: Json = False,
) -> None:
    """List the protocols: how each asks, reads an answer and counts. `qatbench` is recommended.

    Example: qatbench protocols llava-sqa
    """
    from qatbench.tasks import protocols, protocols_show

    ui = Ui(as_json=as_json)
    if name is None:
        rows = [protocols_show.summary(protocols.get(one)) for one in protocols.names()]
        brief = [
            {
                "name": row["name"],
                "tasks": ", ".join(row["tasks"]),
                "mode": row["mode"],
                "new tokens": str(row["max_new_tokens"]),
                "counts": row["unit"],
            }
            for row in rows
        ]
        told = [line for row in rows for line in protocols_show.reasons(row)]
        ui.result(
            {"recommended": rows[0]["name"], "protocols": rows},
            [table("protocols, the recommended one first", brief), "", *told,
             protocols_show.COMBINATIONS],
        )  # fmt: skip
        ui.next_command("qatbench protocols qatbench   # one of them in full")
        return
    found = protocols_show.in_full(protocols.get(name))
    ui.result(found, protocols_show.lines(found))
    ui.next_command(
        f"qatbench score ANSWERS --task {found['tasks'][0]} --protocol {name} --data PATH"
    )
