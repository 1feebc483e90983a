"""Files of answers that other tools wrote -> one Answer a row, whatever the form.

Recognised by content, and by name where the content leaves it open: LLaVA's answers (jsonl),
choices by question ({id: index}, alone or under "results"; LLaVA, ScienceQA), lmms-eval's logged
samples, tables in MMBench columns (submissions, VLMEvalKit's results) and this tool's own
responses. Any of them may be gzipped. No text of an answer is put into an error message.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from qatbench.errors import ArtifactError, PrerequisiteError, UsageError
from qatbench.records import LETTERS
from qatbench.tasks.tables import read_text_table, read_xlsx

FORMS = (
    "LLaVA's answers (question_id, text), {id: index} or {results: {id: index}}, lmms-eval's "
    "samples (doc_id, filtered_resps), or a table with the columns index and prediction"
)


class Answer(NamedTuple):
    """One row of an answers file."""

    where: str  # file and row, for messages
    id: str | None = None  # of the question, as the file names it
    response: str | None = None
    choice: int | None = None  # the option chosen, where there is no response; -1: none
    prompt: str | None = None  # the saved prompt
    row: Mapping[str, Any] = {}  # the question's own columns, as far as they are there
    position: int | None = None  # of the question in its split
    target: str | None = None  # the gold answer that the file states


class Answers(NamedTuple):
    """All rows of a file, in its order."""

    form: str  # what kind of file it is, in words
    rows: list[Answer]

    @property
    def has_responses(self) -> bool:
        """Whether there is something to extract from; else the choices are given."""
        return any(row.response is not None for row in self.rows)

    @property
    def has_prompts(self) -> bool:
        """Whether each row tells the prompt it answers."""
        return bool(self.rows) and all(row.prompt is not None for row in self.rows)


def read(path: Path) -> Answers:
    """Read a file of answers.

    Raises: PrerequisiteError if it is not there; UsageError if it is none of the known forms;
        ArtifactError naming file and row if it is damaged.
    """
    try:
        data = path.read_bytes()
        if data[:2] == b"\x1f\x8b":
            data = gzip.decompress(data)
    except FileNotFoundError as error:
        raise PrerequisiteError(f"no answers at {path}", hint=f"give {FORMS}") from error
    except (OSError, EOFError, zlib.error) as error:
        raise ArtifactError(f"cannot read {path}: {error}", hint="get the file again") from error
    if data[:4] == b"PK\x03\x04":
        return _from_table(read_xlsx(data, path), path, "table (.xlsx)")
    if data[:4] == b"\xd0\xcf\x11\xe0":
        raise UsageError(f"{path} is an .xls file", hint="save it as .xlsx")
    if data.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] in (b"{", b"["):
        return _from_json(data, path)
    if not data.strip():
        raise ArtifactError(f"{path} is empty", hint=f"give {FORMS}")
    return _from_table(read_text_table(data, path), path, "table (text)")


# --- JSON ---------------------------------------------------------------------------------------


def _from_json(data: bytes, path: Path) -> Answers:
    """One JSON value, or one object a line."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ArtifactError(f"{path} is not UTF-8: {error}", hint="get the file again") from error
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise ArtifactError(f"{path} is nested too deeply", hint=f"give {FORMS}") from error
    except ValueError as error:
        if "\n" not in text.strip():
            raise ArtifactError(f"{path} is not JSON: {error}", hint="it may be cut") from error
        return _from_objects(_lines(text, path), path, "line")
    if isinstance(value, dict) and isinstance(value.get("logs"), list):
        return _from_objects(value["logs"], path, "log")  # lmms-eval of 2024
    if isinstance(value, dict) and isinstance(value.get("prediction"), Mapping):
        value = _rows_of(value, path)  # a table by columns
    if isinstance(value, dict) and (first := _kind(value)) and first is not _choice:
        return _from_objects([value], path, "line")  # a jsonl of one line
    if isinstance(value, dict):
        return _from_choices(value, path)
    return _from_objects(value, path, "row")


def _lines(text: str, path: Path) -> dict[int, Any]:
    """Objects by line number."""
    found = {}
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                found[number] = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise _bad(path, "line", number, "is not JSON: the file may be cut") from error
    return found


def _rows_of(columns: Mapping[str, Any], path: Path) -> list[dict[str, Any]]:
    """Rows of a table that is written as {column: {row: cell}}."""
    try:
        return [{name: cells[row] for name, cells in columns.items()}
                for row in columns["prediction"]]  # fmt: skip
    except (KeyError, TypeError) as error:
        raise ArtifactError(f"{path}: its columns differ in rows", hint="write it again") from error


def _bad(path: Path, unit: str, number: int | str, why: str) -> ArtifactError:
    return ArtifactError(f"{path}, {unit} {number}: {why}", hint="repair or remove this row")


def _from_objects(values: Sequence[Any] | Mapping[int, Any], path: Path, unit: str) -> Answers:
    numbered = values if isinstance(values, Mapping) else dict(enumerate(values, start=1))
    first = next(iter(numbered.values()), None)
    make = _kind(first) if isinstance(first, Mapping) else None
    if make is None or make is _choice:
        raise UsageError(f"{path} is no file of answers that is known", hint=f"give {FORMS}")
    rows = []
    for number, value in numbered.items():
        if not isinstance(value, Mapping):
            raise _bad(path, unit, number, "is not an object")
        if make is _ours and value["status"] == "error":
            continue  # it was not answered
        try:
            rows.append(make(value, f"{path}, {unit} {number}"))
        except ValueError as error:
            raise _bad(path, unit, number, str(error)) from error
    return Answers(_FORM[make], rows)


