"""What an evaluation leaves behind of its rows: files, or a refusal."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from qatbench import store
from qatbench.errors import ArtifactError
from qatbench.records import Prediction
from qatbench.tasks import selector


def check_errors(rows: Sequence[Prediction], allowed: float) -> None:
    """Refuse rows of which more than the share `allowed` are errors.

    Raises: ArtifactError that counts them by kind.
    """
    failed = [row for row in rows if row.status == "error"]
    if len(failed) > allowed * len(rows):
        kinds = Counter(_kind(row.error or "") for row in failed)
        told = ", ".join(f"{number} x {kind}" for kind, number in kinds.most_common())
        raise ArtifactError(
            f"{len(failed)} of {len(rows)} questions ended in an error: {told} "
            f"(first: {failed[0].id}, {failed[0].error})",
            hint="complete the data and --resume, or allow it with --max-errors; "
            "no metrics were written",
        )


def _kind(error: str) -> str:
    """An error without the name of what it was about."""
    return re.sub(r" \S*[/\d]\S*", "", error)


def write_predictions(rows: Sequence[Prediction], out: Path, paths: Mapping[str, str]) -> None:
    """predictions.jsonl; responses to data that may not be passed on go to a file of their own."""
    kept = []
    for row in rows:
        if row.raw is None or selector.shareable(row.task, paths.get(row.task)):
            kept.append(row)
        else:
            kept.append(row.model_copy(update={"raw": None}))
    if kept != list(rows):
        store.write_text(out / "responses.jsonl", store.as_lines(rows))
    store.write_text(out / "predictions.jsonl", store.as_lines(kept))
    (out / "predictions.jsonl.gz").unlink(missing_ok=True)  # of an earlier answer
