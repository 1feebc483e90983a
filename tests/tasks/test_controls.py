"""Controls: the same questions without their pictures, or with others'."""

from __future__ import annotations

import pytest

from qatbench.errors import UsageError
from qatbench.records import Question
from qatbench.tasks.controls import with_images


def asked(number: int, image: bytes | None, group: str | None = None) -> Question:
    options = {"A": "yes", "B": "no"}
    name = f"{number}"
    return Question(
        id=name, task="mmbench", text="?", options=options, gold="A", image=image, group=group
    )


QUESTIONS = [
    asked(1, b"one", "1"), asked(2, b"two", "2"), asked(3, b"three", "3"), asked(4, None),
    asked(1_000_001, b"one", "1"),
]  # fmt: skip


def test_shown_questions_are_as_they_were() -> None:
    assert with_images(QUESTIONS, "shown") == QUESTIONS


def test_none_takes_every_picture_and_nothing_else() -> None:
    bare = with_images(QUESTIONS, "none")
    assert not any(question.has_image for question in bare)
    assert [q.model_copy(update={"image": None}) for q in QUESTIONS] == bare


def test_shuffled_gives_every_question_another_picture_and_passes_the_same() -> None:
    for seed in range(20):
        swapped = with_images(QUESTIONS, "shuffled", seed)
        for before, after in zip(QUESTIONS, swapped, strict=True):
            assert before.has_image == after.has_image
            assert before.image is None or after.image != before.image
        assert swapped[0].image == swapped[4].image
        assert {q.image for q in swapped[:3]} == {b"one", b"two", b"three"}
    orders = {tuple(q.image for q in with_images(QUESTIONS, "shuffled", s)) for s in range(20)}
    assert len(orders) == 2  # both ways round


def test_equal_pictures_are_one_picture() -> None:
    rows = [asked(1, b"same"), asked(2, b"same"), asked(3, b"other")]
    swapped = [question.image for question in with_images(rows, "shuffled")]
    assert swapped == [b"other", b"other", b"same"]
    with pytest.raises(UsageError, match="two different"):
        with_images(rows[:2], "shuffled")


def test_one_picture_cannot_be_shuffled() -> None:
    with pytest.raises(UsageError, match="two different"):
        with_images(QUESTIONS[3:], "shuffled")
