"""The questions that answers are scored against: ids, options and golds, and what groups need.

Scoring needs less than asking. Images are never opened; of ScienceQA only choices and answers
have to be there, of an MMBench table only index and answer, when the answers file itself holds the
options.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from qatbench.errors import ArtifactError, PrerequisiteError, UsageError
from qatbench.records import LETTERS, Question
from qatbench.tasks import mmbench, parquet, scienceqa, selector
from qatbench.tasks.answers import Answers
from qatbench.tasks.tables import read_text_table, read_xlsx

_NOT_GIVEN = "-"  # stands for a question text that the data lack and scoring does not read
_IMAGE = b"-"  # stands for an image: there is one


class Asked(NamedTuple):
    """The questions of the chosen part."""

    questions: list[Question]
    part: str  # how it is named in the record, e.g. "scienceqa:test"
    no_gold: int = 0  # rows left out because the data hold no answer to them
    pictured: bool = True  # whether the data tell which questions have an image
    hinted: bool = True  # and which have a hint


def load(task: str, source: str | None, split: str | None, given: Answers) -> Asked:
    """Load the questions of a split, `SPLIT[:text|image]`, or of all splits of an MMBench table.

    Without a source an MMBench table of answers that holds the gold answers is its own data.

    Raises: what the task's loader raises; UsageError if nothing is left to be scored.
    """
    chosen = selector.parse(f"{task}:{split}" if split else task)
    own = task == "mmbench" and source is None and any("answer" in row.row for row in given.rows)
    if own:
        rows = [dict(row.row) for row in given.rows]
        asked = _from_rows(rows, given, str(split or "all"), "the answers file")
    elif task == "mmbench" and (table := _table_file(source, chosen.split)) is not None:
        asked = _from_rows(_read(table), given, str(split or "all"), str(table))
    elif task == "scienceqa" and source and (found := _original(Path(source))) is not None:
        asked = _from_problems(found, chosen.split)._replace(part=str(chosen))
    else:
        paths = {} if source is None else {task: source}
        return Asked(selector.load(chosen, paths), str(chosen))
    kept = scienceqa.part(asked.questions, source or "the data", chosen.split, chosen.subset)
    return asked._replace(questions=kept)


# --- ScienceQA ----------------------------------------------------------------------------------


def _original(source: Path) -> Path | None:
    """problems.json of the original layout; None if `source` is something else."""
    if source.is_file() and source.suffix == ".json":
        return source
    return file if (file := source / "problems.json").is_file() else None


def _from_problems(file: Path, split: str) -> Asked:
    """The split as pid_splits.json lists it; without that file, as the rows themselves state it."""
    problems, listed = _object(file), file.with_name("pid_splits.json")
    name = parquet.ALIAS.get(split, split)
    if listed.is_file():
        pids = _object(listed).get(name)
    else:
        pids = [pid for pid, row in problems.items() if _stated(row) == name]
    if not pids or not isinstance(pids, list):
        raise UsageError(f"{file.parent} has no split {split!r}", hint="name another with --split")
    lacking = [pid for pid in pids if not isinstance(problems.get(pid), Mapping)]
    if lacking:
        raise ArtifactError(f"{file} has no record of pid {lacking[0]}", hint="get the data again")
    images, rest = file.with_name("images"), {"question": _NOT_GIVEN, "split": name}
    rows = {str(pid): rest | dict(problems[pid]) for pid in pids}
    questions = [scienceqa.from_row(row, pid=pid, image_root=images) for pid, row in rows.items()]
    scored = [question for question in questions if question.gold is not None]
    if not scored:
        raise UsageError(f"split {split} of {file} has no gold answers", hint="name another split")
    pictured, hinted = (any(key in row for row in rows.values()) for key in ("image", "hint"))
    return Asked(scored, split, len(questions) - len(scored), pictured, hinted)


def _stated(row: object) -> object:
    return row.get("split") if isinstance(row, Mapping) else None


def _object(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise ArtifactError(f"cannot read {file}: {error}", hint="get the data again") from error
    if not isinstance(value, dict):
        raise ArtifactError(f"{file} is not a JSON object", hint="give ScienceQA's problems.json")
    return value


# --- MMBench ------------------------------------------------------------------------------------


def _table_file(source: str | None, split: str) -> Path | None:
    """The table at `source`: itself, or the only one in a folder; None if its loader is needed."""
    if source is None or source in selector.BUILT_IN:
        return None
    path = Path(source)
    if path.is_file():
        return None if path.suffix == ".parquet" else path
    files = sorted(path.glob("*.tsv"))
    if (plain := path / f"mmbench_{split}.tsv") in files:
        return plain
    return files[0] if len(files) == 1 else None


def _read(file: Path) -> list[dict[str, str]]:
    try:
        data = file.read_bytes()
    except OSError as error:
        raise PrerequisiteError(f"cannot read {file}: {error}", hint="check --data") from error
    return read_xlsx(data, file) if data[:4] == b"PK\x03\x04" else read_text_table(data, file)


def _from_rows(rows: list[dict[str, Any]], given: Answers, split: str, where: str) -> Asked:
    """Rows of the split (`all`: every one) with a gold answer; options from the answers if need be.

    Raises: ArtifactError naming the row if an index is there twice or a row is damaged; UsageError
        if there is no such split or no row of it has an answer.
    """
    if not rows or "index" not in rows[0] or "answer" not in rows[0]:
        lacks = "answer" if rows and "index" in rows[0] else "index"
        raise UsageError(f"{where} has no column {lacks}", hint="give MMBench's TSV with --data")
    name = split.partition(":")[0]
    name = mmbench.ALIAS.get(name, name)
    if any(row.get("split") for row in rows) and name != "all":
        there = sorted({str(row.get("split")) for row in rows})
        rows = [row for row in rows if row.get("split") == name]
        if not rows:
            raise UsageError(f"{where} has no split {name!r}", hint=f"there: {', '.join(there)}")
    options = {row.id: row.row for row in given.rows}
    scored = [row for row in rows if row.get("answer")]
    if not scored:
        raise UsageError(f"{where} has no gold answers", hint="public answers: dev")
    questions = [_question(row, options) for row in scored]
    seen: set[str] = set()
    for question in questions:
        if question.id in seen:
            raise ArtifactError(f"{where}: index {question.id} is there twice", hint="repair it")
        seen.add(question.id)
    part = f"mmbench:{split}"
    return Asked(questions, part, len(rows) - len(scored), "image" in rows[0])


def _question(row: Mapping[str, Any], options: Mapping[str | None, Mapping[str, Any]]) -> Question:
    """A row without its image; a text column of numbers is text again."""
    cells = {key: _cell(value) for key, value in row.items() if key != "image"}
    if not any(cells.get(letter) for letter in LETTERS):
        own = options.get(str(cells.get("index")), {})
        cells |= {letter: _cell(own.get(letter)) for letter in LETTERS if letter in own}
    question = mmbench.from_row({**cells, "question": cells.get("question") or _NOT_GIVEN})
    return question.model_copy(update={"image": _IMAGE if row.get("image") else None})


def _cell(value: object) -> str | None:
    return None if value is None or value != value or value == "" else str(value)
