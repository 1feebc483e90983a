"""A checkpoint folder as it lies on disk: its JSON files, tensor headers, tensors one by one.

Nothing of it is executed or unpickled, and no file outside the folder is opened.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from qatbench import store
from qatbench.errors import ArtifactError, PrerequisiteError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_SHARD = re.compile(r"-\d+(?=-of-\d+\.safetensors$)")
AGAIN = "fetch or export the checkpoint again"


@dataclass(frozen=True)
class Entry:
    """A tensor's header; `dtype` in safetensors' spelling, e.g. I32, BF16."""

    file: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Checkpoint:
    """What lies in the folder."""

    path: Path
    config: dict[str, Any]
    files: tuple[str, ...]
    """Weight files that transformers reads; all there are where it would find none."""
    entries: Mapping[str, Entry]
    index: Mapping[str, Any] | None = None
    strays: tuple[str, ...] = ()
    """Safetensors files that transformers passes over and vLLM reads."""
    unnamed: tuple[str, ...] = ()
    """Shards of the series that the index does not name: read here, by no loader."""

    def json(self, name: str) -> dict[str, Any]:
        """A JSON file of the folder, empty when it is not there.

        Raises: ArtifactError when it is not a JSON object.
        """
        return read_object(self.path / name) if (self.path / name).is_file() else {}

    def has(self, *names: str) -> bool:
        """Whether one of these files is there."""
        return any((self.path / name).is_file() for name in names)

    def tensors(self, keys: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Tensors file by file; one is in memory at a time.

        Raises: ArtifactError when a file is damaged.
        """
        wanted = list(keys)
        for file in self.files:
            here = [key for key in wanted if self.entries[key].file == file]
            if here:
                with _opened(self.path / file) as stream:
                    yield from ((key, stream.get_tensor(key)) for key in here)

    def tensor(self, key: str) -> Tensor:
        """One tensor."""
        return next(self.tensors([key]))[1]


def read(path: Path) -> Checkpoint:
    """Read a folder's JSON and tensor headers.

    Raises: PrerequisiteError when the folder or a needed file is not there; ArtifactError when
        one cannot be read, or the weights are pickled.
    """
    if not path.is_dir():
        raise PrerequisiteError(f"no folder {path}", hint="give the folder of a checkpoint")
    if (path / store.UNFINISHED).exists() and not (path / store.PROVENANCE).exists():
        raise PrerequisiteError(
            f"the checkpoint {path} is unfinished", hint="finish it with --resume first"
        )
    if not (path / "config.json").is_file():
        raise PrerequisiteError(f"no config.json in {path}", hint="is this a checkpoint folder?")
    config = read_object(path / "config.json")
    there = sorted(file.name for file in path.glob("*.safetensors"))
    index = read_object(path / INDEX) if (path / INDEX).is_file() else None
    if SINGLE in there:
        strays = tuple(name for name in there if name != SINGLE)
        return Checkpoint(path, config, (SINGLE,), _headers(path, (SINGLE,)), strays=strays)
    if index is not None:
        named = _shards(path, index, there)
        series = {_SHARD.sub("", name) for name in named}
        unnamed = [n for n in there if n not in named and _SHARD.sub("", n) in series]
        files = (*named, *unnamed)
        entries = _headers(path, files)
        return Checkpoint(path, config, files, entries, index, unnamed=tuple(unnamed))
    if not there:
        raise _no_weights(path)
    return Checkpoint(path, config, tuple(there), _headers(path, there))


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises: ArtifactError when it is none.
    """
    try:
        return store.read_json(path)
    except ArtifactError as error:
        raise ArtifactError(error.message, hint=AGAIN) from error


def _no_weights(path: Path) -> PrerequisiteError | ArtifactError:
    pickled = sorted(file.name for pattern in PICKLED for file in path.glob(pattern))
    if pickled:
        return ArtifactError(
            f"{path} holds pickled weights ({pickled[0]}), which are never opened",
            hint="convert them to safetensors where you trust them",
        )
    return PrerequisiteError(f"no safetensors weights in {path}", hint=AGAIN)


def _shards(path: Path, index: Mapping[str, Any], there: list[str]) -> tuple[str, ...]:
    named = index.get("weight_map")
    if not isinstance(named, dict) or not named or not all(map(_is_name, named.values())):
        raise ArtifactError(f"{path / INDEX} has no map of keys to files", hint=AGAIN)
    missing = sorted(set(named.values()) - set(there))
    if missing:
        raise PrerequisiteError(
            f"{path / INDEX} names {missing[0]}, which is not there"
            + (f" (nor {len(missing) - 1} more)" if len(missing) > 1 else ""),
            hint="fetch the missing shards",
        )
    return tuple(sorted(set(named.values())))


def _is_name(name: object) -> bool:
    return isinstance(name, str) and Path(name).name == name and name.endswith(".safetensors")


def _headers(path: Path, files: Iterable[str]) -> dict[str, Entry]:
    entries: dict[str, Entry] = {}
    for file in files:
        with _opened(path / file) as stream:
            for key in stream.keys():  # noqa: SIM118 - not a mapping
                part = stream.get_slice(key)
                entries[key] = Entry(file, part.get_dtype(), tuple(part.get_shape()))
    return entries


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, "pt")
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"{path} is damaged: {error}", hint=AGAIN) from error
