"""LLaVA's question file: its texts come back as they are, and what is damaged is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qatbench.errors import ArtifactError, UsageError
from qatbench.tasks import protocols, selector

SECRET = "harmonica"  # of a row's text; no message may hold it


def talk(name: str, text: str, answer: str | None = "B", **more: Any) -> dict[str, Any]:
    turns = [{"from": "human", "value": text}]
    turns += [{"from": "gpt", "value": answer}] if answer else []
    return {"id": name, "conversations": turns} | more


ROWS = [
    talk("4", "Context: Two lines\nof a hint.\nWhich one?\nA. x\ny\nB. A. is it\nC. z"),
    talk("11", "<image>\nWhat is shown?\nA. a cat\nB. a dog", image="11/image.png"),
]


def written(folder: Path, rows: Any, name: str = "llava_test_CQM-A.json") -> Path:
    (folder / name).write_text(json.dumps(rows))
    return folder / name


def load(file: Path, split: str = "test") -> list[Any]:
    return selector.load(selector.parse(f"scienceqa:{split}"), {"scienceqa": str(file)})


def test_rows_become_questions(tmp_path: Path) -> None:
    (tmp_path / "images" / "test").mkdir(parents=True)
    first, second = load(written(tmp_path, ROWS))
    assert first.text == "Context: Two lines\nof a hint.\nWhich one?"
    assert first.options == {"A": "x\ny", "B": "A. is it", "C": "z"}
    assert (first.id, first.gold, first.has_image) == ("4", "B", False)
    assert second.image == tmp_path / "images" / "test" / "11" / "image.png"
    assert second.options == {"A": "a cat", "B": "a dog"}
    shown = protocols.get("llava-sqa").rendered(second)
    assert "USER: <image>\nWhat is shown?\nA. a cat\nB. a dog\nAnswer with" in shown


def test_one_file_is_one_split(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no split 'train'"):
        load(written(tmp_path, ROWS), "train")
    assert len(load(written(tmp_path, ROWS, "questions.json"), "val")) == 2
    assert load(written(tmp_path, ROWS))[1].image == tmp_path / "11" / "image.png"


@pytest.mark.parametrize(
    ("row", "told"),
    [
        (talk("5", f"{SECRET}?"), "does not end in options"),
        (talk("5", f"{SECRET}?\nA. x"), "does not end in options"),
        (talk("5", f"{SECRET}?\nA. x\nB. y", "C"), "no letter of an option"),
        (talk("5", f"{SECRET}?\nA. x\nB. y", image="../../x.png"), "no path below"),
        ({"id": "5", "conversations": SECRET}, "conversations are missing"),
        ({"conversations": []}, "id is missing"),
    ],
)
def test_what_is_damaged_is_named_by_its_row(tmp_path: Path, row: Any, told: str) -> None:
    file = written(tmp_path, [ROWS[0], row])
    with pytest.raises(ArtifactError, match=f"row 2.*{told}") as caught:
        load(file)
    assert SECRET not in caught.value.message


def test_a_file_without_answers_cannot_be_scored(tmp_path: Path) -> None:
    with pytest.raises((ArtifactError, UsageError), match="answer"):
        load(written(tmp_path, [talk("4", "Which?\nA. x\nB. y", None)]))


@pytest.mark.parity
def test_the_published_file_s_prompts(shared_dir: Path, tmp_path: Path) -> None:
    lines = (shared_dir / "fixtures" / "scoring" / "prompts.jsonl").read_text().splitlines()
    told = [row for row in map(json.loads, lines)
            if row["protocol"] == "llava-sqa [text given to the tokenizer]"
            and "conversations" in row["input"]]  # fmt: skip
    assert len(told) == 3
    questions = load(written(tmp_path, [row["input"] for row in told]))
    how = protocols.get("llava-sqa")
    assert [how.rendered(question) for question in questions] == [row["prompt"] for row in told]
