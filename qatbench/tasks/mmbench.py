"""MMBench (Liu et al., arXiv:2307.06281): one row -> Question, one split -> list of rows.

Every pass of CircularEval is a row of its own, with its options already in their order: a row's
index is question + pass * 10^6. Sources are a TSV in the original columns, parquet files in the
schema of lmms-lab/MMBench, and a hub id with an optional configuration ("owner/name[/cn]").
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from qatbench.errors import ArtifactError, PrerequisiteError, UsageError
from qatbench.records import LETTERS, Question
from qatbench.tasks.parquet import parquet_files, parquet_rows
from qatbench.tasks.scienceqa import Subset, part
from qatbench.tasks.tables import text_rows

SHAREABLE = False  # third-party texts and images, for research: not passed on with our results

_PASS = 1_000_000  # index = question + pass * _PASS
_LONGEST_INDEX = 64  # an image cell of at most so many characters is the index of another row
ALIAS = {"val": "dev", "validation": "dev"}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(/[a-z]+)?")
_LAYOUT_HINT = (
    "give a TSV with the columns index, question, A, B, answer and image, a folder that holds "
    "one, a folder of parquet files, or a hub id such as lmms-lab/MMBench"
)


class Images(NamedTuple):
    """Where a row's image may come from besides its own cell."""

    cells: Mapping[str, Any]  # image cell by row index, of the whole file
    held: dict[bytes, bytes]  # each different image once: files repeat them in every pass

    @classmethod
    def of(cls, rows: Iterable[Mapping[str, Any]]) -> Images:
        """The image cells of a file's rows."""
        return cls({_index_text(row): row.get("image") for row in rows}, {})


def from_row(row: Mapping[str, Any]) -> Question:
    """Make a Question from one raw row: column -> cell, None for an empty one.

    "nan" stands for a missing hint, and in the hub's schema (known by its `L2-category`) for a
    missing option; elsewhere it is a text. A row without an answer can be asked, not scored.

    Raises: ArtifactError if a cell is missing or unusable, or the image is that of another row; it
        names row and column, and holds no text of the row.
    """
    return question(row, f"MMBench row {_index_text(row)}", Images({}, {}))


def load(source: str | Path, split: str, *, subset: Subset = "all") -> list[Question]:
    """Read one split, all circular passes included, in the order of its file.

    `source` is a TSV, a folder with one TSV or one a split (`mmbench_dev.tsv`), a parquet file or
    a folder of them, or a hub id if no such path exists. A TSV tells its splits in the column
    `split`, else by its name. `dev`, `val` and `validation` are one split. `subset` keeps all
    rows, those without an image, or those with one.

    Raises: PrerequisiteError if nothing is at `source` or the hub cannot be reached; UsageError if
        there is no such split, it has no answers, or none of its rows is in `subset`;
        ArtifactError if the data are damaged.
    """
    split = ALIAS.get(split, split)
    questions = read(source, split)
    _check_complete(questions, source, split)
    return part(questions, source, split, subset)


def splits(path: Path) -> list[str]:
    """The splits that a TSV, a parquet file or a folder of them names; one that names none is dev.

    Raises: ArtifactError if the data are damaged.
    """
    if path.is_dir() or path.suffix == ".parquet":
        files = parquet_files(path, "mmbench") if path.is_dir() else [path]
        return list(dict.fromkeys(filter(None, map(_named_split, files))))
    stated = {ALIAS.get(row.get("split", ""), row.get("split")) for row in read_table(path)}
    return sorted(filter(None, stated)) or [_named_split(path) or "dev"]


def read(source: str | Path, split: str) -> list[Question]:
    """`load` of all rows, be they answered or not, and whether an index is there twice.

    Raises: as `load`.
    """
    split = ALIAS.get(split, split)
    path = Path(source)
    if path.exists():
        file = _tsv_file(path, split)
        return _from_tsv(file, split) if file else _from_parquet(path, split, source)
    if isinstance(source, str) and _HUB_ID.fullmatch(source):
        return _from_parquet(_hub_folder(source, split), split, source)
    raise PrerequisiteError(f"no MMBench data at {source}", hint=_LAYOUT_HINT)


