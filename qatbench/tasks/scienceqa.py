"""ScienceQA (Lu et al., NeurIPS 2022, arXiv:2209.09513): one record -> Question, one split -> list.

Three sources hold the same rows: the original layout (`problems.json`, `pid_splits.json`,
`images/{split}/{pid}/image.png`), parquet files in the Hugging Face schema, and a hub id
("owner/name[/CONFIGURATION]"; of lmms-lab's ScienceQA-FULL if none is named). The last two have
no pid column; there an id is "{split}-{row index}".
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any, Literal, SupportsIndex

from qatbench.errors import ArtifactError, PrerequisiteError, UsageError
from qatbench.records import LETTERS, Question
from qatbench.tasks import llava_questions
from qatbench.tasks.parquet import (
    ALIAS,
    HUB_ID,
    LAYOUT_HINT,
    hub_splits,
    parquet_splits,
)

SHAREABLE = False  # CC BY-NC-SA 4.0: its texts and images may not be passed on with our results

Subset = Literal["all", "text", "image"]


def from_row(row: Mapping[str, Any], *, pid: str, image_root: Path | None = None) -> Question:
    """Make a Question from one raw record.

    `row` is a problems.json entry or a Hugging Face row, `pid` the id the question gets. An image
    file's path is below `image_root` (the `images` folder), or relative to it if None; the file
    need not exist. A row without an `answer` key has no gold letter: it can be asked, not scored.

    Raises: ArtifactError if a field is missing or unusable; the message names pid and field.
    """
    choices = _choices(row, pid)
    return Question(
        id=pid,
        task="scienceqa",
        text=_text(row, "question", pid, required=True) or "",
        options=dict(zip(LETTERS, choices, strict=False)),
        gold=_gold(row, pid, len(choices)),
        hint=_text(row, "hint", pid) or "",
        image=_image(row, pid, image_root),
        split=_text(row, "split", pid),
        subject=_text(row, "subject", pid) or None,
        topic=_text(row, "topic", pid) or None,
        category=_text(row, "category", pid) or None,
        skill=_text(row, "skill", pid) or None,
        grade=_text(row, "grade", pid) or None,
    )


def load(source: str | Path, split: str, *, subset: Subset = "all") -> list[Question]:
    """Read one split, in the order of its file.

    `source` is a folder in the original layout, LLaVA's question file (.json), a parquet file or a
    folder of them (directly or under data/), or a hub id; what exists as a path is not looked up
    on the hub. `val` and `validation` are one split; `trainval` is train, then val, where it is
    not stored. `subset` keeps all questions, those without an image, or those with one (its file
    may be missing).

    Raises: PrerequisiteError if nothing is at `source` or the hub cannot be reached; UsageError
        if there is no such split or none of its questions is in `subset`; ArtifactError if the
        data are damaged.
    """
    questions = read(source, split)
    _check_complete(questions, source)
    return part(questions, source, split, subset)


def splits(folder: Path) -> list[str]:
    """The splits that local data name, in their order.

    Raises: ArtifactError if they are damaged.
    """
    if (folder / "problems.json").is_file():
        return [ALIAS.get(name, name) for name in _json(folder / "pid_splits.json")]
    return list(parquet_splits(folder))


def read(source: str | Path, split: str) -> list[Question]:
    """`load` of all questions, be they answered or not, and whether an id is there twice.

    Raises: as `load`.
    """
    split = ALIAS.get(split, split)
    path = Path(source)
    if (path / "problems.json").is_file():
        return _from_original(path, split)
    if path.suffix == ".json" and path.is_file():
        return llava_questions.read(path, split)
    if path.exists():
        return _from_splits(parquet_splits(path), split, source)
    if isinstance(source, str) and HUB_ID.fullmatch(source):
        return _from_splits(hub_splits(source), split, source)
    raise PrerequisiteError(f"no ScienceQA data at {source}", hint=LAYOUT_HINT)


def part(
    questions: list[Question], source: str | Path, split: str, subset: Subset
) -> list[Question]:
    """Keep the questions of a subset.

    Raises: UsageError if none is in it.
    """
    if subset != "all":
        questions = [q for q in questions if q.has_image == (subset == "image")]
    if not questions:
        raise UsageError(
            f"split {split} of {source} has no question in the subset {subset!r}",
            hint="choose another split or subset",
        )
    return questions


def _bad(pid: str, field: str, why: str) -> ArtifactError:
    return ArtifactError(
        f"ScienceQA row {pid}: {field} {why}", hint="get the data again, or repair this row"
    )


def _text(row: Mapping[str, Any], field: str, pid: str, *, required: bool = False) -> str | None:
    value = row.get(field)
    if value is None and not required:
        return None
    if field not in row:
        raise _bad(pid, field, "is missing")
    if not isinstance(value, str):
        raise _bad(pid, field, f"is {type(value).__name__}, not text")
    return value


def _choices(row: Mapping[str, Any], pid: str) -> list[str]:
    if "choices" not in row:
        raise _bad(pid, "choices", "is missing")
    value = row["choices"]  # a list, or what pandas and pyarrow make of one
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
        raise _bad(pid, "choices", f"is {type(value).__name__}, not a list")
    choices = list(value)
    if not all(isinstance(choice, str) for choice in choices):
        raise _bad(pid, "choices", "holds something that is not text")
    if not 2 <= len(choices) <= len(LETTERS):
        raise _bad(pid, "choices", f"has length {len(choices)}, not 2 to {len(LETTERS)}")
    return choices


def _gold(row: Mapping[str, Any], pid: str, n_choices: int) -> str | None:
    if "answer" not in row:
        return None
    answer = row["answer"]
    if not isinstance(answer, SupportsIndex) or isinstance(answer, bool):
        raise _bad(pid, "answer", f"is {type(answer).__name__}, not an index")
    if not 0 <= answer.__index__() < n_choices:
        raise _bad(pid, "answer", f"is {answer}, outside the {n_choices} choices")
    return LETTERS[answer]


def _image(row: Mapping[str, Any], pid: str, image_root: Path | None) -> Path | bytes | None:
    image = row.get("image")
    if image is None or image == "":
        return None
    if isinstance(image, str):  # original layout: a file name in the row's own folder
        if Path(image).name != image:
            raise _bad(pid, "image", "is not a plain file name")
        split = _text(row, "split", pid, required=True) or ""
        return (image_root or Path()) / split / pid / image
    if isinstance(image, bytes):
        return image
    if isinstance(image, Mapping):
        if image.get("bytes"):
            return bytes(image["bytes"])
        if image.get("path"):
            return Path(image["path"])
        raise _bad(pid, "image", "has neither bytes nor a path")
    return _encoded(image, pid)


def _encoded(image: object, pid: str) -> bytes:
    """PNG bytes of a PIL image: lossless, so that the pixels stay the data set's."""
    from PIL.Image import Image  # slow import

    if not isinstance(image, Image):
        raise _bad(pid, "image", f"is {type(image).__name__}, not an image")
    buffer = BytesIO()
    fits = image.mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I", "I;16")  # PNG has no other
    (image if fits else image.convert("RGB")).save(buffer, format="PNG")
    return buffer.getvalue()


