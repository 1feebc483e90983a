from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from qatbench.errors import UsageError
from qatbench.records import LETTERS, Question
from qatbench.tasks import protocols, scienceqa

NAMES = [
    "qatbench",
    "llava-sqa",
    "lmms-sqa",
    "lmms-sqa@2024-07-30",
    "lmms-sqa@2024-01",
    "grace-sqa",
    "scienceqa-official",
]
PUBLISHED = NAMES[1:]
ANIMALS = {"A": "cat", "B": "dog", "C": "caterpillar", "D": "hot dog"}


def ask(**changes: Any) -> Question:
    fields = {"id": "1", "task": "scienceqa", "text": "Which  one  barks? ", "options": ANIMALS}
    return Question(**(fields | {"hint": " Look at it. "} | changes))


def lines(file: Path) -> list[dict[str, Any]]:
    with file.open(encoding="utf-8") as handle:
        return [json.loads(line) for line in handle]


def test_the_names() -> None:
    assert set(NAMES) <= set(protocols.names())
    assert protocols.names()[0] == "qatbench"
    for name in protocols.names():
        assert protocols.get(name).name == name
        assert protocols.get(name).reason.endswith(".")


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(UsageError, match="'llava'") as caught:
        protocols.get("llava")
    assert "llava-sqa" in caught.value.hint


# --- prompts ------------------------------------------------------------------------------------

DIRECTLY = "Answer with the option's letter from the given choices directly."


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("qatbench", " Look at it. \nQuestion: Which  one  barks? \nAnswer:"),
        (
            "llava-sqa",
            "Context: Look at it. \nWhich one barks? \nA. cat\nB. dog\nC. caterpillar\nD. hot dog\n"
            + DIRECTLY,
        ),
        (
            "lmms-sqa",
            "Context:  Look at it. \nWhich  one  barks? \nA. cat\nB. dog\nC. caterpillar\n"
            "D. hot dog\n" + DIRECTLY,
        ),
        (
            "grace-sqa",
            "Context: Look at it.\nQuestion: Which  one  barks?\nOptions:\n(A) cat\n(B) dog\n"
            "(C) caterpillar\n(D) hot dog\nAnswer with only the option letter.",
        ),
        (
            "scienceqa-official",
            "Question: Which one barks? \nContext: Look at it.\n"
            "Options: (A) cat (B) dog (C) caterpillar (D) hot dog\nAnswer:",
        ),
    ],
)
def test_prompts_keep_or_clean_white_space_as_their_evaluator(name: str, expected: str) -> None:
    assert protocols.get(name).prompt(ask()) == expected


@pytest.mark.parametrize("name", NAMES)
def test_prompts_without_a_hint_do_not_mention_one(name: str) -> None:
    text = protocols.get(name).prompt(ask(hint=""))
    assert "Look" not in text
    assert ("Context: N/A" in text) == (name == "scienceqa-official")
    assert ("Context" in text) == (name == "scienceqa-official")


@pytest.mark.parametrize("name", NAMES)
def test_prompts_show_options_as_declared_and_no_image_mark(name: str) -> None:
    protocol = protocols.get(name)
    text = protocol.prompt(ask(image=b"x"))
    assert ("caterpillar" in text) == protocol.shows_options
    assert "<image>" not in text


def test_an_image_mark_in_the_data_is_dropped_for_llava() -> None:
    text = protocols.get("llava-sqa").prompt(ask(hint="", text="<image>\nWhich one?"))
    assert text.startswith("Which one?\nA. cat")


def test_llava_rendered_has_the_chat_text_and_the_mark() -> None:
    llava, braces = protocols.get("llava-sqa"), ask(hint="", text="Is {text} or {} here?")
    with_image = llava.rendered(ask(image=b"x"))
    assert with_image.startswith("A chat between a curious user and an artificial")
    assert " USER: <image>\nContext: Look" in with_image
    assert with_image.endswith("directly. ASSISTANT:")
    assert "USER: Is {text} or {} here?\nA. cat" in llava.rendered(braces)
    assert protocols.get("lmms-sqa").rendered(ask()) == protocols.get("lmms-sqa").prompt(ask())


@pytest.mark.parametrize("name", NAMES)
def test_option_mode_scores_a_word_of_its_own(name: str) -> None:
    got = [protocols.get(name).continuation(ask(), letter) for letter in ANIMALS]
    if name == "qatbench":
        assert got == [" cat", " dog", " caterpillar", " hot dog"]
    elif name == "scienceqa-official":
        assert got == [f" The answer is {letter}" for letter in ANIMALS]
    else:
        assert got == [" A", " B", " C", " D"]