# --- one row ------------------------------------------------------------------------------------


def question(row: Mapping[str, Any], where: str, images: Images) -> Question:
    """`from_row`, with what messages call the row, and the images of its file."""
    index = _index(row, where)
    if (text := _cell(row, "question", where)) is None:
        raise _bad(where, "question", "is missing")
    options = _options(row, where)
    gold = _cell(row, "answer", where)
    if gold is not None and gold not in options:
        raise _bad(where, "answer", "is not the letter of an option of this row")
    hint = _cell(row, "hint", where) or ""
    return Question(
        id=str(index),
        task="mmbench",
        text=text,
        options=options,
        gold=gold,
        hint="" if hint == "nan" else hint,
        image=_image(row, where, images),
        split=_cell(row, "split", where),
        category=_cell(row, "category", where),
        l2_category=_cell(row, "l2-category", where) or _cell(row, "L2-category", where),
        group=str(index % _PASS),
        circular_pass=index // _PASS,
    )


def _bad(where: str, field: str, why: str) -> ArtifactError:
    return ArtifactError(f"{where}: {field} {why}", hint="get the data again, or repair this row")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _is_empty(cell: object) -> bool:
    return cell is None or cell == "" or (isinstance(cell, float) and cell != cell)  # pandas' NaN


def _cell(row: Mapping[str, Any], field: str, where: str) -> str | None:
    cell = row.get(field)
    if _is_empty(cell):
        return None
    if not isinstance(cell, str):
        raise _bad(where, field, f"is {type(cell).__name__}, not text")
    return cell


def _index(row: Mapping[str, Any], where: str) -> int:
    if (text := _index_text(row)) == "?":
        raise _bad(where, "index", "is missing or not a whole number")
    return int(text)


def _index_text(row: Mapping[str, Any]) -> str:
    """The index for a message; a cell that is none may hold text of the row, and is not shown."""
    text = str(row.get("index"))
    return str(int(text)) if re.fullmatch("[0-9]+", text) else "?"


def _options(row: Mapping[str, Any], where: str) -> dict[str, str]:
    options = {letter: _cell(row, letter, where) for letter in LETTERS}
    missing = "nan" if "L2-category" in row else None
    present = {letter: text for letter, text in options.items() if text and text != missing}
    if len(present) < 2:
        raise _bad(where, "options", "are fewer than two")
    return present


def _image(row: Mapping[str, Any], where: str, images: Images) -> bytes | None:
    """Find the encoded image; an empty cell is a question without one."""
    cell = row.get("image")
    if isinstance(cell, str) and 0 < len(cell) <= _LONGEST_INDEX:
        if not re.fullmatch("[0-9]+", cell):
            raise _bad(where, "image", "is neither an image nor the index of a row")
        source = images.cells.get(str(int(cell)))
        if _is_empty(source) or (isinstance(source, str) and len(source) <= _LONGEST_INDEX):
            raise _bad(where, "image", f"is that of row {cell}, which is not there or has none")
        cell = source
    if _is_empty(cell):
        return None
    if isinstance(cell, str):
        try:
            cell = base64.b64decode(cell, validate=True)
        except ValueError as error:
            raise _bad(where, "image", "is not base64: it is cut or damaged") from error
    elif isinstance(cell, Mapping):  # the hub's, with the path it once had
        cell = cell.get("bytes")
    if not isinstance(cell, bytes) or not cell:
        raise _bad(where, "image", f"is {type(cell).__name__}, not an encoded image")
    return images.held.setdefault(cell, cell)


# --- a split ------------------------------------------------------------------------------------


def _check_complete(questions: list[Question], source: str | Path, split: str) -> None:
    if questions and all(question.gold is None for question in questions):
        raise UsageError(
            f"split {split} of {source} has no answers: it cannot be scored here",
            hint="public answers: dev, that is --task mmbench:dev",
        )
    seen: set[str] = set()
    for question in questions:
        where = f"{source}, row with index {question.id}"
        if question.gold is None:
            raise _bad(where, "answer", "is missing")
        if question.id in seen:
            raise _bad(where, "index", "is there twice")
        seen.add(question.id)


