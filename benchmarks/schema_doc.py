"""docs/comparison.md: the schemas of comparison.json and speed.json, from their models' comments.

The types are those of the models' JSON schema; what a number counts, `UNITS` says, and a number
that it does not know is an error.

    python benchmarks/schema_doc.py > docs/comparison.md
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

from qatbench.records_speed import Speed
from qatbench.report.model import Comparison

ROOT = Path(__file__).resolve().parents[1]
SOURCES = (
    "qatbench/report/model.py",
    "qatbench/report/details.py",
    "qatbench/report/speed_model.py",
    "qatbench/records_speed.py",
)
FIRST = ("Comparison", "TaskComparison", "Definition", "CheckpointFacts", "ArmResult")
INTRO = """\
# comparison.json

What `qatbench compare` and `run` write, and all that report.html, report.md, the figures and the
tables are drawn from (`qatbench compare --render DIR`). It holds ids, letters and scores of
questions, never their text or pictures. The records from Spread on are those of speed.json
(`qatbench speed`), whose rows an arm holds. This page is written by
`python benchmarks/schema_doc.py`; a test holds it to the code.

Types are those of JSON; "None" in a description is null, "()" an empty array. A fraction is of 1:
64.1 % is 0.641, 2 points are 0.02. A question is what is counted: a row of predictions.jsonl, or
all rows of one group. Mean counts need not be whole. `schema_version` is 1; fields are only ever
added.

`compare --cluster KEY` resamples together the questions that have one value of a field of
`Prediction.meta`: `image` (a digest of the picture), `skill`, `category`, `subject`. By default
each question is drawn alone; all passes of a circular question are one question.
"""
# Unit -> names of fields; CLASS.FIELD where other classes use the name for something else.
UNITS = {
    "fraction": "accuracy accuracies reference_accuracy low high spread chance difference margin"
    " level same_answer share beta_at_bound share_of_limit",
    "fraction squared": "variance",
    "probability": "p p_holm p_equivalence p_equivalence_holm",
    "ratio": "cost decode_to_first prefill_to_first decode_to_plain prefill_to_plain",
    "questions": "n right lost gained n_needed n_to_decide dropped both_right both_wrong flips"
    " flips_left_out",
    "questions/s": "questions_per_second",
    "rows": "rows unparsed errors ties wrong_changed batch questions",
    "tokens": "context tokens padded_tokens",
    "tokens/s": "prefill_tokens_per_second decode_tokens_per_second limit_tokens_per_second",
    "pictures": "images",
    "nats": "kd median p95 p99 largest lost_margin gained_margin reference_margin Divergence.mean"
    " Flip.margin",
    "nats/token": "ce",
    "that of the term": "Curve.mean Curve.low Curve.high",
    "that of the measurement": "Spread.median Spread.low Spread.high values",
    "seconds": "making_seconds training_seconds calibration_seconds source_seconds"
    " first_token_seconds",
    "bytes": "checkpoint_bytes peak_memory_bytes weight_bytes cache_bytes peak_bytes moved_bytes"
    " copied_bytes",
    "bytes/s": "bytes_per_second",
    "bits": "bits bits_per_weight",
    "weights": "group_size",
    "samples": "samples_seen",
    "optimizer steps": "first last points",
    "draws": "bootstrap_draws",
    "runs": "repeats warm_up",
    "threads": "cpu_threads",
    "pairs": "family_size ablation_family",
    "none": "rcka gate beta beta_range seed seeds reference_seed bootstrap_seed schema_version",
}
_UNIT_OF = {name: unit for unit, names in UNITS.items() for name in names.split()}

Schema = dict[str, Any]  # a node of a JSON schema


def records(source: str, schemas: dict[str, Schema]) -> dict[str, str]:
    """Class name -> its section in Markdown, of every Record in a module.

    Raises: SystemExit for a number without a unit.
    """
    lines, found = source.splitlines(), {}
    for node in ast.parse(source).body:
        if not isinstance(node, ast.ClassDef) or _is_no_record(node):
            continue
        rows = [
            _row(node.name, field.target.id, schemas, _comment(lines, field))
            for field in node.body
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        ]
        if not rows:
            continue
        base = ast.unparse(node.bases[0])
        more = "" if base == "Record" else f" With all of {base}."
        told = (ast.get_docstring(node) or "").replace("\n\n", "\n").replace("\n", " ")
        head = ["| field | type | unit | what |", "| --- | --- | --- | --- |"]
        found[node.name] = f"## {node.name}\n\n{told}{more}\n\n" + "\n".join([*head, *rows])
    return found


def _is_no_record(node: ast.ClassDef) -> bool:
    return re.search("Enum|NamedTuple", ast.unparse(node.bases[0])) is not None


def _row(record: str, field: str, schemas: dict[str, Schema], comment: str) -> str:
    owner = record if record in schemas else "ArmResult"  # CheckpointFacts: only as part of it
    schema = schemas[owner]["properties"][field]
    unit = ""
    if re.search(r"\b(number|integer)\b|\[Spread\]", json_type(schema, schemas)):
        unit = _UNIT_OF.get(f"{record}.{field}", _UNIT_OF.get(field, ""))
        if not unit:
            raise SystemExit(f"{record}.{field} is a number without a unit: name it in UNITS")
    return f"| `{field}` | {json_type(schema, schemas)} | {unit} | {comment} |"


def json_type(schema: Schema, schemas: dict[str, Schema]) -> str:
    """A node of a JSON schema in words, records as links."""
    if "$ref" in schema:
        name = schema["$ref"].rsplit("/", 1)[-1]
        return json_type(schemas[name], schemas) if "enum" in schemas[name] else _link(name)
    if "anyOf" in schema:
        return " or ".join(json_type(part, schemas) for part in schema["anyOf"])
    if "enum" in schema:
        return "string: " + ", ".join(f"`{value}`" for value in schema["enum"])
    if "const" in schema:
        return f"{schema['type']} `{schema['const']}`"
    if "prefixItems" in schema:
        parts = [json_type(part, schemas) for part in schema["prefixItems"]]
        return f"array [{', '.join(parts)}]"
    if schema["type"] == "array":
        inner = json_type(schema["items"], schemas)
        return f"array of ({inner})" if " or " in inner else f"array of {inner}"
    if schema["type"] == "object":
        keys = schema.get("propertyNames", {}).get("enum", [])
        told = "".join(f" `{key}`" for key in keys)
        inner = json_type(schema["additionalProperties"], schemas)
        return f"object{f' with{told}' if told else ''}, values: {inner}"
    return str(schema["type"])


def _link(record: str) -> str:
    return f"[{record}](#{record.lower()})"


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


def schemas_of() -> dict[str, Schema]:
    """Record -> its JSON schema, as comparison.json and speed.json are written."""
    found: dict[str, Schema] = {}
    for whole in (Comparison, Speed):
        schema = whole.model_json_schema(mode="serialization")
        found |= {**schema["$defs"], whole.__name__: schema}
    return found


def page() -> str:
    """The whole page."""
    found: dict[str, str] = {}
    for path in SOURCES:
        found |= records((ROOT / path).read_text(encoding="utf-8"), schemas_of())
    order = [*FIRST, *(name for name in found if name not in FIRST)]
    return INTRO + "\n" + "\n\n".join(found[name] for name in order) + "\n"


if __name__ == "__main__":
    print(page(), end="")