Make = Callable[[Mapping[str, Any], str], Answer]


def _kind(value: Mapping[str, Any]) -> Make | None:
    """What a row of these keys is."""
    keys = set(value)
    if "question_id" in keys:
        return _llava
    if "doc_id" in keys:
        return _lmms
    if "prediction" in keys:
        return _cells
    if {"id", "chosen", "status"} <= keys:
        return _ours
    scalar = all(isinstance(cell, int | str) for cell in value.values())
    return _choice if scalar or isinstance(value.get("results"), Mapping) else None


def _id(value: object, key: str) -> str:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int | str) or not str(value).strip():
        raise ValueError(f"{key} is missing or neither a text nor a whole number")
    text = str(value).strip()
    return text.partition(".")[0] if re.fullmatch(r"\d+\.0+", text) else text


def _response(value: object, key: str) -> str:
    """A response; null and NaN, which writers of tables put for an empty one, are empty."""
    if value is None or value != value:
        return ""
    if isinstance(value, str | int | float):
        return str(value)
    raise ValueError(f"{key} is not a text")


def _llava(value: Mapping[str, Any], where: str) -> Answer:
    if not isinstance(value.get("text"), str):
        raise ValueError("text is missing or not a text")
    prompt = value.get("prompt")
    return Answer(
        where,
        _id(value.get("question_id"), "question_id"),
        value["text"],
        prompt=prompt if isinstance(prompt, str) else None,
    )


def _lmms(value: Mapping[str, Any], where: str) -> Answer:
    """A sample: its question by the index or content in `doc`, else by its place (doc_id)."""
    response: Any = value.get("filtered_resps", value.get("resps"))
    if response is None:
        raise ValueError("filtered_resps and resps are missing")
    while isinstance(response, list | tuple) and response:
        response = response[0]
    place = value.get("doc_id")
    if not isinstance(place, int) or isinstance(place, bool):
        raise ValueError("doc_id is not a whole number")
    doc = value.get("doc")
    own = doc if isinstance(doc, Mapping) else {}
    scored = (cell for cell in value.values() if isinstance(cell, Mapping) and "index" in cell)
    named = own if "index" in own else next(scored, {})  # mmbench's metrics repeat the index
    target = value.get("target")
    return Answer(
        where,
        _id(named["index"], "index") if "index" in named else None,
        _response(None if isinstance(response, list) else response, "filtered_resps"),
        row=own,
        position=place,
        target=target if isinstance(target, str) else None,
    )


def _cells(value: Mapping[str, Any], where: str) -> Answer:
    name = _id(value.get("index"), "index")
    if not name.isdecimal():
        raise ValueError("index is not a whole number")
    if "prediction" not in value:
        raise ValueError("prediction is missing")
    own = {key: cell for key, cell in value.items() if key not in ("prediction", "image")}
    return Answer(where, name, _response(value["prediction"], "prediction"), row=own)


def _ours(value: Mapping[str, Any], where: str) -> Answer:
    name, raw, chosen = _id(value.get("id"), "id"), value.get("raw"), value.get("chosen")
    if isinstance(raw, str):
        return Answer(where, name, raw)
    return Answer(where, name, choice=LETTERS.index(chosen) if chosen else -1)


# --- choices and tables -------------------------------------------------------------------------


def _choice(value: Mapping[str, Any], where: str) -> Answer:  # a mark: see _from_choices
    raise NotImplementedError


_FORM: dict[Make, str] = {
    _llava: "LLaVA answers",
    _lmms: "lmms-eval samples",
    _cells: "table (JSON)",
    _ours: "qatbench responses",
}


def _from_choices(value: Mapping[str, Any], path: Path) -> Answers:
    """{id: index}, perhaps under "results"; a letter may stand for its index."""
    given = value.get("results", value)
    if not isinstance(given, Mapping) or not given or _kind(given) is not _choice:
        raise UsageError(f"{path} is no file of answers that is known", hint=f"give {FORMS}")
    rows = []
    for name, choice in given.items():
        where = f"{path}, id {name}"
        if isinstance(choice, str) and len(choice) == 1 and choice in LETTERS:
            choice = LETTERS.index(choice)
        if not isinstance(choice, int) or isinstance(choice, bool) or choice < -1:
            raise _bad(path, "id", name, "the choice is neither an index, nor -1, nor a letter")
        rows.append(Answer(where, str(name), choice=choice))
    return Answers("choices by question", rows)


def _from_table(rows: Sequence[Mapping[str, Any]], path: Path, form: str) -> Answers:
    if not rows:
        raise ArtifactError(f"{path} has no rows", hint=f"give {FORMS}")
    absent = [name for name in ("index", "prediction") if name not in rows[0]]
    if absent:
        raise UsageError(f"{path} has no column {absent[0]}", hint=f"give {FORMS}")
    return _from_objects(rows, path, "row")._replace(form=form)
