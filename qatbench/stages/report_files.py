"""A comparison as files: comparison.json, and what is drawn from it and nothing else."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping
from pathlib import Path

from qatbench.errors import PrerequisiteError
from qatbench.report import html, latex
from qatbench.report.changes import change_rows, group_rows
from qatbench.report.claims import claim_rows
from qatbench.report.figures import PATTERNS, figures
from qatbench.report.markdown import render
from qatbench.report.model import Comparison
from qatbench.report.tables import ablation_rows, arm_rows, pair_rows
from qatbench.stages import gallery
from qatbench.store import read_record, write_text

COMPARISON = "comparison.json"
# Names that only this project gives: what a comparison no longer has is removed.
GENERATED = (
    *(f"tables/{name}.{kind}" for name in ("ablations", "changes", "groups", "claims", "pairs")
      for kind in ("csv", "tex")),
    *PATTERNS,
)  # fmt: skip


def read(folder: Path) -> Comparison:
    """Read a comparison back.

    Raises: PrerequisiteError if it is not there; ArtifactError if it is damaged, or of a version
        that this qatbench does not write.
    """
    file = folder / COMPARISON
    if not file.is_file():
        raise PrerequisiteError(
            f"no {COMPARISON} in {folder}",
            hint="give the folder that qatbench compare or run wrote",
        )
    return read_record(Comparison, file, "compare the runs again")


def write(
    comparison: Comparison, out: Path, paths: Mapping[str, str] | None = None
) -> tuple[Path, ...]:
    """Write the tables, the figures, comparison.json, report.html and, last, report.md.

    Each file is replaced whole or not at all; a table or figure that this comparison does not have
    is removed. All of it follows from the comparison; only the gallery of report.html takes
    questions from `paths`, which says where a task's data lie, and from the built-in data. Of other
    tasks it holds ids and letters alone.

    Returns: the paths written, in that order.
    """
    drawn = figures(comparison)
    texts = {name: text for name, text in _tables(comparison).items() if text}
    texts |= drawn
    for pattern in GENERATED:
        for old in out.glob(pattern):
            if old.relative_to(out).as_posix() not in texts:
                old.unlink()
    texts[COMPARISON] = _numbers_in_a_line(comparison.model_dump_json(indent=1)) + "\n"
    shown = gallery.load(comparison, paths or {})
    texts["report.html"] = html.render(comparison, figures=drawn, gallery=shown)
    texts["report.md"] = render(comparison)
    for name, text in texts.items():
        write_text(out / name, text)
    return tuple(out / name for name in texts)


def _tables(comparison: Comparison) -> dict[str, str]:
    rows = {
        "arms": arm_rows(comparison),
        "pairs": pair_rows(comparison),
        "ablations": ablation_rows(comparison),
        "changes": change_rows(comparison),
        "groups": group_rows(comparison),
        "claims": claim_rows(comparison),
    }
    return {f"tables/{name}.csv": _csv(some) for name, some in rows.items()} | latex.tables(
        comparison
    )


def _numbers_in_a_line(text: str) -> str:
    """Indented JSON with each list of numbers on one line: a curve has up to 60."""
    numbers = r"\[\n([-+0-9.eE,\snul]+)\n\s*\]"  # a raw line break is in no JSON string
    return re.sub(numbers, lambda found: f"[{' '.join(found[1].split())}]", text)


def _csv(rows: list[dict[str, str]]) -> str:
    text = io.StringIO()
    if rows:
        writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return text.getvalue()
