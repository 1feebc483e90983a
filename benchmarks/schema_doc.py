"""docs/comparison.md: the schema of comparison.json, from the models and the comments beside them.

python benchmarks/schema_doc.py > docs/comparison.md
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("qatbench/report/model.py", "qatbench/report/details.py")
FIRST = ("Comparison", "TaskComparison", "Definition", "CheckpointFacts", "ArmResult")
INTRO = """\
# comparison.json

What `qatbench compare` and `run` write, and all that report.html, report.md, the figures and the
tables are drawn from (`qatbench compare --render DIR`). Accuracies, differences and intervals are
fractions; p-values lie in [0, 1]; sizes are bytes, durations seconds, divergences nats. It holds
ids, letters and scores of questions, never their text or pictures. `schema_version` is 1; fields
are only ever added. This page is written by `python benchmarks/schema_doc.py`; a test holds it to
the code.

`compare --cluster KEY` resamples together the questions that have one value of a field of
`Prediction.meta`: `image` (a digest of the picture), `skill`, `category`, `subject`. By default
each question is drawn alone; all passes of a circular question are one question.
"""


def records(source: str) -> dict[str, str]:
    """Class name -> its section in Markdown, of every Record in a module."""
    lines, found = source.splitlines(), {}
    for node in ast.parse(source).body:
        if not isinstance(node, ast.ClassDef) or "Enum" in ast.unparse(node.bases[0]):
            continue
        rows = [
            f"| `{field.target.id}` | `{_type(field)}` | {_comment(lines, field)} |"
            for field in node.body
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        ]
        if not rows:
            continue
        base = ast.unparse(node.bases[0])
        more = "" if base == "Record" else f" With all of {base}."
        told = (ast.get_docstring(node) or "").replace("\n\n", "\n").replace("\n", " ")
        table = "\n".join(["| field | type | what |", "| --- | --- | --- |", *rows])
        found[node.name] = f"## {node.name}\n\n{told}{more}\n\n{table}"
    return found


def _type(field: ast.AnnAssign) -> str:
    return ast.unparse(field.annotation).replace("|", "or")


def _comment(lines: list[str], field: ast.AnnAssign) -> str:
    """The comment at a field's line, with those that go on below it."""
    first = (field.end_lineno or field.lineno) - 1
    told = re.search(r"  # (.*)$", lines[first])
    parts = [told[1]] if told else []
    for line in lines[first + 1 :]:
        more = re.match(r"\s+# (.*)$", line)
        if not parts or more is None:
            break
        parts.append(more[1])
    return " ".join(parts).replace("|", "\\|")


def page() -> str:
    """The whole page."""
    found: dict[str, str] = {}
    for path in SOURCES:
        found |= records((ROOT / path).read_text(encoding="utf-8"))
    order = [*FIRST, *(name for name in found if name not in FIRST)]
    return INTRO + "\n" + "\n\n".join(found[name] for name in order) + "\n"


if __name__ == "__main__":
    print(page(), end="")
