"""A user's own questions: one file -> list of Question. The task is called as the file's stem.

A JSONL has one question a line: {"question", "options": [...] or {"A": ...}, "answer": letter,
index from 0 or text, "id"?, "hint"?, "image"?: path relative to the file, or base64, "subject"?,
"category"?, ...}. A TSV or CSV has MMBench's columns; `index` may be absent, `image_path` may stand
for `image`. Every cell is its text: "NA" and "nan" are options, not gaps.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qatbench.errors import ArtifactError, PrerequisiteError, UsageError
from qatbench.records import LETTERS, Question
from qatbench.tasks import images, mmbench
from qatbench.tasks.scienceqa import Subset, part

SUFFIXES = (".jsonl", ".tsv", ".csv")
SPLIT = "all"  # a file is one split
_TEXTS = ("subject", "topic", "category", "l2_category", "skill", "grade")
_KNOWN = {"id", "question", "options", "answer", "hint", "image", *_TEXTS}
_NAME = re.compile(r"\w[\w.-]*")
_HINT = (
    'one JSON object a line: {"question": ..., "options": ["...", "..."], "answer": "B", '
    '"image": "pictures/1.png"}; only image, hint, id and category may be left out'
)


def name_of(file: Path) -> str:
    """The task's name, the file's stem.

    Raises: UsageError when it cannot stand in `TASK:SPLIT` or `TASK=NAME`.
    """
    if not _NAME.fullmatch(file.stem):
        raise UsageError(
            f"{file.stem!r} cannot name a task", hint="letters, digits, _, - and . in the file name"
        )
    return file.stem


def load(file: Path, *, subset: Subset = "all") -> list[Question]:
    """Read all questions of a file, in its order.

    Raises: PrerequisiteError if it is not there; UsageError if it is of another kind, or none of
        its questions is in `subset`; ArtifactError, with file and line (of a table: row), if a
        question cannot be used, has no answer, or has the id of another.
    """
    if not file.is_file():
        raise PrerequisiteError(f"no questions at {file}", hint="a JSONL, or a TSV or CSV")
    if file.suffix not in SUFFIXES:
        raise _other_kind(file)
    task, seen = name_of(file), set[str]()
    questions = []
    for where, question in _from_jsonl(file) if file.suffix == ".jsonl" else _from_table(file):
        if question.gold is None:
            raise _bad(where, "answer", "is missing")
        if question.id in seen:
            raise _bad(where, "id", f"{question.id} is there twice")
        seen.add(question.id)
        questions.append(question.model_copy(update={"task": task, "split": SPLIT}))
    if not questions:
        raise ArtifactError(f"{file} holds no questions", hint=_HINT)
    return part(questions, file, SPLIT, subset)


def holds_questions(file: Path) -> bool:
    """Whether the first line of a JSONL is a question, not a conversation; False if unreadable."""
    try:
        with file.open(encoding="utf-8-sig") as stream:
            row = json.loads(next((line for line in stream if line.strip()), ""))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(row, dict) and "question" in row


def _bad(where: str, field: str, why: str) -> ArtifactError:
    return ArtifactError(f"{where}: {field} {why}", hint=_HINT)


def _other_kind(file: Path) -> UsageError:
    """LLaVA's question files say `conversations`: their answers and hints cannot be told apart."""
    try:
        start = file.open(encoding="utf-8").read(4096) if file.suffix == ".json" else ""
    except (OSError, ValueError):
        start = ""
    if '"conversations"' in start:
        return UsageError(
            f"{file} holds conversations, in which hint, question and options are one text",
            hint="LLaVA's ScienceQA file: --task scienceqa:test --data FILE.json; "
            "to train: --train FILE.json",
        )
    return UsageError(f"{file} is no {', '.join(SUFFIXES)} file", hint=_HINT)


# --- JSONL ----------------------------------------------------------------------------------------


def _from_jsonl(file: Path) -> Iterator[tuple[str, Question]]:
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, ValueError) as error:
        raise ArtifactError(f"cannot read {file}: {type(error).__name__}", hint=_HINT) from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ArtifactError(f"{where}: not JSON, or cut", hint=_HINT) from error
        if not isinstance(row, dict):
            raise ArtifactError(f"{where}: not a JSON object", hint=_HINT)
        yield where, _question(row, where, number, file.parent)


