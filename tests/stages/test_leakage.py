"""The leakage check: planted duplicates are found, and only ids and counts come out."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from qatbench.errors import UsageError
from qatbench.mini import folder
from qatbench.records import Question
from qatbench.stages import leakage as stage
from qatbench.stages.leakage import Match, leakage
from qatbench.tasks import selector
from qatbench.tasks.conversations import Conversation, Turn


def picture(shade: int, size: tuple[int, int] = (12, 8)) -> Image.Image:
    image = Image.new("RGB", size, (shade, 10, 200))
    image.putpixel((3, 2), (0, shade, 0))
    return image


def encoded(shade: int, form: str = "PNG", size: tuple[int, int] = (12, 8)) -> bytes:
    buffer = io.BytesIO()
    picture(shade, size).save(buffer, form)
    return buffer.getvalue()


def question(name: str, text: str, hint: str = "", **more: Any) -> Question:
    options = {"A": "yes", "B": "no"}
    return Question(id=name, task="t", text=text, hint=hint, options=options, **more)


def kinds(leak: stage.Leak) -> dict[str, int]:
    return {kind: getattr(leak, kind) for kind in stage.KINDS}


NONE = {"both": 0, "image": 0, "context": 0, "text": 0}


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        (question("e", "Is  WATER\nwet?", "Look."), {"text": 1, "context": 1}),
        (question("e", "Is water wet?"), {"text": 1}),
        (question("e", "Is water wet?", "Think."), {"text": 1}),
        (question("e", "STRASSE or straße?"), {"text": 1, "context": 1}),
        (question("e", "Is water"), {}),
        (question("e", "Look. Is water wet?"), {"context": 1}),
        (question("e", "other", image=encoded(9)), {"image": 1}),
        (question("e", "Is water wet?", image=encoded(9)), {"image": 1, "text": 1}),
        (question("e", "strasse or strasse?", image=encoded(9)),
         {"image": 1, "text": 1, "context": 1, "both": 1}),
        (question("e", "strasse or strasse?", image=encoded(8)), {"text": 1, "context": 1}),
        (question("e", "other", image=encoded(9, size=(8, 12))), {}),
    ],
)  # fmt: skip
def test_texts_and_pixels_are_compared(asked: Question, found: dict[str, int]) -> None:
    train = [
        question("a", "Is water wet?", "Look."),
        question("b", "Strasse or strasse?", image=encoded(9, "BMP")),  # another file, same pixels
    ]
    assert kinds(leakage(train, [asked])) == NONE | found


def test_pixels_in_another_shape_are_another_image() -> None:
    def plain(name: str, size: tuple[int, int]) -> Question:
        buffer = io.BytesIO()
        Image.new("RGB", size, (1, 2, 3)).save(buffer, "PNG")
        return question(name, name, image=buffer.getvalue())

    train = [plain("a", (8, 12)), plain("b", (6, 16))]
    asked = [plain("e", (12, 8)), question("f", "f", image=encoded(5, size=(8, 12)))]
    assert leakage(train, asked).image == 0
    assert leakage(train, [*asked, plain("g", (8, 12))]).image == 1


def test_every_turn_and_every_line_of_a_conversation_counts(tmp_path: Path) -> None:
    picture(9).save(tmp_path / "x.png")
    turns = (
        Turn("Hello?", "Hi."),
        Turn("Is water wet?\nA. yes\nB. no\nAnswer with the letter.", "A"),
    )
    train = [Conversation("c", turns, (tmp_path / "x.png",)), Conversation("d", turns[:1])]
    asked = [
        question("plain", "is water wet?"),
        question("seen", "is water wet?", image=encoded(9)),
        question("answer", "hi."),
        question("whole", "Is water wet? A. yes B. no Answer with the letter."),
    ]
    leak = leakage(train, asked)
    assert kinds(leak) == {"text": 3, "context": 3, "image": 1, "both": 1}
    assert leak.examples == (
        Match("both", "t/seen", "c"),
        Match("context", "t/plain", "c"),
        Match("context", "t/whole", "c"),
    )


def test_a_question_without_an_image_leaks_by_its_text_alone() -> None:
    train = [question("a", "Is it red?", "Look."), question("b", "Is it blue?")]
    asked = [
        question("e", "Is it red?", "Look."),
        question("f", "Is it blue?", "Look."),  # another hint
        question("g", "Is it blue?", image=encoded(1)),
    ]
    leak = leakage(train, asked)
    assert (leak.plain, leak.context, leak.text) == (1, 2, 3)
    assert "1 of 2 without" in leak.as_lines()[0]
    assert [match.evaluated for match in leak.examples] == ["t/e", "t/f"]


def test_both_means_in_one_sample() -> None:
    train = [question("a", "Is it red?", image=encoded(1)), question("b", "?", image=encoded(2))]
    leak = leakage(train, [question("e", "Is it red?", image=encoded(2))])
    assert (leak.text, leak.image, leak.both) == (1, 1, 0)


def test_only_ids_and_counts_come_out() -> None:
    train = [question(f"a{i}", f"Secret {i}?", "Hush", image=encoded(i)) for i in range(20)]
    asked = [question(f"e{i}", f"secret {i}?", "hush", image=encoded(i)) for i in range(10, 30)]
    leak = leakage(train, asked)
    assert (leak.n_train, leak.n_eval, leak.n_images, leak.both) == (20, 20, 20, 10)
    lines = leak.as_lines()
    assert lines == [
        "Leakage check of 20 evaluation questions against 20 training samples: trained on as a"
        " whole were 10 of 20 questions with an image (text and pixels) and 0 of 0 without (hint"
        " and text); in part, 10 texts (10 with their hint) and 10 images",
        "Leakage by both, e.g. t/e10 = a10, t/e11 = a11, t/e12 = a12, t/e13 = a13, t/e14 = a14",
    ]
    assert "ecret" not in repr(leak)


def test_images_that_cannot_be_read_are_counted(tmp_path: Path) -> None:
    train = [question("a", "?", image=tmp_path / "gone.png"), question("b", "?", image=b"torn")]
    asked = [question("e", "!", image=encoded(1)[:50]), question("f", "!", image=encoded(1))]
    leak = leakage(train, asked)
    assert (leak.unreadable, leak.image, leak.n_images) == (3, 0, 2)
    assert "3 images could not be read" in leak.as_lines()[0]


def test_an_image_is_decoded_once_and_only_if_its_size_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture(1).save(tmp_path / "same.png")
    picture(1, (50, 50)).save(tmp_path / "other.png")
    decoded: list[Any] = []
    real = stage.open_rgb
    monkeypatch.setattr(stage, "open_rgb", lambda image: decoded.append(image) or real(image))
    train = [question(str(i), "?", image=tmp_path / f"{('same', 'other')[i % 2]}.png")
             for i in range(10)]  # fmt: skip
    asked = [question("e", "!", image=encoded(1))]
    assert leakage(train, asked).image == 1
    assert decoded == [encoded(1), tmp_path / "same.png"]


def test_passes_of_a_circular_question_count_once() -> None:
    passes = [question(str(i), "Is it?", group="g", circular_pass=i) for i in range(4)]
    assert leakage([question("a", "Is it?")], passes).text == 1
    same_id = [question("1", "Is it?"), question("1", "Is it?").model_copy(update={"task": "u"})]
    assert leakage([question("a", "Is it?")], same_id).text == 2


def test_nothing_to_compare_is_refused() -> None:
    for train, asked in (([], [question("e", "?")]), ([question("a", "?")], [])):
        with pytest.raises(UsageError, match="leakage"):
            leakage(train, asked)


def test_the_drawn_benchmark_has_no_question_with_its_picture_in_two_splits() -> None:
    def rows(text: str) -> list[Question]:
        source = str(folder("mini"))
        return selector.load(selector.parse(text), {"scienceqa": source})

    test = rows("scienceqa:test:image")[:300]
    leak = leakage(rows("scienceqa:train:image")[:1500], test)
    assert leak.n_images == 300
    assert (leak.both, leak.image, leak.unreadable) == (0, 0, 0)
    planted = leakage([*rows("scienceqa:train:image")[:50], test[7]], test)
    assert (planted.both, planted.image) == (1, 1)
