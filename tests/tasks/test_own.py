"""A user's own questions: every form of a row, and errors that name file and line."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from qatbench.errors import ArtifactError, PrerequisiteError, UsageError
from qatbench.tasks import own, selector
from qatbench.tasks.selector import Selector

SECRET = "zq-secret-text"
GAPS = ("nan", "None", "NA", "N/A", "null", "NULL", "#N/A")  # what pandas takes for a missing cell


def row(**changes: Any) -> dict[str, Any]:
    return {"question": f"{SECRET}?", "options": ["red", "blue", "green"], "answer": "B"} | changes


def png(size: tuple[int, int] = (3, 2)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (200, 30, 30)).save(buffer, format="PNG")
    return buffer.getvalue()


def write(file: Path, *rows: Any) -> Path:
    file.write_text("".join(json.dumps(one) + "\n" for one in rows), encoding="utf-8")
    return file


def load_one(folder: Path, one: dict[str, Any]) -> Any:
    return own.load(write(folder / "my.jsonl", one))[0]


# --- selectors ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a/my.jsonl", Selector("my", "all", "all", Path("a/my.jsonl"))),
        ("my.v2.tsv", Selector("my.v2", "all", "all", Path("my.v2.tsv"))),
        ("/x/my.csv:text", Selector("my", "all", "text", Path("/x/my.csv"))),
        ("my.jsonl:image", Selector("my", "all", "image", Path("my.jsonl"))),
        ("x:y/my.jsonl", Selector("my", "all", "all", Path("x:y/my.jsonl"))),
    ],
)
def test_a_path_is_a_task_of_its_own(text: str, expected: Selector) -> None:
    assert selector.parse(text) == expected


def test_records_name_the_task_and_no_folder() -> None:
    assert str(selector.parse("/home/me/my.jsonl")) == "my:all"
    assert str(selector.parse("/home/me/my.jsonl:text")) == "my:all:text"


def test_a_file_that_is_there_needs_no_suffix_and_says_what_it_should_be(tmp_path: Path) -> None:
    file = tmp_path / "questions.txt"
    file.write_text("{}")
    chosen = selector.parse(str(file))
    assert (chosen.task, chosen.file) == ("questions", file)
    with pytest.raises(UsageError, match=r"is no \.jsonl"):
        selector.load(chosen, {})


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("my.jsonl:both", "unknown subset 'both'"),
        ("my.jsonl:test:text", "unknown task"),
        ("scienceqa.jsonl", "second task 'scienceqa'"),
        ("mmbench.tsv", "second task 'mmbench'"),
        ("my questions.jsonl", "cannot name a task"),
        ("a=b.jsonl", "cannot name a task"),
        ("my.json", "unknown task"),
    ],
)
def test_what_does_not_name_questions_is_a_usage_error(text: str, why: str) -> None:
    with pytest.raises(UsageError, match=why) as caught:
        selector.parse(text)
    assert caught.value.hint


def test_two_files_cannot_be_one_task() -> None:
    assert len(selector.parse_all(["a/x.jsonl:text", "a/x.jsonl:image", "scienceqa"])) == 3
    with pytest.raises(UsageError, match="both be the task 'x'"):
        selector.parse_all(["a/x.jsonl", "scienceqa", "b/x.jsonl"])
    with pytest.raises(UsageError, match="asked for twice"):
        selector.parse_all(["a/x.jsonl", "a/x.jsonl"])


def test_own_data_need_no_path_stay_home_and_are_local() -> None:
    chosen = selector.parse_all(["my.jsonl", "scienceqa:test"])
    assert selector.with_paths(chosen) == ["scienceqa"]
    assert not selector.shareable("my", None)
    assert not selector.shareable("my", "mini")
    assert selector.place("my", {}) == "local files"


def test_a_configuration_of_the_hub_is_a_place() -> None:
    assert selector.place("mmbench", {"mmbench": "lmms-lab/MMBench/cn"}) == "lmms-lab/MMBench/cn"
    assert selector.place("mmbench", {"mmbench": "./data/MMBench/cn"}) == "local files"


# --- JSONL ----------------------------------------------------------------------------------------


def test_a_row_becomes_a_question(tmp_path: Path) -> None:
    full = row(
        id=7, hint="look", category="c", image="pictures/1.png", options={"C": "z", "A": "x"}
    )
    got = load_one(tmp_path, full | {"answer": "C"})
    assert (got.id, got.task, got.split, got.hint, got.category) == ("7", "my", "all", "look", "c")
    assert (list(got.options.items()), got.gold) == ([("A", "x"), ("C", "z")], "C")
    assert got.image == tmp_path / "pictures/1.png"  # it need not be there


def test_without_an_id_a_row_has_its_line_and_empty_lines_are_none(tmp_path: Path) -> None:
    file = tmp_path / "my.jsonl"
    file.write_text(f"\ufeff{json.dumps(row())}\n\n  \n{json.dumps(row())}", encoding="utf-8")
    assert [q.id for q in own.load(file)] == ["1", "4"]


@pytest.mark.parametrize("answer", ["B", 1, "blue"])
def test_an_answer_is_a_letter_an_index_or_a_text(tmp_path: Path, answer: object) -> None:
    assert load_one(tmp_path, row(answer=answer)).gold == "B"


@pytest.mark.parametrize("text", GAPS)
def test_every_text_is_an_option(tmp_path: Path, text: str) -> None:
    got = load_one(tmp_path, row(options=[text, "x"], answer=text, hint=text))
    assert (got.options, got.gold, got.hint) == ({"A": text, "B": "x"}, "A", text)


@pytest.mark.parametrize("form", ["{}", "data:image/png;base64,{}"])
def test_an_image_may_be_its_base64(tmp_path: Path, form: str) -> None:
    cell = form.format(base64.b64encode(png()).decode())
    assert load_one(tmp_path, row(image=cell)).image == png()


def test_a_jpeg_s_base64_looks_like_a_path_and_is_none(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("L", (2, 2)).save(buffer, format="JPEG")
    cell = base64.b64encode(buffer.getvalue()).decode()
    assert cell.startswith("/9j/")
    assert load_one(tmp_path, row(image=cell)).image == buffer.getvalue()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"question": None}, "question is missing"),
        ({"question": " "}, "question is missing"),
        ({"question": 3}, "question is int"),
        ({"options": None}, "options are missing"),
        ({"options": SECRET}, "options are missing, or neither"),
        ({"options": ["only"]}, "options are fewer"),
        ({"options": ["x"] * 27}, "options are 27"),
        ({"options": ["x", ""]}, "option B is not a text"),
        ({"options": ["x", None]}, "option B is not a text"),
        ({"options": {"a": "x", "B": "y"}}, "options has the key 'a'"),
        ({"answer": None}, "answer is missing"),
        ({"answer": 3}, "answer is 3, outside the 3"),
        ({"answer": -1}, "answer is -1"),
        ({"answer": True}, "answer is neither"),
        ({"answer": 1.0}, "answer is neither"),
        ({"answer": "D"}, "answer is neither a letter"),
        ({"answer": "b"}, "answer is neither a letter"),
        ({"answer": "B", "options": ["B", "A"]}, "answer can be A or B"),
        ({"answer": "same", "options": ["same", "same"]}, "answer can be A or B"),
        ({"hint": 1}, "hint is int"),
        ({"id": ["x"]}, "id is neither"),
        ({"image": 4}, "image is int"),
        ({"image": base64.b64encode(b"x" * 2000).decode()}, "image is neither a path nor"),
        ({"image": "data:image/png;base64,AAAA"}, "image is neither a path nor"),
        ({"img": "x.png"}, "img is no known key"),
    ],
)
def test_a_bad_row_names_file_line_and_field(
    tmp_path: Path, changes: dict[str, Any], told: str
) -> None:
    file = write(tmp_path / "my.jsonl", row(), row(**changes))
    with pytest.raises(ArtifactError) as caught:
        own.load(file)
    assert caught.value.message.startswith(f"{file}, line 2: {told}")
    assert SECRET not in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("", "holds no questions"),
        ('{"question": "x", ', "line 1: not JSON"),
        ("[1]\n", "line 1: not a JSON object"),
        ("\xff\xfe", "cannot read"),
        (f"{json.dumps(row(id='x'))}\n{json.dumps(row(id='x'))}\n", "line 2: id x is there twice"),
    ],
)
def test_damaged_files_are_artifact_errors(tmp_path: Path, content: str, told: str) -> None:
    file = tmp_path / "my.jsonl"
    file.write_bytes(content.encode("latin-1"))
    with pytest.raises(ArtifactError, match=told):
        own.load(file)


def test_a_file_that_is_not_there_is_a_missing_prerequisite(tmp_path: Path) -> None:
    with pytest.raises(PrerequisiteError, match="no questions at"):
        own.load(tmp_path / "my.jsonl")


def test_llava_s_question_files_are_told_from_questions(tmp_path: Path) -> None:
    said = [{"from": "human", "value": "Q?\nA. x\nB. y"}, {"from": "gpt", "value": "A"}]
    file = tmp_path / "llava_test_CQM-A.json"
    file.write_text(json.dumps([{"id": "4", "conversations": said}]))
    with pytest.raises(UsageError, match="holds conversations") as caught:
        selector.load(selector.parse(str(file)), {})
    assert "--task scienceqa:test --data FILE.json" in caught.value.hint
    lines = write(tmp_path / "talks.jsonl", {"id": "4", "conversations": said})
    assert not own.holds_questions(lines)
    assert own.holds_questions(write(tmp_path / "my.jsonl", row()))
    assert not own.holds_questions(tmp_path / "nowhere.jsonl")


def test_subsets_go_by_the_image(tmp_path: Path) -> None:
    file = write(tmp_path / "my.jsonl", row(id="t"), row(id="i", image="1.png"))
    assert [q.id for q in own.load(file, subset="image")] == ["i"]
    assert [q.id for q in own.load(file, subset="text")] == ["t"]


# --- tables ---------------------------------------------------------------------------------------


def table(file: Path, *lines: str) -> Path:
    separator = "," if file.suffix == ".csv" else "\t"
    text = "\n".join(line.replace("|", separator) for line in lines) + "\n"
    file.write_text(text, encoding="utf-8")
    return file


@pytest.mark.parametrize("name", ["my.tsv", "my.csv"])
def test_a_table_needs_neither_index_nor_image(tmp_path: Path, name: str) -> None:
    lines = ["question|A|B|C|answer", *(f"q{i}?|{gap}|y||A" for i, gap in enumerate(GAPS))]
    got = own.load(table(tmp_path / name, *lines))
    assert [q.options for q in got] == [{"A": gap, "B": "y"} for gap in GAPS]
    assert [(q.id, q.task, q.gold) for q in got[:2]] == [("1", "my", "A"), ("2", "my", "A")]


def test_passes_and_images_of_a_table(tmp_path: Path) -> None:
    cell = base64.b64encode(png((40, 40))).decode()
    assert len(cell) > 64
    lines = ["index|question|A|B|answer|image|image_path", f"1|q|x|y|A|{cell}|"]
    lines += ["1000001|q|y|x|B|1|", "2|q|x|y|A||pictures/2.png"]
    first, second, third = own.load(table(tmp_path / "my.tsv", *lines))
    assert (first.image, second.image) == (png((40, 40)), png((40, 40)))
    assert (second.group, second.circular_pass) == ("1", 1)
    assert third.image == tmp_path / "pictures/2.png"


@pytest.mark.parametrize(
    ("line", "told"),
    [("q|x|y|", "row 2: answer is missing"), ("q|x||A", "row 2: options are fewer"),
     ("q|x|y|C", "row 2: answer is not the letter")],
)  # fmt: skip
def test_a_bad_row_of_a_table_is_named(tmp_path: Path, line: str, told: str) -> None:
    file = table(tmp_path / "my.csv", "question|A|B|answer", "q|x|y|A", line)
    with pytest.raises(ArtifactError) as caught:
        own.load(file)
    assert caught.value.message.startswith(f"{file}, {told}")
