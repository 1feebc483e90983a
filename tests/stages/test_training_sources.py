"""Training data as it is named: several sources, shares, and rows that are left out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import torch

from qatbench.errors import UsageError
from qatbench.recipe import SourceSpec
from qatbench.stages.training_sources import load, parse
from qatbench.tasks import selector, sources
from qatbench.vlm import load as models
from qatbench.vlm.training import TrainingData


@pytest.fixture
def paths(tmp_path: Path) -> dict[str, str]:
    return {"scienceqa": str(tiny.save_questions(tmp_path / "data"))}


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    said = [{"from": "human", "value": "Hello?"}, {"from": "gpt", "value": "Yes."}]
    rows = [{"id": str(i), "conversations": said} for i in range(3)]
    rows += [{"id": "x", "conversations": said[:1]}, {"id": "y"}]
    file = tmp_path / "mix.json"
    file.write_text(json.dumps(rows), encoding="utf-8")
    return file


def test_shares_and_rows_left_out_are_told(paths: dict[str, str], mixed: Path) -> None:
    made = load([parse("scienceqa:train@3", None), parse(str(mixed), None)], paths)
    assert [(s.name, len(s.items), s.weight) for s in made.sources] == [
        ("scienceqa:train", 12, 3.0),
        ("mix.json", 3, 1.0),
    ]
    shares, left_out = made.notes()
    assert shares == ("training sources: scienceqa:train 75 % of 12, mix.json 25 % of 3 samples")
    assert left_out.startswith("2 training rows left out: ")
    assert left_out.endswith("first: mix.json row 4, mix.json row 5")
    assert str(mixed.parent) not in left_out


def test_a_source_alone_has_the_digest_of_its_questions(paths: dict[str, str]) -> None:
    made = load([SourceSpec(questions="scienceqa:train")], paths)
    rows = selector.load(selector.parse("scienceqa:train"), paths)
    assert sources.digest(made.sources) == selector.digest(rows)
    assert made.notes() == []
    limited = made.limited(5, 0)
    assert list(limited.sources[0].items) == selector.limit(rows, 5, 0)


@pytest.mark.parametrize("text", ["scienceqa:train@", "scienceqa:train@0", "mix.json@-1", "a@inf"])
def test_a_weight_is_a_number_above_zero(text: str) -> None:
    with pytest.raises(UsageError, match="the weight is"):
        parse(text, None)


def test_what_a_command_line_names() -> None:
    assert parse("a.jsonl@0.5", "pictures") == SourceSpec(
        conversations="a.jsonl", images="pictures", weight=0.5
    )
    assert parse("scienceqa:train:text", "pictures") == SourceSpec(questions="scienceqa:train:text")


def test_the_built_in_model_trains_on_conversations(tmp_path: Path) -> None:
    tiny.save_image(tmp_path, "a", "b", "red", 0)
    said = [
        {"from": "human", "value": "<image>\nWhat color is the square?"},
        {"from": "gpt", "value": "red"},
        {"from": "human", "value": "How many samples are there?"},
        {"from": "gpt", "value": "one"},
    ]
    row = {"id": "0", "image": "a/b/image.png", "conversations": said}
    file = tmp_path / "said.json"
    file.write_text(json.dumps([row]), encoding="utf-8")
    made = load([parse(str(file), str(tmp_path / "images"))], {})
    student = models.load(models.find("mini/student"), device="cpu", dtype=torch.float32)
    data = TrainingData(student, made.sources, ("qatbench",), 0)
    (sample,) = data.step(0, 1)
    assert data.skipped == {}
    words = student.tokenizer
    supervised = [words.decode(sample.ids[start:end]).strip() for start, end in sample.spans]
    assert [text.split()[0] for text in supervised] == ["red", "one"]
    assert sample.ids.count(data.image_token) == 36
    text = words.decode([token for token in sample.ids if token != data.image_token])
    assert "<unk>" not in text
