"""What a prediction keeps of its question: enough for every breakdown, and no text."""

from __future__ import annotations

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
        "has_image": question.has_image,
        "has_hint": bool(question.hint) if alone else None,
        "group" if circular else "pass_of": question.group,
        "circular_pass": None if alone else question.circular_pass,
    }
    return {key: value for key, value in meta.items() if value is not None}
