"""Controls that show whether a model looks: questions without their pictures, or with others'."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from qatbench.errors import UsageError
from qatbench.records import Question

Images = Literal["shown", "none", "shuffled"]


def with_images(questions: Sequence[Question], images: Images, seed: int = 0) -> list[Question]:
    """The questions as asked: `shown` as they are, `none` without pictures, `shuffled` swapped.

    Shuffled, every picture is replaced by the next one of the different pictures in a seeded
    order; questions that shared one share the other. Questions without are left as they are.

    Raises: UsageError when there are fewer than two different pictures.
    """
    if images == "shown":
        return list(questions)
    if images == "none":
        return [question.model_copy(update={"image": None}) for question in questions]
    keys = [_key(question.image) for question in questions]
    pictures = {key: q.image for key, q in zip(keys, questions, strict=True) if key is not None}
    if len(pictures) < 2:
        raise UsageError("shuffled pictures need at least two different ones")
    order = sorted(pictures)
    random.Random(f"{seed}/images").shuffle(order)
    taken = {key: pictures[order[i - 1]] for i, key in enumerate(order)}
    return [
        question if key is None else question.model_copy(update={"image": taken[key]})
        for key, question in zip(keys, questions, strict=True)
    ]


def _key(image: Path | bytes | None) -> str | None:
    """What tells pictures apart: their bytes, or the name of a file that is not there."""
    if image is None:
        return None
    if isinstance(image, Path):
        if not image.is_file():
            return f"missing {image.as_posix()}"
        image = image.read_bytes()
    return hashlib.sha256(image).hexdigest()
