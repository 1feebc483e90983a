"""Controls that show whether a model looks: questions without their pictures, or with others'."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Literal

from qatbench.errors import UsageError
from qatbench.records import Question

Images = Literal["shown", "none", "shuffled"]


def with_images(questions: Sequence[Question], images: Images, seed: int = 0) -> list[Question]:
    """The questions as asked: `shown` as they are, `none` without pictures, `shuffled` swapped.

    Shuffled, every question with a picture gets that of the next one in a seeded order; the passes
    of a circular question stay together. Questions without a picture are left as they are.

    Raises: UsageError when fewer than two questions have a picture to swap.
    """
    if images == "shown":
        return list(questions)
    if images == "none":
        return [question.model_copy(update={"image": None}) for question in questions]
    pictures = {_key(question): question.image for question in questions if question.has_image}
    if len(pictures) < 2:
        raise UsageError("shuffled pictures need at least two questions with one")
    keys = sorted(pictures)
    random.Random(f"{seed}/images").shuffle(keys)
    taken = {key: pictures[keys[i - 1]] for i, key in enumerate(keys)}
    return [
        question.model_copy(update={"image": taken[_key(question)]})
        if question.has_image
        else question
        for question in questions
    ]


def _key(question: Question) -> tuple[str, str]:
    return question.task, question.group or question.id
