"""The MMBench protocols, by hand and against what the original evaluators gave."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from qatbench.errors import UsageError
from qatbench.records import LETTERS, Question
from qatbench.tasks import mmbench, protocols, protocols_mmbench

VLMEVALKIT = ["vlmevalkit-exact", "vlmevalkit-exact@2025-08", "vlmevalkit-exact@2024-03"]
NAMES = ["llava-mmbench", "lmms-mmbench-static", "lmms-mmbench-openai", *VLMEVALKIT]
NAMES += [f"vlmevalkit-exact{tail}" for tail in ("+VERBOSE", "-via-xlsx", "-via-tsv")]
NAMES += ["grace-mmbench"]
AGGREGATES = ["vlmevalkit-exact-circular", "vlmevalkit-exact-circular@2025-08"]
AGGREGATES += ["vlmevalkit-exact-circular@2024-03", "vlmevalkit-exact-vanilla"]
AGGREGATES += ["lmms-mmbench-openai(no API)"]
ANIMALS = {"A": "cat", "B": "dog", "C": "caterpillar", "D": "hot dog"}
DIRECTLY = "Answer with the option's letter from the given choices directly."


def ask(**changes: Any) -> Question:
    fields = {"id": "7", "task": "mmbench", "text": "Which  one? ", "options": ANIMALS}
    return Question(**(fields | {"hint": " Look. ", "image": b"x"} | changes))


def lines(file: Path) -> list[dict[str, Any]]:
    with file.open(encoding="utf-8") as handle:
        return [json.loads(line) for line in handle]


def extract(name: str, response: str, options: dict[str, str]) -> str | None:
    return protocols.get(name).extract(response, options)


def test_the_names_and_what_counts_as_one_question() -> None:
    assert {*NAMES, *AGGREGATES} <= set(protocols.names())
    alone = {name for name in protocols.names() if not protocols.get(name).circular}
    dated = {f"vlmevalkit-exact-vanilla{date}" for date in ("", "@2025-08", "@2024-03")}
    assert alone == {"grace-mmbench"} | dated


# --- prompts ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "llava-mmbench",
            " Look. \nWhich  one? \nA. cat\nB. dog\nC. caterpillar\nD. hot dog\n" + DIRECTLY,
        ),
        (
            "lmms-mmbench-static",
            " Look.  Which  one?  There are several options:\nA. cat\nB. dog\nC. caterpillar\n"
            "D. hot dog\n\n" + DIRECTLY,
        ),
        (
            "vlmevalkit-exact",
            "Hint:  Look. \nQuestion: Which  one? \nOptions:\nA. cat\nB. dog\nC. caterpillar\n"
            "D. hot dog\nPlease select the correct answer from the options above. \n",
        ),
        (
            "grace-mmbench",
            "Context: Look.\nQuestion: Which  one?\nOptions:\n(A) cat\n(B) dog\n(C) caterpillar\n"
            "(D) hot dog\nAnswer with only the option letter.",
        ),
    ],
)
def test_prompts_keep_white_space_as_their_evaluator(name: str, expected: str) -> None:
    assert protocols.get(name).prompt(ask()) == expected
    assert "Look" not in protocols.get(name).prompt(ask(hint=""))


def test_llava_stops_at_the_first_gap_and_the_others_skip_it() -> None:
    gap = ask(options={"A": "cat", "C": "dog", "D": "None", "E": "bird"}, hint="nan")
    assert protocols.get("llava-mmbench").prompt(gap) == f"Which  one? \nA. cat\n{DIRECTLY}"
    stop = ask(options={"A": "cat", "B": "dog", "C": "None", "D": "bird"})
    assert "\nB. dog\nAnswer" in protocols.get("llava-mmbench").prompt(stop)
    assert "\nA. cat\nC. dog\nD. None\nE. bird\n" in protocols.get("vlmevalkit-exact").prompt(gap)
    assert protocols.get("grace-mmbench").prompt(gap).count("(") == 3  # it knows A to D


# --- extraction ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("response", "expected"),  # static, openai, vlmevalkit, @2025-08, @2024-03, VERBOSE, grace
    [
        ("B", "BBBBBBB"),
        (" (B). ", "BBBBBBB"),
        ("b", "------B"),
        ("B. It barks all day long here", "BB--B-B"),
        ("A dog is on a mat", "BBBBABA"),  # a lone A is a letter for some, an article for others
        ("The answer is dog", "BBDBBDA"),
        ("The answer is B, which is not at all a cat", "BBBABBA"),
        ("**B**", "B-BBBBB"),
        ("I choose B!", "B-BBBBC"),
        ("Because", "B-----B"),
        ("hot dog", "------D"),
        ("caterpillar", "------C"),
        ("Z dog", "BB----D"),  # Z declines, even beside an option's text
        ("E dog", "--BBBBD"),  # for lmms-eval E is a letter of every question
        ("E. dog", "--BBBBD"),
        ("Cannot determine the answer, maybe B", "BB----C"),
        ("Failed to obtain answer via API. B", "B-----A"),
        ("", "-------"),
    ],
)
def test_extractors_with_their_oddities(response: str, expected: str) -> None:
    names = [*NAMES[1:7], "grace-mmbench"]
    got = "".join(extract(name, response, ANIMALS) or "-" for name in names)
    assert got == expected


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("B-x(A) so +C", "B"),  # first before last, last before brackets
        ("xB x(A) so +C", "C"),
        ("xB x(A) so xC", "A"),  # brackets before any letter
        ("Not xD. but answer is *B* now", "B"),  # a phrase before a stop
        ("an answer is *C* or *B*, the answer is *C* now", "C"),  # the longer phrase comes later
        ("xA xB xC", "C"),
        ('\'"B: see(A)?!"', "B"),
    ],
)
def test_the_second_parser_of_lmms_ranks_the_forms(response: str, expected: str) -> None:
    assert extract("lmms-mmbench-static", response, ANIMALS) == expected
    assert extract("lmms-mmbench-openai", response, ANIMALS) is None


def test_a_missing_option_is_the_text_nan_for_lmms() -> None:
    three = {"A": "yes", "B": "no", "C": "maybe"}
    for name in ("lmms-mmbench-openai", "lmms-mmbench-static"):
        assert extract(name, "yes, a banana", three | {"D": "never"}) == "A"
        assert extract(name, "yes, a banana", three) is None  # A, or the D that is not there
    assert extract("lmms-mmbench-static", "Dominant: C", three) == "C"
    assert extract("lmms-mmbench-static", "A is the dominant one", three) is None  # so is D


def test_a_long_response_names_no_option_since_2025_08() -> None:
    long = "It is the dog on the mat by the door of the house where we live today"
    assert [extract(name, long, {"A": "dog", "B": "bird"}) for name in VLMEVALKIT] == [
        None,
        None,
        "A",
    ]


def test_a_file_between_model_and_matching_changes_the_response() -> None:
    letters = {"A": "B", "B": "C", "C": "A", "D": "D"}
    for name in ("vlmevalkit-exact-via-xlsx", "vlmevalkit-exact-via-tsv"):
        assert extract(name, "", letters) == "C"  # "nan" holds an a
        assert extract(name, "N/A", letters) == "C"
        assert extract(name, "banana", {"A": "banana", "B": "nan"}) == "A"
    assert extract("vlmevalkit-exact", "", letters) is None
    assert extract("vlmevalkit-exact-via-xlsx", "B\r\n", letters) is None
    assert extract("vlmevalkit-exact-via-tsv", "B\r\n", letters) == "B"
    assert extract("vlmevalkit-exact-via-xlsx", "x " * 20000 + "B", ANIMALS) is None
    assert extract("vlmevalkit-exact-via-tsv", "x " * 20000 + "B", ANIMALS) == "B"


def test_an_option_e_is_not_for_everyone() -> None:
    five = ANIMALS | {"E": "bird"}
    assert extract("vlmevalkit-exact", "E", five) == "E"
    assert extract("lmms-mmbench-static", "E", five) is None
    assert extract("grace-mmbench", "E", five) is None


# --- against the original evaluators ------------------------------------------------------------


@pytest.mark.parity
def test_every_reference_vector_agrees(shared_dir: Path) -> None:
    checked: Counter[str] = Counter()
    wrong = []
    for vector in lines(shared_dir / "fixtures/scoring/vectors.jsonl"):
        if vector["protocol"] in NAMES:
            options = dict(zip(LETTERS, vector["options"], strict=False))
            got = extract(vector["protocol"], vector["response"], options)
            checked[vector["protocol"]] += 1
            if got != vector["expected_choice_or_null"]:
                wrong.append((vector["id"], got))
    assert wrong == []
    assert set(checked) == set(NAMES) - {"llava-mmbench"}
    assert checked.total() == 3689


@pytest.mark.parity
def test_prompts_agree_with_the_originals(shared_dir: Path) -> None:
    labels = {"lmms-mmbench en": "lmms-mmbench-static", "grace-mmbench": "grace-mmbench"}
    labels["vlmevalkit dataset default"] = "vlmevalkit-exact"
    checked: Counter[str] = Counter()
    for fixture in lines(shared_dir / "fixtures/scoring/prompts.jsonl"):
        if name := labels.get(fixture["protocol"]):
            got = protocols.get(name).prompt(mmbench.from_row(fixture["input"]))
            assert got == fixture["prompt"], fixture["id"]
            checked[name] += 1
    assert checked == {"lmms-mmbench-static": 4, "vlmevalkit-exact": 4, "grace-mmbench": 1}


@pytest.mark.parity
def test_llava_prompts_agree_with_the_originals(shared_dir: Path) -> None:
    llava = protocols.get("llava-mmbench")
    checked: Counter[str] = Counter()
    for fixture in lines(shared_dir / "fixtures/scoring/prompts.jsonl"):
        name, note, row = fixture["protocol"], fixture["note"], fixture["input"]
        if not name.startswith("llava-mmbench") or "lang cn" in note:
            continue
        if turned := re.search(r"option_char \[(.*)\]", note):  # --all-rounds turns the options
            order = re.findall("[A-D]", turned[1])
            row = row | {to: row[of] for to, of in zip(order and LETTERS, order, strict=False)}
        question = mmbench.from_row(row).model_copy(update={"image": b"x"})
        if "given to the tokenizer" in name:
            assert llava.rendered(question) == fixture["prompt"], fixture["id"]
        else:  # what its answers file keeps of the prompt
            assert llava.prompt(question) == f"{fixture['prompt']}\n{DIRECTLY}", fixture["id"]
        checked[name[:20]] += 1
    assert checked.total() == 13


# --- VLMEvalKit's parts, put together -----------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in protocols.names() if "vlmevalkit-" in name])
def test_a_name_of_the_table_is_the_combination_of_its_parts(name: str) -> None:
    stated, made = protocols.get(name), protocols_mmbench.combined(name)
    assert made is not None
    assert (made.name, made.circular) == (name, stated.circular)
    for response in ("B", "", "A dog is on a mat", "The answer is dog", "B. It barks all day long"):
        assert made.extract(response, ANIMALS) == stated.extract(response, ANIMALS)


def test_parts_combine_in_any_order() -> None:
    article, short = "A dog is on a mat", {"A": "mat", "B": "bat"}
    assert extract("vlmevalkit-exact@2024-03", article, ANIMALS) == "A"
    for name in ("vlmevalkit-exact@2024-03+VERBOSE", "vlmevalkit-exact+VERBOSE@2024-03"):
        assert extract(name, article, ANIMALS) == "B"
    assert extract("vlmevalkit-exact@2024-03+VERBOSE", "B. It barks all day long", ANIMALS) == "B"
    assert extract("vlmevalkit-exact+VERBOSE", "The answer is dog", ANIMALS) == "D"
    assert extract("vlmevalkit-exact@2025-08+VERBOSE", "The answer is dog", ANIMALS) == "B"
    assert extract("vlmevalkit-exact-vanilla-via-tsv", "B\r\n", short) == "B"
    assert extract("vlmevalkit-exact-vanilla", "B\r\n", short) is None
    assert not protocols.get("vlmevalkit-exact+VERBOSE-vanilla@2025-08").circular


@pytest.mark.parametrize(
    "tail", ["-circular-vanilla", "@2024-03@2025-08", "+VERBOSE+VERBOSE", "-x", "@2024", " "]
)
def test_parts_that_do_not_go_together_are_no_name(tail: str) -> None:
    with pytest.raises(UsageError, match="unknown protocol"):
        protocols.get(f"vlmevalkit-exact{tail}")