# --- extraction ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("dog", "B"),
        (" Dog.\nBecause it barks.", "B"),
        ("\nHOT DOG", "D"),
        ("dog .", "B"),
        ("dog..", None),
        ("a dog", None),
        ("B", None),
        ("", None),
        (".", None),
    ],
)
def test_qatbench_reads_the_option_text(response: str, expected: str | None) -> None:
    assert protocols.get("qatbench").extract(response, ANIMALS) == expected


def test_qatbench_does_not_choose_between_equal_texts() -> None:
    extract = protocols.get("qatbench").extract
    assert extract("yes", {"A": "Yes.", "B": "yes", "C": "no"}) is None
    assert extract("no.", {"A": "Yes.", "B": "yes", "C": "no"}) == "C"
    assert extract("See you,\nJan", {"A": "See you,\nJan", "B": "so long,\nJan"}) == "A"
    assert extract("", {"A": "", "B": "x"}) is None


@pytest.mark.parametrize(
    ("response", "expected"),  # llava, lmms, lmms@2024-07-30, lmms@2024-01, grace, official
    [
        ("B", "BBBBB-"),
        ("b", "-BB-B-"),
        ("B.", "-B-BB-"),
        (" B ", "-BB-B-"),
        ("B. dog", "BB-BB-"),
        ("(B)", "----B-"),
        ("E", "------"),
        ("E. none", "------"),
        ("The answer is B.", "B---AB"),
        ("The answer is B", "----A-"),
        ("The answer is B. The answer is B.", "----A-"),
        ("The answer is Cheyenne.", "C---AC"),
        ("dog", "----D-"),
        ("", "------"),
        ("ẚ", "----A-"),
        ("?", "------"),
    ],
)
def test_published_extractors_with_their_oddities(response: str, expected: str) -> None:
    for name, letter in zip(PUBLISHED, expected, strict=True):
        got = protocols.get(name).extract(response, ANIMALS)
        assert got == (None if letter == "-" else letter), name


# --- against the original evaluators ------------------------------------------------------------


@pytest.mark.parity
def test_every_reference_vector_agrees(shared_dir: Path) -> None:
    vectors = lines(shared_dir / "fixtures/scoring/vectors.jsonl")
    checked: Counter[str] = Counter()
    wrong = []
    for vector in vectors:
        if vector["protocol"] not in PUBLISHED:
            continue
        options = dict(zip(LETTERS, vector["options"], strict=False))
        got = protocols.get(vector["protocol"]).extract(vector["response"], options)
        checked[vector["protocol"]] += 1
        if got != vector["expected_choice_or_null"]:
            wrong.append((vector["id"], got))
    assert wrong == []
    assert set(checked) == set(PUBLISHED)
    assert checked.total() == 2679


@pytest.mark.parity
def test_prompts_agree_with_the_originals(shared_dir: Path) -> None:
    labels = {"lmms-sqa format=default": "lmms-sqa", "grace-sqa": "grace-sqa"}
    checked: Counter[str] = Counter()
    for fixture in lines(shared_dir / "fixtures/scoring/prompts.jsonl"):
        if fixture["protocol"] in labels:
            row = {"split": "test", **fixture["input"]}
            question = scienceqa.from_row(row, pid="1")
            name = labels[fixture["protocol"]]
            assert protocols.get(name).prompt(question) == fixture["prompt"], fixture["id"]
            checked[name] += 1
    assert set(checked) == set(labels.values())


@pytest.mark.parity
def test_llava_prompts_agree_with_its_question_file(shared_dir: Path) -> None:
    questions = {q.id: q for q in scienceqa.load(shared_dir / "data/scienceqa", "test")}
    llava = protocols.get("llava-sqa")
    checked = 0
    for fixture in lines(shared_dir / "fixtures/scoring/prompts.jsonl"):
        if fixture["protocol"].startswith("llava-sqa"):
            question = questions[fixture["input"]["id"]]
            whole = "given to the tokenizer" in fixture["protocol"]
            got = llava.rendered(question) if whole else llava.prompt(question)
            assert got == fixture["prompt"], fixture["id"]
            checked += 1
    assert checked == 4


@pytest.mark.parity
@pytest.mark.parametrize("name", ["llava-sqa", "grace-sqa"])
def test_chosen_options_of_the_aggregate_sets(shared_dir: Path, name: str) -> None:
    extract, sets = protocols.get(name).extract, 0
    for case in lines(shared_dir / "fixtures/scoring/aggregates.jsonl"):
        if case["protocol"] != name:
            continue
        sets += 1
        for pid, response in dict(case["predictions"]).items():  # the last of several wins
            question = scienceqa.from_row(case["problems"][pid], pid=pid)
            letter = extract(response, question.options)
            index = -1 if letter is None else LETTERS.index(letter)
            assert index == case["results" if "results" in case else "pred"][pid], pid
    assert sets > 0
