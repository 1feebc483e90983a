"""Data in the Hugging Face schema -> rows: local parquet files, and the hub."""

from __future__ import annotations

import re
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from qatbench.errors import ArtifactError, PrerequisiteError, UsageError

ALIAS = {"validation": "val"}  # the hub's name -> the original one
LAYOUT_HINT = (
    "give a folder with problems.json, pid_splits.json and images/, a folder of parquet files, "
    "or a hub id such as derek-thomas/ScienceQA"
)
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
WHOLE = {"lmms-lab/ScienceQA": "ScienceQA-FULL", "lmms-lab-encoder/ScienceQA": "ScienceQA-FULL"}
_UNUSED = ("lecture", "solution")  # long, and no protocol here shows them
_SHARD = re.compile(  # older uploads have a hash at the end: test-00000-of-00001-f0e719df791966ff
    r"(?P<split>.+?)(-\d{5}-of-(?P<total>\d{5})(-[0-9a-f]{16})?)?\.parquet"
)
_REACH_TIMEOUT_S = 10.0


def parquet_files(folder: Path, task: str) -> list[Path]:
    """The parquet files of a folder: in it, under data/, or in its only configuration's folder.

    Raises: UsageError when there are several configurations.
    """
    if files := sorted(folder.glob("*.parquet")) or sorted(folder.glob("data/*.parquet")):
        return files
    parts = sorted({file.parent for file in folder.glob("*/*.parquet")})
    if len(parts) > 1:
        raise UsageError(
            f"{folder} has several configurations: {', '.join(part.name for part in parts)}",
            hint=f"name one of them: --data {task}={parts[0]}",
        )
    return sorted(parts[0].glob("*.parquet")) if parts else []


def reach() -> None:
    """Ask the hub once, briefly: its client retries for long.

    Raises: PrerequisiteError when it does not answer.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return
    try:
        urllib.request.urlopen(constants.ENDPOINT, timeout=_REACH_TIMEOUT_S).close()
    except urllib.error.HTTPError:
        pass  # it answers; the client knows better what the answer means
    except OSError as error:
        raise PrerequisiteError(f"{constants.ENDPOINT} cannot be reached: {error}") from error


def parquet_splits(source: Path) -> dict[str, Iterator[dict[str, Any]]]:
    """Rows by split of a parquet file, or of the shards in a folder; read when iterated."""
    files = parquet_files(source, "scienceqa") if source.is_dir() else [source]
    shards: dict[str, list[Path]] = {}
    totals: dict[str, int] = {}
    for file in files:
        if match := _SHARD.fullmatch(file.name):
            name = ALIAS.get(match["split"], match["split"])
            shards.setdefault(name, []).append(file)
            totals[name] = int(match["total"] or 1)
    if not shards:
        raise ArtifactError(f"{source} holds no ScienceQA data", hint=LAYOUT_HINT)
    for name, found in shards.items():
        if len(found) != totals[name]:
            raise ArtifactError(
                f"{source}: split {name} has {len(found)} of its {totals[name]} parquet files",
                hint="row indices name the questions: all files of a split are needed",
            )
    return {name: parquet_rows(found, LAYOUT_HINT) for name, found in shards.items()}


def parquet_rows(files: Iterable[Path], hint: str) -> Iterator[dict[str, Any]]:
    """Rows of these files in their order, without columns that nothing here uses.

    Raises: ArtifactError, with `hint`, when one cannot be read.
    """
    import pyarrow
    import pyarrow.parquet

    for file in files:
        try:
            table = pyarrow.parquet.ParquetFile(file)
            columns = [name for name in table.schema_arrow.names if name not in _UNUSED]
            for batch in table.iter_batches(batch_size=256, columns=columns):
                yield from batch.to_pylist()
        except (pyarrow.ArrowException, OSError) as error:
            raise ArtifactError(f"cannot read {file}: {error}", hint=hint) from error


def hub_splits(name: str) -> dict[str, Any]:
    """Rows by split of a hub data set, "owner/name[/CONFIGURATION]", downloaded or from its cache.

    Raises: PrerequisiteError when it cannot be had.
    """
    hint = "check the network, set HF_HUB_OFFLINE=1 to use a cached copy, or " + LAYOUT_HINT
    try:
        reach()
    except PrerequisiteError as error:
        raise PrerequisiteError(f"no data at {name}, and {error.message}", hint=hint) from error
    import datasets

    repository, part = "/".join(name.split("/")[:2]), "/".join(name.split("/")[2:])
    part = part or WHOLE.get(repository, "")
    try:
        loaded = datasets.load_dataset(*filter(None, (repository, part)))
    except Exception as error:
        raise PrerequisiteError(
            f"cannot load {name} from the hub: {type(error).__name__}: {error}", hint=hint
        ) from error
    splits = {}
    for split, rows in loaded.items():
        if isinstance(rows.features.get("image"), datasets.Image):  # keep the encoded bytes
            rows = rows.cast_column("image", datasets.Image(decode=False))
        splits[ALIAS.get(split, split)] = rows
    return splits
