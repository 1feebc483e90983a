"""The stream of several sources: exact shares everywhere, from (seed, position) alone."""

from __future__ import annotations

import random
from collections import Counter
from fractions import Fraction
from pathlib import Path

import pytest

from qatbench.errors import ArtifactError, UsageError
from qatbench.records import Question
from qatbench.tasks import selector
from qatbench.tasks.conversations import Conversation, Turn
from qatbench.tasks.sources import Source, digest, order, shares


def question(i: int, gold: str | None = "A") -> Question:
    return Question(id=str(i), task="t", text=f"Q{i}?", options={"A": "a", "B": "b"}, gold=gold)


def conversation(i: int, answer: str = "a", images: tuple[Path, ...] = ()) -> Conversation:
    return Conversation(str(i), (Turn(f"Q{i}?", answer),), images)


QUESTIONS = [question(i) for i in range(7)]
TALKS = [conversation(i) for i in range(5)]


def two(weight: float = 3.0) -> list[Source]:
    return [Source("questions", QUESTIONS, weight), Source("talks", TALKS, 1.0)]


def test_one_source_keeps_the_order_of_finished_results() -> None:
    stream = order([Source("any name", QUESTIONS, 0.3)], 5)
    for epoch in range(3):
        expected = list(range(7))  # as training on one list of questions has always drawn them
        random.Random(f"5/epoch-{epoch}").shuffle(expected)
        assert [stream(epoch * 7 + i).item for i in range(7)] == expected


@pytest.mark.parametrize(
    "weights",
    [
        (1, 1), (3, 1), (0.1, 0.2, 0.7), (665298, 4241), (5, 3, 2, 2, 1), (1e-3, 1, 1, 1),
        (0.123456789, 0.987654321, 0.333333333), (1, 1, 1, 1, 1, 1, 20),
        (1, 20, 20, 8, 1),  # always serving the source that is furthest behind fails here
    ],
)  # fmt: skip
def test_every_source_is_within_one_of_its_share_at_every_place(weights: tuple[float, ...]) -> None:
    sources = [Source(str(i), TALKS, w) for i, w in enumerate(weights)]
    stream, whole = order(sources, 0), shares(sources)
    count = Counter[int]()
    for place in range(3000):
        count[stream(place).source] += 1
        for i, share in enumerate(whole):
            assert abs(count[i] - Fraction((place + 1) * share, sum(whole))) < 1, (place, i)


def test_a_place_is_the_same_whatever_was_asked_before() -> None:
    ahead = order(two(0.7), 3)
    places = [ahead(i) for i in range(200)]
    for i in (199, 0, 73, 150, 74):
        assert order(two(0.7), 3)(i) == places[i]
        assert ahead(i) == places[i]
    assert [order(two(0.7), 4)(i) for i in range(200)] != places


def test_each_source_goes_through_its_own_epochs() -> None:
    stream = order(two(), 1)
    places = [stream(i) for i in range(4 * 5 * 7)]
    for source, size in ((0, 7), (1, 5)):
        mine = [place.item for place in places if place.source == source]
        epochs = [mine[i : i + size] for i in range(0, len(mine) - size + 1, size)]
        assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) > 1


def test_the_sample_in_place_of_an_unusable_one_is_of_the_same_source() -> None:
    stream = order(two(), 1)
    for position in range(40):
        drawn = [stream.instead(position, attempt) for attempt in range(20)]
        assert {place.source for place in drawn} == {stream(position).source}
        assert len({place.item for place in drawn}) > 2
        assert drawn == [order(two(), 1).instead(position, attempt) for attempt in range(20)]


def test_weights_are_read_as_they_are_written() -> None:
    assert shares([Source("a", TALKS, 0.1), Source("b", TALKS, 0.2)]) == [1, 2]
    assert shares([Source("a", TALKS, 300), Source("b", TALKS, 200)]) == [3, 2]
    assert shares([Source("a", TALKS, 0.25)]) == [1]


@pytest.mark.parametrize(
    ("sources", "why"),
    [
        ([], "at least one source"),
        ([Source("a", [])], "a is empty"),
        ([Source("a", TALKS, 0.0)], "weight 0"),
        ([Source("a", TALKS, float("nan"))], "weight nan"),
        ([Source("a", TALKS, float("inf"))], "weight inf"),
        ([Source("a", TALKS), Source("a", QUESTIONS)], "two training sources are called a"),
    ],
)
def test_sources_that_cannot_be_mixed_are_refused(sources: list[Source], why: str) -> None:
    with pytest.raises(UsageError, match=why):
        order(sources, 0)


def test_a_question_without_an_answer_is_refused() -> None:
    with pytest.raises(ArtifactError, match="question 9 has no answer"):
        order([Source("a", TALKS), Source("b", [question(9, None)])], 0)


# --- digests --------------------------------------------------------------------------------------


def test_one_source_of_questions_has_the_digest_of_its_questions() -> None:
    assert digest([Source("x", QUESTIONS, 2.0)]) == selector.digest(QUESTIONS)


def test_a_digest_tells_contents_names_shares_and_order_apart(tmp_path: Path) -> None:
    picture = tmp_path / "a" / "b" / "x.png"
    picture.parent.mkdir(parents=True)
    picture.write_bytes(b"1")
    pictured = [conversation(0, images=(picture,))]
    variants = [
        two(),
        two(2.0),
        list(reversed(two())),
        [Source("other", QUESTIONS, 3.0), Source("talks", TALKS)],
        [Source("questions", QUESTIONS[:-1], 3.0), Source("talks", TALKS)],
        [Source("questions", QUESTIONS, 3.0), Source("talks", TALKS[::-1])],
        [Source("questions", QUESTIONS, 3.0), Source("talks", [*TALKS[1:], conversation(0, "b")])],
        [Source("talks", TALKS)],
        [Source("talks", pictured)],
        [Source("talks", QUESTIONS + TALKS)],
    ]
    digests = [digest(sources) for sources in variants]
    assert len(set(digests)) == len(variants)
    assert digest(two()) == digest([Source(s.name, s.items, 2 * s.weight) for s in two()])
    before = digest([Source("talks", pictured)])
    picture.write_bytes(b"2")  # same size: content is not looked at, as the docstring says
    assert digest([Source("talks", pictured)]) == before
    picture.write_bytes(b"22")
    assert digest([Source("talks", pictured)]) != before
