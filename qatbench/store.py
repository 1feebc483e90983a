"""Run folders: atomic writes, fingerprints, provenance. No torch here.

A stage works inside its run folder: `unfinished.json` says what is being made, `provenance.json`
appears last and says what was made, from what, with what. A folder that has the second is
finished; one that has only the first can be resumed by the same settings and no others.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock
from pydantic import BaseModel, ValidationError

from qatbench.errors import ArtifactError, UsageError
from qatbench.records import SCHEMA_VERSION, Prediction

PROVENANCE = "provenance.json"
UNFINISHED = "unfinished.json"
PACKAGES = (
    "qatbench", "torch", "transformers", "gptqmodel", "auto-round", "optimum", "tokenizers",
    "numpy",
)  # fmt: skip


R = TypeVar("R", bound=BaseModel)


def cache_folder() -> Path:
    """Where built-in models and data are kept: $XDG_CACHE_HOME/qatbench or ~/.cache/qatbench."""
    root = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(root) / "qatbench"


def fingerprint(spec: Mapping[str, Any]) -> str:
    """sha256 (hex, 16 digits) of a JSON-able mapping, independent of key order."""
    text = json.dumps(spec, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def file_digest(path: Path) -> str:
    """sha256 (hex) of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_text(path: Path, text: str) -> None:
    """Write a text file so that a reader sees the old one or the new one, never half."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file so that a reader sees the old one or the new one, never half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        Path(name).chmod(0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def write_json(path: Path, value: object) -> None:
    """Write indented JSON atomically, with a final newline."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Read one JSON object.

    Raises: ArtifactError when the file is not valid JSON or not an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(
            f"cannot read {path}: {error}", hint="delete the damaged file or folder and run again"
        ) from error
    if not isinstance(value, dict):
        raise ArtifactError(f"{path} does not hold a JSON object")
    return value