def _no_split(source: str | Path, split: str, there: Iterable[str | None]) -> UsageError:
    known = ", ".join(dict.fromkeys(name for name in there if name))
    return UsageError(f"{source} has no split {split!r}", hint=f"splits there: {known or 'none'}")


def _named_split(file: Path) -> str | None:
    """The split that a file's name tells (`mmbench_dev_en_20231003`, `MMBench_DEV_EN`)."""
    parts = (ALIAS.get(part, part) for part in re.split("[^a-z]+", file.stem.lower()))
    return next((part for part in parts if part in ("train", "dev", "test")), None)


def _tsv_file(path: Path, split: str) -> Path | None:
    """Find the TSV that holds `split`; None if `path` is or has none."""
    if not path.is_dir():
        return None if path.suffix == ".parquet" else path
    if (plain := path / f"mmbench_{split}.tsv").is_file():
        return plain
    files = sorted(path.glob("*.tsv"))
    fitting = [file for file in files if len(files) == 1 or _named_split(file) == split]
    if files and not fitting:
        raise _no_split(path, split, map(_named_split, files))
    if len(fitting) > 1:
        raise UsageError(
            f"{path} has several files of split {split}: {', '.join(f.name for f in fitting)}",
            hint=f"name one of them: --data mmbench={fitting[0]}",
        )
    return fitting[0] if fitting else None


def _from_tsv(file: Path, split: str) -> list[Question]:
    rows = read_table(file)
    stated = [ALIAS.get(row.get("split", ""), row.get("split")) for row in rows]
    if not any(stated):  # a file that names no split is the one that is asked for
        stated = [_named_split(file) or split] * len(rows)
    if split not in stated:
        raise _no_split(file, split, stated)
    images = Images.of(rows)
    questions = []
    for n, (row, its_split) in enumerate(zip(rows, stated, strict=True), start=1):
        where = f"{file}, row {n} (index {_index_text(row)})"
        if not its_split:
            raise _bad(where, "split", "is missing: the row may be cut")
        if its_split == split:
            questions.append(question(row, where, images))
    return questions


def read_table(
    file: Path, needed: Sequence[str] = ("index", "question", "A", "B")
) -> list[dict[str, str]]:
    """Rows of a TSV or CSV as pandas splits them, but every cell as its text: "NA" is an option.

    Raises: ArtifactError when it cannot be read, or lacks a column that is needed.
    """
    separator = "," if file.suffix == ".csv" else "\t"
    return text_rows(file, separator, file, _LAYOUT_HINT, needed)


# --- parquet and the hub ------------------------------------------------------------------------


def _from_parquet(path: Path, split: str, source: str | Path) -> list[Question]:
    files = [path] if path.is_file() else parquet_files(path, "mmbench")
    if not files:
        raise ArtifactError(f"{source} holds no MMBench data", hint=_LAYOUT_HINT)
    if split not in map(_named_split, files):
        raise _no_split(source, split, map(_named_split, files))
    images = Images({}, {})
    return [
        question({**row, "split": split}, f"{file}, row {n} (index {_index_text(row)})", images)
        for file in files
        if _named_split(file) == split
        for n, row in enumerate(parquet_rows([file], _LAYOUT_HINT), start=1)
    ]


def _hub_folder(name: str, split: str) -> Path:
    """Folder of one configuration's parquet files of a split, downloaded or from the cache."""
    from huggingface_hub import snapshot_download

    owner, repository, part = [*name.split("/"), "en"][:3]
    try:
        folder = snapshot_download(
            f"{owner}/{repository}", repo_type="dataset", allow_patterns=f"{part}/{split}-*.parquet"
        )
    except Exception as error:
        raise PrerequisiteError(
            f"cannot load {name} from the hub: {type(error).__name__}: {_one_line(error)}",
            hint="check the network, set HF_HUB_OFFLINE=1 to use a cached copy, or " + _LAYOUT_HINT,
        ) from error
    return Path(folder) / part
