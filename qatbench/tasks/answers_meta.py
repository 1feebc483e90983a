"""What a prediction keeps of its question: enough for every breakdown, and no text."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from qatbench.records import Question


def meta_of(question: Question, *, circular: bool) -> dict[str, Any]:
    """Fields of `Prediction.meta`, those that are known.

    Rows with one `group` count as one question, with one `pass_of` (not `circular`) they do not.
    """
    alone = question.group is None
    meta = {
        "subject": question.subject,
        "category": question.category,
        "l2_category": question.l2_category,
        "grade": question.grade,
        "skill": question.skill,
        "has_image": question.has_image,
        "image": _digest(question.image),
        "has_hint": bool(question.hint) if alone else None,
        "group" if circular else "pass_of": question.group,
        "circular_pass": None if alone else question.circular_pass,
    }
    return {key: value for key, value in meta.items() if value is not None}


def _digest(image: Path | bytes | None) -> str | None:
    """What tells pictures apart, without showing them; None for one that is not there."""
    if isinstance(image, Path):
        image = image.read_bytes() if image.is_file() else None
    return None if image is None else hashlib.sha256(image).hexdigest()[:12]
