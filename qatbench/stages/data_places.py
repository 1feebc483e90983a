"""Where data lie: `[TASK=]PATH` -> the places that can be looked at, one a file or folder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from qatbench.errors import UsageError
from qatbench.tasks import own, selector

OWN = "own questions"
HERE = Path("data")  # where `data fetch` puts them, a folder a task
_FETCH = "qatbench data fetch gets it"


@dataclass(frozen=True)
class Place:
    """One copy of one data set; `known`: it can be held against the published figures."""

    task: str
    path: Path
    given: str  # as the command line names it
    known: bool = True
    absent: str | None = None  # why nothing can be looked at

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.task} {self.path}"

    @property
    def root(self) -> Path:
        """The folder that file names are relative to."""
        return self.path.parent if self.path.is_file() else self.path

    def files(self) -> list[Path]:
        """The files that hold the rows, images of their own apart."""
        if self.path.is_file():
            return [self.path]
        names = [self.path / "problems.json", self.path / "pid_splits.json"]
        found = [file for file in names if file.is_file()]
        return found or sorted([*self.path.glob("*.parquet"), *self.path.glob("data/*.parquet")])


def places(given: Sequence[str] | None) -> list[Place]:
    """The places that `[TASK=]PATH` name; without any, what `data fetch` put below ./data.

    A folder is looked into: for a benchmark's own files, and for a folder of each task.

    Raises: UsageError for an unknown task, or a folder that does not hold what it is said to hold.
    """
    found = []
    for text in given or [str(HERE)]:
        task, sign, path = text.partition("=")
        if sign and task in selector.TASKS:
            only: str | None = task
        elif sign and not Path(text).exists():
            raise UsageError(
                f"--data {text}: no task {task!r}", hint=f"tasks: {', '.join(selector.TASKS)}"
            )
        else:
            only, path = None, text
        found += _found(path, only)
    return found


def _found(path: str, only: str | None) -> list[Place]:
    known = path not in selector.BUILT_IN
    folder = Path(path) if known else import_module("qatbench.mini").folder(path)
    if not folder.exists():
        hint = f"; if it is a hub id, {_FETCH}" if selector.on_the_hub(path) else ""
        why = f"{path} is not here{hint}"
        return [Place(only or "data", folder, path, known, absent=why)]
    inside = [Place(task, at, path, known and not _drawn(at)) for task, at in _looked(folder)]
    if not inside:
        for task in selector.TASKS:
            if (folder / task).is_dir():
                below = [(name, at) for name, at in _looked(folder / task) if name == task]
                inside += [Place(name, at, path, known and not _drawn(at)) for name, at in below]
    if only:
        inside = [place for place in inside if place.task == only] or _said(folder, only, path)
    return inside or [Place("data", folder, path, absent=f"{path} holds no data that are known")]


def _said(folder: Path, task: str, path: str) -> list[Place]:
    """A file that is said to be of a task, whatever it looks like."""
    return [Place(task, folder, path)] if folder.is_file() else []


def _looked(path: Path) -> Iterator[tuple[str, Path]]:
    """(task, path) of what is right here."""
    if path.is_file():
        if path.suffix == ".parquet":
            yield from ((task, path) for task in _columns(path))
        elif path.suffix in own.SUFFIXES:
            yield (OWN if path.suffix != ".tsv" or not _is_mmbench(path) else "mmbench"), path
        return
    if (path / "problems.json").is_file():
        yield "scienceqa", path
    yield from (("mmbench", file) for file in sorted(path.glob("*.tsv")))
    for folder in (path, *sorted(part for part in path.iterdir() if part.is_dir())):
        files = sorted(folder.glob("*.parquet"))
        if files:
            at = path if folder.name == "data" else folder
            yield from ((task, at) for task in _columns(files[0]))


def _is_mmbench(path: Path) -> bool:
    """A TSV that says of which release it is; others are a user's own."""
    name = path.stem.lower()
    return "mmbench" in name or "ccbench" in name


def _columns(file: Path) -> list[str]:
    """The task of a parquet file, by its columns; of a damaged one both, which tell why."""
    import pyarrow
    import pyarrow.parquet

    try:
        names = set(pyarrow.parquet.read_schema(file).names)
    except (pyarrow.ArrowException, OSError):
        return ["mmbench" if file.parent.name in ("en", "cn", "cc") else "scienceqa"]
    return ["scienceqa"] if "choices" in names else ["mmbench"] if {"index", "A"} <= names else []


def _drawn(path: Path) -> bool:
    """Whether `qatbench mini build` wrote this folder: the published figures are not its own."""
    folder = path.parent if path.is_file() else path
    mark = folder / "LICENSE"
    return mark.is_file() and "drawn benchmark" in mark.read_text(
        encoding="utf-8", errors="replace"
    )
