"""Files of answers in every form: what is read, and how damage is told."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import openpyxl
import pytest

from qatbench.errors import ArtifactError, PrerequisiteError, QatbenchError, UsageError
from qatbench.records import Question
from qatbench.tasks import answers
from qatbench.tasks.answers_match import match

SECRET = "harmonica"  # a text of the data; no message may hold it


def lines(file: Path, *rows: object) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def xlsx(rows: Sequence[Sequence[object]], *, second: bool = False) -> bytes:
    """A workbook, perhaps with another sheet behind the one of answers."""
    book = openpyxl.Workbook()
    for row in rows:
        book.active.append(row)
    if second:
        book.create_sheet("other").append(["index"])
    buffer = io.BytesIO()
    book.save(buffer)
    return buffer.getvalue()


def told(file: Path) -> list[tuple[Any, ...]]:
    return [(row.id, row.response, row.choice) for row in answers.read(file).rows]


# --- JSON ---------------------------------------------------------------------------------------


def test_llava_answers_keep_their_prompt(tmp_path: Path) -> None:
    rows = [{"question_id": "7", "prompt": "<image>\nx", "text": "B", "model_id": "m"}]
    rows.append({"question_id": 8, "prompt": "x", "text": " C ", "round_id": 0})
    got = answers.read(lines(tmp_path / "a.jsonl", *rows))
    assert (got.form, got.has_prompts, got.has_responses) == ("LLaVA answers", True, True)
    assert [(r.id, r.response, r.prompt) for r in got.rows] == [
        ("7", "B", "<image>\nx"),
        ("8", " C ", "x"),
    ]
    assert not answers.read(
        lines(tmp_path / "b.jsonl", {"question_id": 1, "text": "B"})
    ).has_prompts


@pytest.mark.parametrize("name", ["a.json", "a.json.gz", "a"])
@pytest.mark.parametrize("wrap", [True, False])
def test_choices_alone_or_under_results(tmp_path: Path, name: str, wrap: bool) -> None:
    given: Any = {"5": 0, "9": -1, "11": 3, "12": "B"}
    value = {"acc": 1.5, "correct": 1, "results": given, "outputs": {"5": "A"}} if wrap else given
    data = json.dumps(value).encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    assert told(tmp_path / name) == [
        ("5", None, 0), ("9", None, -1), ("11", None, 3), ("12", None, 1),
    ]  # fmt: skip
    assert not answers.read(tmp_path / name).has_responses


def test_samples_of_lmms_eval_in_their_forms(tmp_path: Path) -> None:
    doc = {"question": "q", "choices": ["x", "y"]}
    rows: list[dict[str, Any]] = [
        {"doc_id": 4, "target": "B", "filtered_resps": ["B."], "resps": [["no"]], "doc": doc},
        {"doc_id": 5, "resps": [["A"], ["C"]]},
        {"doc_id": 6, "filtered_resps": [["b"]], "doc": {"index": 1000003}},
        {"doc_id": 7, "filtered_resps": ["b"], "gpt_eval_score": {"index": 9, "answer": "A"}},
        {"doc_id": 8, "filtered_resps": []},
    ]
    got = answers.read(lines(tmp_path / "samples.jsonl", *rows)).rows
    assert [row.response for row in got] == ["B.", "A", "b", "b", ""]
    assert [row.id for row in got] == [None, None, "1000003", "9", None]
    assert [row.position for row in got] == [4, 5, 6, 7, 8]
    assert (got[0].target, got[0].row["choices"]) == ("B", ["x", "y"])
    (tmp_path / "old.json").write_text(json.dumps({"args": {}, "logs": rows}))
    assert [row.response for row in answers.read(tmp_path / "old.json").rows] == [
        "B.",
        "A",
        "b",
        "b",
        "",
    ]


def test_our_own_responses(tmp_path: Path) -> None:
    row = {"id": "3", "task": "scienceqa", "chosen": "A", "status": "ok", "raw": "A. x"}
    other = row | {"id": "4", "raw": None, "chosen": None}
    file = lines(tmp_path / "responses.jsonl", row, other, row | {"id": "5", "raw": None})
    assert told(file) == [("3", "A. x", None), ("4", None, -1), ("5", None, 0)]


# --- tables -------------------------------------------------------------------------------------

TABLE: list[list[object]] = [
    ["index", "question", "A", "B", "prediction"],
    [1, "q", "x", 1.5, "NA"],
    [1000001, "q", "1", "  two\nlines ", None],
    [2.0, "q", "&<>", "y", "A_x000D_"],
]
READ = [("1", "NA", None), ("1000001", "", None), ("2", "A_x000D_", None)]


def as_text(sign: str) -> bytes:
    rows = [["" if cell is None else f'"{cell}"' for cell in row] for row in TABLE]
    return "\n".join(sign.join(row) for row in rows).encode()


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.xlsx", xlsx(TABLE)),
        ("named-wrongly.tsv", xlsx(TABLE, second=True)),
        ("a.tsv", as_text("\t")),
        ("a.csv", as_text(",")),
        ("a.txt", b"\xef\xbb\xbf" + as_text("\t")),
        ("a.tsv.gz", gzip.compress(as_text("\t"))),
    ],
)
def test_tables(tmp_path: Path, name: str, data: bytes) -> None:
    (tmp_path / name).write_bytes(data)
    got = answers.read(tmp_path / name)
    assert told(tmp_path / name) == READ
    assert got.form.startswith("table")
    assert dict(got.rows[2].row)["A"] == "&<>"
    assert dict(got.rows[1].row)["B"] == "  two\nlines "


def test_tables_as_json(tmp_path: Path) -> None:
    rows = [{"index": 1, "prediction": "B", "A": "x"}, {"index": 2.0, "prediction": None}]
    by_column = {"index": {"0": 1, "1": 2}, "prediction": {"0": "B", "1": None}}
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    (tmp_path / "columns.json").write_text(json.dumps(by_column))
    lines(tmp_path / "lines.jsonl", *rows)
    for name in ("rows.json", "columns.json", "lines.jsonl"):
        assert told(tmp_path / name) == [("1", "B", None), ("2", "", None)]


# --- damage -------------------------------------------------------------------------------------


FIRST = '{"question_id": 1, "text": "B"}\n'


@pytest.mark.parametrize(
    ("name", "data", "error", "said"),
    [
        ("a.jsonl", FIRST + '{"question_id": 2, "te', ArtifactError, "line 2"),
        ("a.jsonl", FIRST + '\n{"question_id": 2}', ArtifactError, "line 3: text"),
        ("a.jsonl", FIRST + '[2]', ArtifactError, "line 2: is not an"),
        ("a.jsonl", '{"text": "harmonica", "question_id": null}', ArtifactError, "line 1: quest"),
        ("a.jsonl", '{"doc_id": "x", "resps": ["B"]}', ArtifactError, "line 1: doc_id"),
        ("a.jsonl", '{"doc_id": 1, "target": "B"}', ArtifactError, "line 1: filtered_resps"),
        ("a.json", '{"1": 0, "2": "harmonica"}', ArtifactError, "id 2: the choice"),
        ("a.json", '{"results": {"1": 0, "2": true}}', ArtifactError, "id 2: the choice"),
        ("a.json", '{"1": 0, "2": -2}', ArtifactError, "id 2: the choice"),
        ("a.json", '{"results": {"task": {"acc": 0.5}}}', UsageError, "no file of answers"),
        ("a.json", "[]", UsageError, "no file of answers"),
        ("a.json", '{"1": 0', ArtifactError, "is not JSON"),
        ("a.tsv", "index\tanswer\n1\tA\n", UsageError, "no column prediction"),
        ("a.tsv", "id\tprediction\n1\tA\n", UsageError, "no column index"),
        ("a.tsv", "index\tprediction\n1\tA\nharmonica\t\n", ArtifactError, "row 2: index"),
        ("a.tsv", "index\tprediction\n1\tA\n\tB\n", ArtifactError, "row 2: index"),
        ("a.tsv", "index\tprediction\n1\tA\tB\n", ArtifactError, "more cells"),
        ("a.tsv", 'index\tprediction\n1\t"A', ArtifactError, "cannot read"),
        ("a.tsv", "index\tprediction\n", ArtifactError, "has no rows"),
        ("a.tsv", "", ArtifactError, "is empty"),
        ("a.xlsx", "PK\x03\x04 cut", ArtifactError, "cannot read"),
        ("a.json.gz", "\x1f\x8b cut", ArtifactError, "cannot read"),
        ("a.xls", "\xd0\xcf\x11\xe0", UsageError, ".xlsx"),
    ],
)  # fmt: skip
def test_damage_names_file_and_row_and_tells_no_text(
    tmp_path: Path, name: str, data: str, error: type[QatbenchError], said: str
) -> None:
    file = tmp_path / name
    file.write_bytes(data.encode("latin-1"))
    with pytest.raises(error) as caught:
        answers.read(file)
    assert str(file) in caught.value.message
    assert said in caught.value.message + caught.value.hint
    assert SECRET not in caught.value.message
    assert caught.value.hint


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(PrerequisiteError, match="no answers at"):
        answers.read(tmp_path / "a.jsonl")


def test_two_columns_of_one_name(tmp_path: Path) -> None:
    (tmp_path / "a.xlsx").write_bytes(xlsx([["index", "prediction", "index"], [1, "A", 2]]))
    with pytest.raises(ArtifactError, match="one name"):
        answers.read(tmp_path / "a.xlsx")


# --- which question -----------------------------------------------------------------------------


def question(name: str, text: str, *options: str, gold: str = "A") -> Question:
    given = dict(zip("ABCD", options, strict=False))
    return Question(id=name, task="scienceqa", text=text, options=given, gold=gold)


ASKED = [
    question("40", "Which?", "x", "y"),
    question("41", "Same?", "x", "y"),
    question("42", "Same?", "x", "y", gold="B"),
    question("43", "Same?", "y", "x"),
]


def matched(tmp_path: Path, *rows: Mapping[str, Any]) -> dict[str, str | None]:
    got = match(answers.read(lines(tmp_path / "a.jsonl", *rows)).rows, ASKED)
    return {name: row.response for name, row in got.by_id.items()}


def cells(index: int, text: str, a: str, b: str, prediction: str) -> dict[str, Any]:
    return {"index": index, "question": text, "A": a, "B": b, "prediction": prediction}


def test_the_last_answer_counts_and_unknown_ones_are_counted(tmp_path: Path) -> None:
    rows = [
        {"question_id": name, "text": text} for name, text in ((41, "1"), (7, "2"), ("41", "3"))
    ]
    got = match(answers.read(lines(tmp_path / "a.jsonl", *rows)).rows, ASKED)
    assert got.by_id["41"].response == "3"
    assert ([row.id for row in got.unknown], got.repeated) == (["7"], 1)
    with pytest.raises(ArtifactError, match="none of the 1 answers") as caught:
        matched(tmp_path, {"question_id": "test-1", "text": "A"})
    assert "line 1" in caught.value.message


def test_row_numbers_of_a_table_are_no_ids(tmp_path: Path) -> None:
    rows = [cells(1, "Same?", "x", "y", "first"), cells(41, "Which?", "X ", "y", "which")]
    rows += [cells(3, "Same?", "x", "y", "second"), cells(40, "Other?", "x", "y", "other")]
    assert matched(tmp_path, *rows) == {"40": "which", "41": "first", "42": "second"}
    named = [cells(42, "Same?", "x", "y", "by id"), cells(40, "Which?", "x", "y", "too")]
    assert matched(tmp_path, *named) == {"42": "by id", "40": "too"}
    with pytest.raises(ArtifactError, match="2 questions of the data read like this one, 1 of"):
        matched(tmp_path, rows[0])


def test_samples_go_by_content_or_by_place(tmp_path: Path) -> None:
    doc = {"question": "Same?", "choices": ["y", "x"]}
    assert matched(tmp_path, {"doc_id": 0, "resps": ["r"], "doc": doc}) == {"43": "r"}
    twins = {"question": "Same?", "choices": ["x", "y"]}
    later, first = ({"doc_id": n, "resps": [f"{n}"], "doc": twins} for n in (8, 3))
    assert matched(tmp_path, later, first) == {"41": "3", "42": "8"}
    part = {"doc_id": 2, "resps": ["r"], "doc": twins}  # of a log with a limit
    assert matched(tmp_path, part) == {"42": "r"}
    by_place = [{"doc_id": 2, "resps": ["r"], "target": "B"}, {"doc_id": 9, "resps": ["s"]}]
    assert matched(tmp_path, *by_place) == {"42": "r"}
    with pytest.raises(ArtifactError, match="its gold answer is B, that of question 41 is A"):
        matched(tmp_path, {"doc_id": 1, "resps": ["r"], "target": "B"})