def _parts(available: Iterable[str], split: str, source: str | Path) -> list[str]:
    """Name the stored splits that make up `split`."""
    there = list(available)
    parts = ["train", "val"] if split == "trainval" and split not in there else [split]
    if not set(parts) <= set(there):
        raise UsageError(
            f"{source} has no split {split!r}", hint=f"splits there: {', '.join(there) or 'none'}"
        )
    return parts


def _check_complete(questions: list[Question], source: str | Path) -> None:
    seen: set[str] = set()
    for question in questions:
        if question.gold is None:
            raise _bad(question.id, "answer", "is missing")
        if question.id in seen:
            raise ArtifactError(f"{source}: pid {question.id} is listed twice in one split")
        seen.add(question.id)


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(f"cannot read {path}: {error}", hint=LAYOUT_HINT) from error
    if not isinstance(value, dict):
        raise ArtifactError(f"{path} is not a JSON object", hint=LAYOUT_HINT)
    return value


def _from_original(folder: Path, split: str) -> list[Question]:
    problems, splits = _json(folder / "problems.json"), _json(folder / "pid_splits.json")
    images = folder / "images"  # may be absent: text questions and scoring do not need it
    if images.exists() and not images.is_dir():
        raise ArtifactError(f"{images} is not a folder", hint=LAYOUT_HINT)
    splits = {ALIAS.get(name, name): pids for name, pids in splits.items()}
    pids: list[str] = []
    for part in _parts(splits, split, folder):
        if not isinstance(splits[part], list) or not all(isinstance(p, str) for p in splits[part]):
            raise ArtifactError(f"{folder / 'pid_splits.json'}: {part} is not a list of pid texts")
        pids += splits[part]
    for pid in pids:
        if not isinstance(problems.get(pid), dict):
            raise ArtifactError(
                f"{folder}: pid {pid} of split {split} has no record in problems.json",
                hint="problems.json and pid_splits.json must come from the same release",
            )
    return [from_row(problems[pid], pid=pid, image_root=images) for pid in pids]


def _from_splits(
    splits: Mapping[str, Iterable[Mapping[str, Any]]], split: str, source: str | Path
) -> list[Question]:
    return [
        from_row({**row, "split": part}, pid=f"{part}-{index}")
        for part in _parts(splits, split, source)
        for index, row in enumerate(splits[part])
    ]