def read_record(kind: type[R], file: Path, hint: str) -> R:
    """Read a JSON file that holds one record.

    Raises: ArtifactError naming the first field that does not fit: it is damaged, or of a version
        that this qatbench does not write.
    """
    try:
        return kind.model_validate_json(file.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "content"
        raise ArtifactError(
            f"{file} is damaged or of another version: {where}: {first['msg']}", hint=hint
        ) from error


def predictions_file(folder: Path) -> Path:
    """The predictions of a run folder: predictions.jsonl, or what `gzip` made of it."""
    plain = folder / "predictions.jsonl"
    packed = folder / "predictions.jsonl.gz"
    return packed if packed.is_file() and not plain.is_file() else plain


def prediction_lines(path: Path) -> list[bytes]:
    """The lines of predictions.jsonl or predictions.jsonl.gz; a whole file ends with an empty one.

    Raises: ArtifactError when it cannot be read.
    """
    try:
        data = path.read_bytes()
        return (gzip.decompress(data) if path.suffix == ".gz" else data).split(b"\n")
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise ArtifactError(
            f"cannot read {path}: {reason}", hint="delete its folder and evaluate again"
        ) from error


def as_lines(rows: Iterable[Prediction]) -> str:
    """Predictions as the lines of a file."""
    return "".join(row.model_dump_json() + "\n" for row in rows)


def read_predictions(path: Path, *, torn_tail: bool = False) -> list[Prediction]:
    """Read predictions.jsonl, or predictions.jsonl.gz.

    Args:
        path: the file.
        torn_tail: drop a damaged last line (a file that was being written when it was cut off).

    Raises: ArtifactError naming file and line on any other damage.
    """
    rows: list[Prediction] = []
    lines = prediction_lines(path)
    for number, line in enumerate(lines, start=1):
        if not line and number == len(lines):
            break
        try:
            rows.append(Prediction.model_validate_json(line))
        except ValueError as error:
            if torn_tail and number == len(lines):
                break
            raise ArtifactError(
                f"damaged line {number} in {path}", hint="delete the file and evaluate again"
            ) from error
    return rows


def versions() -> dict[str, str]:
    """Installed versions of the packages that decide a number."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


class State(Enum):
    """What a stage finds in its folder."""

    NEW = "new"
    RESUME = "resume"
    DONE = "done"


@dataclass(frozen=True)
class RunFolder:
    """A stage's folder and the settings that belong to it."""

    path: Path
    stage: str
    spec: Mapping[str, Any]

    @property
    def fingerprint(self) -> str:
        """Fingerprint of stage, settings and inputs."""
        return fingerprint({"stage": self.stage, "schema": SCHEMA_VERSION, "spec": self.spec})

    def state(self) -> State:
        """Whether the folder is empty, unfinished or finished with these very settings.

        Raises: ArtifactError when it holds work of other settings (they are named); UsageError
            when it holds files that no stage wrote.
        """
        for name, state in ((PROVENANCE, State.DONE), (UNFINISHED, State.RESUME)):
            if (self.path / name).exists():
                found = read_json(self.path / name)
                if found.get("fingerprint") != self.fingerprint:
                    raise ArtifactError(
                        f"{self.path} was made with other settings: {self._differences(found)}",
                        hint="choose another folder, or delete this one to make it anew",
                    )
                return state
        if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise UsageError(
                f"{self.path} exists and holds something else", hint="choose another --out"
            )
        return State.NEW

    def begin(self, *, resume: bool) -> State:
        """Enter the folder for work; what is unfinished is continued only if `resume`.

        Raises: UsageError when the folder is unfinished or finished and `resume` is False.
        """
        state = self.state()
        if state is State.DONE and not resume:
            raise UsageError(
                f"{self.path} is already finished", hint="choose another --out, or add --resume"
            )
        if state is State.RESUME and not resume:
            raise UsageError(
                f"{self.path} is unfinished", hint="add --resume to go on, or choose another --out"
            )
        if state is State.NEW:
            self.path.mkdir(parents=True, exist_ok=True)
            write_json(
                self.path / UNFINISHED,
                {"stage": self.stage, "fingerprint": self.fingerprint, "spec": self.spec},
            )
        return state

    def finish(self, *, inputs: Mapping[str, Any], seconds: float, machine: Mapping[str, Any],
               figures: Mapping[str, Any]) -> dict[str, Any]:  # fmt: skip
        """Write provenance.json, the last file of a finished folder."""
        record = {
            "schema_version": SCHEMA_VERSION,
            "stage": self.stage,
            "fingerprint": self.fingerprint,
            "spec": dict(self.spec),
            "inputs": dict(inputs),
            "versions": versions(),
            "machine": dict(machine),
            "seconds": round(seconds, 3),
            "figures": dict(figures),
        }
        write_json(self.path / PROVENANCE, record)
        (self.path / UNFINISHED).unlink(missing_ok=True)
        return record

    def discard(self) -> None:
        """Remove the folder and all it holds."""
        shutil.rmtree(self.path, ignore_errors=True)

    def _differences(self, found: Mapping[str, Any]) -> str:
        here = json.loads(json.dumps(self.spec))  # as it would be read back
        theirs, ours = _flat(found.get("spec", {})), _flat(here)
        names = sorted(k for k in theirs.keys() | ours.keys() if theirs.get(k) != ours.get(k))
        told = [f"{k} {theirs.get(k)!r} there, {ours.get(k)!r} here" for k in names[:4]]
        if found.get("stage") != self.stage:
            told.insert(0, f"stage {found.get('stage')!r} there, {self.stage!r} here")
        return "; ".join(told) or "an older format of this tool"


def _flat(value: object, prefix: str = "") -> dict[str, object]:
    if isinstance(value, Mapping):
        items = [_flat(v, f"{prefix}{k}.") for k, v in value.items()]
        return {k: v for part in items for k, v in part.items()}
    return {prefix.rstrip("."): value}


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file beside `path`: two processes never make the same artifact at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(str(path.parent / f".{path.name}.lock")):
        yield
