from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from qatbench.errors import UsageError
from qatbench.records import Question
from qatbench.tasks import selector
from qatbench.tasks.selector import Selector


def ask(number: int, **changes: object) -> Question:
    fields = {"id": str(number), "task": "scienceqa", "text": f"Question {number}?", "gold": "A"}
    return Question(**(fields | {"options": {"A": "yes", "B": "no"}} | changes))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("scienceqa", Selector("scienceqa", "test", "all")),
        ("scienceqa:train", Selector("scienceqa", "train", "all")),
        ("scienceqa:test:image", Selector("scienceqa", "test", "image")),
        ("scienceqa:val:all", Selector("scienceqa", "val", "all")),
    ],
)
def test_parse(text: str, expected: Selector) -> None:
    assert selector.parse(text) == expected
    assert selector.parse(str(expected)) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "mnist",
        "ScienceQA:test",
        ":test",
        "scienceqa:",
        "scienceqa::text",
        "scienceqa:test:",
        "scienceqa: test",
        "scienceqa:test:both",
        "scienceqa:test:all:x",
    ],
)
def test_anything_else_is_a_usage_error(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        selector.parse(text)
    assert caught.value.hint


def test_load_goes_to_the_given_the_built_in_or_the_usual_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[object] = []

    def fake(source: object, split: str, *, subset: str) -> list[Question]:
        asked.append((source, split, subset))
        return [ask(1)]

    import qatbench.mini

    monkeypatch.setattr(qatbench.mini, "folder", lambda name: Path("built-in"), raising=False)
    monkeypatch.setitem(selector.TASKS, "scienceqa", selector.Task(fake, "owner/name", False))
    chosen = Selector("scienceqa", "val", "text")

    assert selector.load(chosen, {"scienceqa": "/data/sqa"}) == [ask(1)]
    selector.load(chosen, {"scienceqa": "mini-text"})
    selector.load(chosen, {})

    places = ["/data/sqa", Path("built-in"), "owner/name"]
    assert asked == [(place, "val", "text") for place in places]


def test_a_task_without_a_usual_place_asks_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(selector.TASKS, "scienceqa", selector.Task(lambda: [], None, False))
    with pytest.raises(UsageError, match="scienceqa"):
        selector.load(Selector("scienceqa"), {})


def test_only_the_built_in_benchmark_is_shareable() -> None:
    assert selector.shareable("scienceqa", "mini-text")
    assert not selector.shareable("scienceqa", "/data/sqa")
    assert not selector.shareable("scienceqa", None)


# --- digest -------------------------------------------------------------------------------------


def test_a_digest_is_stable() -> None:
    assert selector.digest([]) == (  # SHA-256 of nothing
        "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    )
    assert selector.digest([ask(1), ask(2)]) == selector.digest([ask(1), ask(2)])


@pytest.mark.parametrize(
    "changes",
    [
        {"id": "9"},
        {"text": "Question 2"},
        {"options": {"B": "no", "A": "yes"}},
        {"options": {"A": "yes", "B": "no", "C": ""}},
        {"gold": "B"},
        {"gold": None},
        {"hint": "h"},
        {"image": b"x"},
        {"image": Path("images/test/2/image.png")},
    ],
)
def test_a_digest_sees_every_part(changes: dict[str, object]) -> None:
    assert selector.digest([ask(1), ask(2, **changes)]) != selector.digest([ask(1), ask(2)])


def test_a_digest_sees_the_order() -> None:
    assert selector.digest([ask(1), ask(2)]) != selector.digest([ask(2), ask(1)])


def test_an_image_counts_by_its_bytes_and_a_missing_one_by_its_name(tmp_path: Path) -> None:
    here, gone = tmp_path / "test/2/image.png", tmp_path / "test/3/image.png"
    here.parent.mkdir(parents=True)
    here.write_bytes(b"pixels")

    in_file, in_record = ask(2, image=here), ask(2, image=b"pixels")

    assert selector.digest([in_file]) == selector.digest([in_record])
    moved = ask(3, image=Path("elsewhere/test/3/image.png"))
    assert selector.digest([ask(3, image=gone)]) == selector.digest([moved])
    assert selector.digest([ask(3, image=gone)]) != selector.digest([ask(3, image=here)])


# --- limit --------------------------------------------------------------------------------------


def test_a_limit_is_a_seeded_choice_in_the_order_of_the_file() -> None:
    questions = [ask(n) for n in range(50)]

    got = [int(q.id) for q in selector.limit(questions, 10)]

    assert got == sorted(got)
    assert len(got) == 10
    assert got != list(range(10))
    assert got == [int(q.id) for q in selector.limit(questions, 10, seed=0)]
    assert got != [int(q.id) for q in selector.limit(questions, 10, seed=1)]
    assert set(got) < {int(q.id) for q in selector.limit(questions, 20)}
    assert selector.limit(questions, 99) == questions


def test_a_circular_question_counts_once_with_all_its_passes() -> None:
    questions = [
        ask(n * 100 + g, group=str(g), circular_pass=n) for n in range(4) for g in range(9)
    ]
    questions.append(ask(3))  # same id text as a group: still a question of its own

    got = selector.limit(questions, 5)

    groups = {q.group for q in got}
    assert len(groups) == 5
    assert got == [q for q in questions if q.group in groups]


@pytest.mark.parametrize("n", [0, -3])
def test_a_limit_below_one_is_a_usage_error(n: int) -> None:
    with pytest.raises(UsageError):
        selector.limit([ask(1)], n)


# --- folds --------------------------------------------------------------------------------------


def test_folds_are_disjoint_even_and_cover_all() -> None:
    questions = [ask(n) for n in range(23)]

    got = selector.folds(questions, 4, seed=5)

    assert sorted(int(q.id) for fold in got for q in fold) == list(range(23))
    assert sorted(len(fold) for fold in got) == [5, 6, 6, 6]
    assert all([int(q.id) for q in fold] == sorted(int(q.id) for q in fold) for fold in got)
    assert got == selector.folds(questions, 4, seed=5)
    assert got != selector.folds(questions, 4, seed=6)


def test_questions_with_the_same_text_stay_in_one_fold() -> None:
    spellings: list[Callable[[str], str]] = [str, str.upper, lambda text: f"  {text} \n"]
    questions = [
        ask(10 * n + k, text=spell(f"Which is {n}?"), hint=spell("Look."))
        for n in range(8)
        for k, spell in enumerate(spellings)
    ]
    questions.append(ask(99, text="Which is 0?", hint="Another hint."))

    fold_of = {q.id: index for index, fold in enumerate(selector.folds(questions, 3)) for q in fold}

    for n in range(8):
        assert len({fold_of[str(10 * n + k)] for k in range(3)}) == 1
    assert len(fold_of) == len(questions)


@pytest.mark.parametrize("k", [-1, 0, 1, 4])
def test_an_impossible_number_of_folds_is_a_usage_error(k: int) -> None:
    with pytest.raises(UsageError, match="cannot make"):
        selector.folds([ask(1), ask(2), ask(3), ask(4, text="Question 3?")], k)