def _question(row: Mapping[str, Any], where: str, number: int, folder: Path) -> Question:
    if unknown := sorted(row.keys() - _KNOWN):
        raise _bad(where, unknown[0], f"is no known key; known: {', '.join(sorted(_KNOWN))}")
    text = _text(row, "question", where)
    if not text.strip():
        raise _bad(where, "question", "is missing or empty")
    options = _options(row.get("options"), where)
    return Question(
        id=_id(row.get("id"), where, number),
        task="",
        text=text,
        options=options,
        gold=_gold(row.get("answer"), options, where),
        hint=_text(row, "hint", where),
        image=_image(row, where, folder),
        **{field: _text(row, field, where) or None for field in _TEXTS},
    )


def _text(row: Mapping[str, Any], field: str, where: str) -> str:
    value = row.get(field)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise _bad(where, field, f"is {type(value).__name__}, not text")
    return value


def _id(value: object, where: str, number: int) -> str:
    if value is None:
        return str(number)
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise _bad(where, "id", "is neither text nor a whole number")
    return str(value)


def _options(value: object, where: str) -> dict[str, str]:
    """Options by letter, in the order of letters."""
    if isinstance(value, list):
        if len(value) > len(LETTERS):
            raise _bad(where, "options", f"are {len(value)}, more than there are letters")
        options: dict[Any, Any] = dict(zip(LETTERS, value, strict=False))
    elif isinstance(value, dict):
        options = dict(sorted(value.items()))
    else:
        raise _bad(where, "options", "are missing, or neither a list nor an object")
    for letter, text in options.items():
        if len(letter) != 1 or letter not in LETTERS:
            raise _bad(where, "options", f"has the key {letter!r}, not a letter A to Z")
        if not isinstance(text, str) or not text:
            raise _bad(where, f"option {letter}", "is not a text, or empty")
    if len(options) < 2:
        raise _bad(where, "options", "are fewer than two")
    return options


def _gold(value: object, options: Mapping[str, str], where: str) -> str | None:
    """The letter that a letter, an index from 0 or an option's text stands for."""
    letters = list(options)
    if value is None:
        return None
    if isinstance(value, int) and not isinstance(value, bool):
        if not 0 <= value < len(letters):
            raise _bad(where, "answer", f"is {value}, outside the {len(letters)} options (from 0)")
        return letters[value]
    if not isinstance(value, str):
        raise _bad(where, "answer", "is neither a letter, an index nor a text")
    meant = {letter for letter, text in options.items() if value in (letter, text)}
    if len(meant) > 1:
        raise _bad(where, "answer", f"can be {' or '.join(sorted(meant))}: give the index from 0")
    if not meant:
        raise _bad(where, "answer", "is neither a letter nor the text of an option of this row")
    return meant.pop()


def _image(row: Mapping[str, Any], where: str, folder: Path) -> Path | bytes | None:
    """A file, or the image itself; whether it can be decoded shows when it is asked."""
    value = _text(row, "image", where)
    if not value:
        return None
    if (found := encoded(value)) is not None:
        return found
    if len(value) > 1024 or "\0" in value or value.startswith("data:"):
        raise _bad(where, "image", "is neither a path nor the base64 of an image: cut or damaged?")
    return folder / value


def encoded(text: str) -> bytes | None:
    """The image that this is the base64 of, bare or as a data URL; None if it is not one."""
    if match := re.match(r"data:image/[\w.+-]+;base64,", text):
        text = text[match.end() :]
    try:
        data = base64.b64decode(text, validate=True)
    except ValueError:
        return None
    return data if images.is_encoded(data) else None


# --- tables ---------------------------------------------------------------------------------------


def _from_table(file: Path) -> Iterator[tuple[str, Question]]:
    """Rows in MMBench's columns, CircularEval's passes told by the index as there."""
    rows = mmbench.read_table(file, needed=("question", "A", "B"))
    for number, row in enumerate(rows, start=1):
        row.setdefault("index", str(number))
    cells = mmbench.Images.of(rows)
    for number, row in enumerate(rows, start=1):
        where = f"{file}, row {number}"
        question = mmbench.question(row, where, cells)
        if question.image is None and row.get("image_path"):
            question = question.model_copy(update={"image": file.parent / row["image_path"]})
        yield where, question
