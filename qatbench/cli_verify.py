"""The verb that judges a packed checkpoint: verify."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qatbench.cli_options import Json
from qatbench.ui import Ui, table
from qatbench.vlm.layout import ARCHITECTURES

if TYPE_CHECKING:
    from qatbench.stages.verify import Verdict
    from qatbench.stages.verify.finding import Finding

Folder = Annotated[Path, typer.Argument(help="Folder of a checkpoint, whoever made it.")]


def verify_command(
    checkpoint: Folder,
    repair: Annotated[
        Path | None, typer.Option(help="Write a repaired copy here, where that is possible.")
    ] = None,
    load: Annotated[
        bool, typer.Option("--load/--no-load", help="Also load it with plain transformers.")
    ] = True,
    as_json: Json = False,
) -> None:
    """Say whether plain transformers and vLLM load CHECKPOINT, and load it right.

    Exit 0: sound; 1: it is read but not loaded right. docs/verify.md has every rule.

    Example: qatbench verify out/gptq
    """
    from qatbench.stages.verify import verify
    from qatbench.stages.verify.repair import check_out
    from qatbench.stages.verify.repair import repair as mend

    ui = Ui(as_json=as_json)
    copy = None
    with ui.progress() as progress:
        if repair is not None:
            check_out(repair)
        verdict = verify(checkpoint, load=load, progress=progress)
        if repair is not None and verdict.repairable:
            done, copy = mend(checkpoint, repair, load=load, progress=progress)
    value = verdict.as_json()
    shown = _shown(verdict)
    if repair is not None:
        written = copy is not None and repair.exists()
        value["repaired"] = copy.as_json() | {"rules": done} if copy and written else None
        shown += _mended(verdict, copy, repair, written)
    ui.result(value, shown)
    final = copy if copy is not None else verdict
    _next(ui, final, verdict, repair)
    raise typer.Exit(final.exit_code)


def _shown(verdict: Verdict) -> list[Any]:
    kind = "16 bits"
    if verdict.method:
        size = "whole rows" if verdict.group_size == -1 else f"groups of {verdict.group_size}"
        kind = f"{verdict.method}, {verdict.bits} bits, {size}"
    summary = {"family": verdict.model_type, "format": kind}
    summary |= {name: verdict.loader(name) for name in ("transformers", "vllm")}
    parts: list[Any] = [table(f"{verdict.path}", [summary])]
    rows = [
        {
            "finding": finding.rule,
            "transformers": finding.transformers or "-",
            "vllm": finding.vllm or "-",
            "where": finding.where,
        }
        for finding in verdict.findings
    ]
    if rows:
        parts += ["", table("findings", rows)]
    for finding in verdict.findings:
        parts += [f"{finding.rule}: {finding.what}", f"  fix: {_fix(finding)}"]
    return parts


def _fix(finding: Finding) -> str:
    return finding.fix + (" (--repair does it)" if finding.defect and finding.repairable else "")


def _mended(verdict: Verdict, copy: Verdict | None, out: Path, written: bool) -> list[Any]:
    if verdict.sound:
        return ["nothing to repair: no copy was written"]
    if written and copy is not None:
        return ["", "repaired copy:", *_shown(copy)]
    stuck = [f.rule for f in (copy or verdict).defects if not f.repairable]
    return [f"no copy was written to {out}: beyond repair are {', '.join(dict.fromkeys(stuck))}"]


def _next(ui: Ui, final: Verdict, original: Verdict, repair: Path | None) -> None:
    if final.sound:
        subset = "" if ARCHITECTURES[final.model_type].is_vlm else ":text"
        ui.next_command(f"qatbench eval {final.path} --task scienceqa:test{subset} --out RUN")
    elif final is original and final.repairable and repair is None:
        ui.next_command(f"qatbench verify {final.path} --repair {final.path}-repaired")
    else:
        ui.next_command("qatbench quantize MODEL --method gptq --out DIR   # make it anew")
