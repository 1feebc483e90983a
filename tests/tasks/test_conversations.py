"""Conversation files: every kind of bad row is told and counted, and no path leads out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qatbench.errors import ArtifactError, PrerequisiteError
from qatbench.tasks.conversations import Chat, Said, Turn, UnusableError, load


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for name in ("images/coco/x.jpg", "images/y.png", "outside.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"picture")
    return tmp_path / "images"


def written(tmp_path: Path, content: Any) -> Path:
    file = tmp_path / "rows.json"
    file.write_text(json.dumps(content), encoding="utf-8")
    return file


def row(*said: str, **more: Any) -> dict[str, Any]:
    roles = ("human", "gpt")
    turns = [{"from": roles[i % 2], "value": text} for i, text in enumerate(said)]
    return {"id": "one", "conversations": turns, **more}


GOOD = row("What?", "That.", id="good")


def test_turns_images_and_ids_are_read_in_order(tmp_path: Path, images: Path) -> None:
    rows = [
        row("<image>\nWhat is it?", " A cat. ", "And\nhere?", "A dog.", image="coco/x.jpg"),
        row("Look\n<image>\n<image>", "Two.", id=7, image=["y.png", "coco/x.jpg"]),
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]},
        row("No mark", "Still seen", id="", image="y.png"),
    ]
    found, rejected = load(written(tmp_path, rows), images)
    assert rejected == []
    assert [(one.id, one.turns, one.images) for one in found] == [
        ("one", (("What is it?", "A cat."), ("And\nhere?", "A dog.")), (images / "coco/x.jpg",)),
        ("7", (("Look", "Two."),), (images / "y.png", images / "coco/x.jpg")),
        ("3", (("Hi", "Ho"),), ()),
        ("4", (("No mark", "Still seen"),), (images / "y.png",)),
    ]


def test_an_empty_system_turn_is_dropped(tmp_path: Path) -> None:
    said = [{"from": "system", "value": " "}, *row("What?", "That.")["conversations"]]
    assert load(written(tmp_path, [{"conversations": said}]), None).conversations[0].turns == (
        Turn("What?", "That."),
    )


SYSTEM = [{"from": "system", "value": "Be kind."}, *GOOD["conversations"]]
BAD = {
    "an object": ["not", "a", "row"],
    "no turns": {"id": "x"},
    "no turns ": {"id": "x", "conversations": []},
    " no turns": {"conversations": [{"from": "system", "value": ""}]},
    "a list of objects": {"conversations": ["What?", "That."]},
    "a turn without from or value": {"conversations": [{"from": "human", "value": None}]},
    "a turn without role or content": {"messages": [{"role": "user", "content": [1]}] * 2},
    "the last turn has no answer": row("What?", "That.", "And?"),
    "roles do not alternate (turn 1)": {"conversations": [{"from": "gpt", "value": "a"}] * 2},
    "roles do not alternate (turn 2)": {
        "conversations": [*GOOD["conversations"], *reversed(GOOD["conversations"])]
    },
    "an empty answer (turn 2)": row("What?", "That.", "And?", " \n"),
    "an empty question (turn 1)": row("<image>", "That.", image="y.png"),
    "half a surrogate pair (turn 1)": row("What?", "That \ud83d"),
    "a system turn": {"conversations": SYSTEM},
    "image marks and images differ (1 and 0)": row("<image>\nWhat?", "That."),
    "image marks and images differ (2 and 1)": row("<image><image>\nWhat?", "That.", image="y.png"),
    "image marks and images differ (1 and 2)": row(
        "<image>\nWhat?", "That.", image=["y.png", "y.png"]
    ),
    "an image mark in the answer (turn 1)": row("What?", "<image>", image="y.png"),
    "not there ('z.png')": row("What?", "That.", image="z.png"),
    "not there ('nowhere/y.png')": row("What?", "That.", image="nowhere/y.png"),
    "not there ('coco')": row("What?", "That.", image="coco"),
    "not there ('coco/')": row("What?", "That.", image="coco/"),
    "not there ('y\\x00.png')": row("What?", "That.", image="y\0.png"),
    "an image's name is not text": row("What?", "That.", image=[3]),
    "outside the folder of images ('../outside.jpg')": row(
        "What?", "That.", image="../outside.jpg"
    ),
    "outside the folder of images ('coco/../../outside.jpg')": row(
        "What?", "That.", image="coco/../../outside.jpg"
    ),
    "outside the folder of images ('..\\\\outside.jpg')": row(
        "What?", "That.", image="..\\outside.jpg"
    ),
    "outside the folder of images ('/etc/hostname')": row("What?", "That.", image="/etc/hostname"),
}


@pytest.mark.parametrize("why", BAD)
def test_a_bad_row_is_told_with_file_and_row_and_is_not_fatal(
    why: str, tmp_path: Path, images: Path
) -> None:
    file = written(tmp_path, [GOOD, BAD[why], GOOD])
    found, rejected = load(file, images)
    assert [one.id for one in found] == ["good", "good"]
    assert [(bad.file, bad.row) for bad in rejected] == [(file, 2)]
    assert str(rejected[0]).startswith("rows.json, row 2: ")
    assert why.strip() in str(rejected[0])


def test_reasons_can_be_counted(tmp_path: Path, images: Path) -> None:
    rows = [GOOD, *(row("What?", "That.", image=f"{i}.png") for i in range(9))]
    rejected = load(written(tmp_path, rows), images).rejected
    assert {bad.why for bad in rejected} == {"an image that is not there"}
    assert [bad.where for bad in rejected] == [f"'{i}.png'" for i in range(9)]


def test_images_need_a_folder(tmp_path: Path) -> None:
    rows = [GOOD, row("What?", "That.", image="y.png")]
    assert "no folder of images was given" in load(written(tmp_path, rows), None).rejected[0].why
    with pytest.raises(PrerequisiteError, match="no folder of images"):
        load(written(tmp_path, rows), tmp_path / "nowhere")


def test_each_folder_of_images_is_listed_once(
    tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    listed: list[str] = []
    real = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: listed.append(str(path)) or real(path))
    rows = [row("What?", "That.", image=name) for name in ("coco/x.jpg", "coco/z.jpg") * 50]
    assert len(load(written(tmp_path, rows), images).conversations) == 50
    assert listed == [str(images / "coco")]


def test_lines_of_json_may_be_bad_one_by_one(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(f'\ufeff{json.dumps(GOOD)}\n\n{{"id": "to\n{json.dumps(GOOD)}', "utf-8")
    found, rejected = load(file, None)
    assert len(found) == 2
    assert [(bad.row, bad.why) for bad in rejected] == [(3, "not JSON")]


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "not JSON"),
        (b'[{"id": 1},', "not JSON.*line 1"),
        (b"\x89PNG\r\n\xff\xfe", "not JSON"),
        (b"[" * 200_000, "not JSON: RecursionError"),
        (b'"text"', "no list"),
        (b"[]", "none of the 0 rows"),
        (b'[{"id": 1}, {"id": 2}]', r"none of the 2 rows of .*; rows.json, row 1: no turns"),
    ],
)
def test_a_file_without_a_good_row_is_an_artifact_error(
    content: bytes, why: str, tmp_path: Path
) -> None:
    file = tmp_path / "rows.json"
    file.write_bytes(content)
    with pytest.raises(ArtifactError, match=why) as caught:
        load(file, None)
    assert caught.value.hint


def test_a_file_that_is_not_there_is_a_prerequisite_error(tmp_path: Path) -> None:
    with pytest.raises(PrerequisiteError, match=r"nowhere\.json"):
        load(tmp_path / "nowhere.json", None)


# --- in a chat template ---------------------------------------------------------------------------

TURNS = (Turn("Q1", "A"), Turn("A?", "Q1"), Turn("Q1", "A"))  # answers stand in questions too


def chat(end: str, *, before: str = " ", hidden: bool = False, counted: bool = False) -> Chat:
    def render(turns: list[Said]) -> str:
        kept = turns[-1:] if hidden else turns
        text = "".join(
            f"[U]{asked}[B]" + ("" if answer is None else f"{before}{answer}{end}")
            for asked, answer in kept
        )
        return f"{len(turns)} turns: {text}" if counted else text

    return Chat(render, lambda text: [ord(letter) for letter in text], ("[E]", "[S]"), "[S]")


@pytest.mark.parametrize(
    ("end", "said"),
    [
        ("[E]\n", [" A[E]", " Q1[E]", " A[E]"]),  # ChatML
        (" [S]", [" A [S]", " Q1 [S]", " A [S]"]),  # Llama 2
        (" ", [" A[S]", " Q1[S]", " A[S]"]),  # LLaVA: the template has no end
    ],
)
def test_answers_and_their_ends_are_found(end: str, said: list[str]) -> None:
    tokens, spans = chat(end).supervised(TURNS, 10_000)
    text = "".join(map(chr, tokens))
    assert [text[i:j] for i, j in spans] == said
    if end.strip():
        assert chat(end).render(TURNS).startswith(text)
    else:
        assert text == "[U]Q1[B] A[S] [U]A?[B] Q1[S] [U]Q1[B] A[S]"


def test_turns_past_the_limit_are_not_looked_at() -> None:
    whole, spans = chat("[E]").supervised(TURNS, 10_000)
    assert len(spans) == 3
    for limit in range(1, 40):
        tokens, some = chat("[E]").supervised(TURNS, limit)
        assert tokens == whole[: len(tokens)]
        assert some == spans[: len(some)]
        assert len(tokens) - spans[0][0] >= min(limit, len(whole) - spans[0][0])


def test_a_template_that_forgets_or_changes_turns_is_refused() -> None:
    with pytest.raises(ArtifactError, match="does not continue"):
        chat("[E]", hidden=True).supervised(TURNS, 10_000)
    with pytest.raises(ArtifactError, match="does not continue"):
        chat("[E]", counted=True).supervised(TURNS, 10_000)
    with pytest.raises(ArtifactError, match="does not continue"):
        chat("[E]", before="<think>").supervised(TURNS, 10_000)


def test_a_token_across_a_border_makes_a_sample_unusable() -> None:
    import dataclasses

    def pairs(text: str) -> list[int]:
        return [hash(text[i : i + 2]) for i in range(0, len(text), 2)]

    with pytest.raises(UnusableError, match="does not separate"):
        dataclasses.replace(chat("[E]", before=""), tokenize=pairs).supervised(TURNS, 10_000)
