"""data fetch: the parquet files of a benchmark, from the hub into a folder."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from qatbench import store
from qatbench.errors import PrerequisiteError, UsageError
from qatbench.stages.common import Progress
from qatbench.tasks import parquet, selector

Download = Callable[[str, Path, list[str]], object]
"""Called as download(repository, folder, patterns): puts the files that fit there."""


def fetch(
    task: str,
    source: str | None,
    to: Path,
    *,
    progress: Progress,
    download: Download | None = None,
    reach: Callable[[], None] = parquet.reach,
) -> Path:
    """Get the data; what was cut off goes on. Returns the folder for `--data`.

    `source` is a hub id "owner/name[/CONFIGURATION]", by default the task's own. Files are gathered
    beside `to` and renamed: a reader sees all of them or none.

    Raises: UsageError for another form of `source`, or a folder that holds something;
        PrerequisiteError when the hub does not have them or cannot be reached.
    """
    source = source or selector.TASKS[task].default_source or ""
    if not parquet.HUB_ID.fullmatch(source):
        raise UsageError(f"{source!r} is no hub id", hint="owner/name or owner/name/CONFIGURATION")
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise UsageError(
            f"{to} exists and holds something", hint=f"qatbench data check --data {task}={to}"
        )
    repository, part = _parts(task, source)
    patterns = [f"{part}/*.parquet"] if part else ["data/*.parquet", "*.parquet"]
    by_hand = f"hf download {repository} --repo-type dataset --include '{patterns[0]}'"
    hint = f"where the hub can be reached: {by_hand} --local-dir {to}; then --data {task}={to}"
    partial = to.with_name(f"{to.name}.partial")
    try:
        reach()
    except PrerequisiteError as error:
        raise PrerequisiteError(f"cannot fetch {source}: {error.message}", hint=hint) from error
    with store.locked(to):
        try:
            progress(f"Fetching {source}", 0, 0)
            (download or _snapshot)(repository, partial, patterns)
        except Exception as error:
            told = " ".join(str(error).split())
            raise PrerequisiteError(
                f"cannot fetch {source}: {type(error).__name__}: {told}", hint=hint
            ) from error
        if not any(partial.glob("**/*.parquet")):
            shutil.rmtree(partial, ignore_errors=True)
            raise PrerequisiteError(f"{source} has no parquet files at {patterns[0]}", hint=hint)
        shutil.rmtree(partial / ".cache", ignore_errors=True)  # the client's own notes
        if to.exists():
            to.rmdir()
        partial.rename(to)
    return to


def _parts(task: str, source: str) -> tuple[str, str]:
    """(repository, folder of the configuration); "" where there is one alone."""
    owner, name, *part = source.split("/")
    repository = f"{owner}/{name}"
    known = "en" if task == "mmbench" else parquet.WHOLE.get(repository, "")
    return repository, part[0] if part else known


def _snapshot(repository: str, folder: Path, patterns: list[str]) -> None:
    from huggingface_hub import snapshot_download

    snapshot_download(repository, repo_type="dataset", local_dir=folder, allow_patterns=patterns)
