"""LLaVA's question file for ScienceQA (`llava_test_CQM-A.json` of its eval.zip) -> Questions.

A row is {id, image?, conversations}: the person's turn holds the image mark, hint, question and
options as one text, the other turn the gold letter. Options are the lines from the last "A. " on.
Hint and question cannot be told apart and stay together as the text, "Context: " included, so that
`llava-sqa` and `lmms-sqa` put the very text of the file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qatbench.errors import ArtifactError, UsageError
from qatbench.records import LETTERS, Question

MARK = "<image>"
_SPLITS = ("train", "val", "test")


def read(file: Path, split: str) -> list[Question]:
    """Read the questions of a file, which is one split; a split in its name has to be the one.

    Pictures are looked for below `images/SPLIT/` beside the file, else beside the file.

    Raises: UsageError when the name tells another split; ArtifactError when the file or a row is
        damaged, naming the row, without its text.
    """
    named = [part for part in re.split("[^a-z]+", file.stem.lower()) if part in _SPLITS]
    if named and split not in named:
        raise UsageError(f"{file} has no split {split!r}", hint=f"splits there: {named[0]}")
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"cannot read {file}: {type(error).__name__}", hint=_HINT) from error
    if not isinstance(rows, list):
        raise ArtifactError(f"{file} is no list of questions", hint=_HINT)
    beside = file.parent / "images" / split
    images = beside if beside.is_dir() else file.parent
    return [question(row, f"{file}, row {n}", split, images) for n, row in enumerate(rows, 1)]


_HINT = "give LLaVA's llava_test_CQM-A.json, or ScienceQA in its original layout"


def question(row: Any, where: str, split: str, images: Path) -> Question:
    """Make a Question from one row.

    Raises: ArtifactError when it has another form.
    """
    if not isinstance(row, Mapping) or not isinstance(row.get("id"), str):
        raise ArtifactError(f"{where}: id is missing", hint=_HINT)
    where = f"{where} (id {row['id']})"
    turns = row.get("conversations")
    if not isinstance(turns, list) or not all(isinstance(turn, Mapping) for turn in turns):
        raise ArtifactError(f"{where}: conversations are missing", hint=_HINT)
    said = {turn.get("from"): turn.get("value") for turn in turns}
    text, gold = said.get("human"), said.get("gpt")
    if not isinstance(text, str):
        raise ArtifactError(f"{where}: there is no turn of a human", hint=_HINT)
    stem, options = _options(text.replace(MARK, "").strip())
    if len(options) < 2 or not stem:
        raise ArtifactError(f"{where}: the text does not end in options", hint=_HINT)
    if gold is not None and gold not in options:
        raise ArtifactError(f"{where}: the answer is no letter of an option", hint=_HINT)
    image = row.get("image")
    if image is not None and (not isinstance(image, str) or ".." in Path(image).parts):
        raise ArtifactError(f"{where}: image is no path below the images", hint=_HINT)
    return Question(
        id=row["id"], task="scienceqa", text=stem, options=options, gold=gold, hint="",
        image=images / image.lstrip("/") if image else None, split=split,
    )  # fmt: skip


def _options(text: str) -> tuple[str, dict[str, str]]:
    """(what stands before the options, option texts by letter)."""
    stem, found, rest = text.rpartition("\nA. ")
    if not found:
        return text, {}
    options, letter = {}, LETTERS[0]
    for following in LETTERS[1:]:
        before, more, after = rest.partition(f"\n{following}. ")
        options[letter] = before
        if not more:
            break
        letter, rest = following, after
    return stem, options
