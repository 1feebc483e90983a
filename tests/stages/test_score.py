"""Answers made elsewhere, scored: by hand, against the originals and against published figures."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from qatbench import store
from qatbench.cli import main
from qatbench.errors import ArtifactError, UsageError
from qatbench.records import LETTERS, Metrics, Question
from qatbench.stages.compare import compare
from qatbench.stages.score import prediction, score, write
from qatbench.tasks import protocols
from qatbench.tasks.answers import Answer

GROUPS = {
    "NAT": "acc_natural",
    "SOC": "acc_social",
    "LAN": "acc_language",
    "TXT": "acc_has_text",
    "IMG": "acc_has_image",
    "NO": "acc_no_context",
    "G1-6": "acc_grade_1_6",
    "G7-12": "acc_grade_7_12",
}


def lines(file: Path) -> list[dict[str, Any]]:
    with file.open(encoding="utf-8") as handle:
        return [json.loads(line) for line in handle]


def problem(answer: int, *, image: bool = False, hint: str = "", **more: Any) -> dict[str, Any]:
    row = {"choices": ["red", "green", "blue"], "answer": answer, "hint": hint, "split": "test"}
    return row | {"image": "image.png" if image else None} | more


PROBLEMS = {
    "1": problem(0, image=True, subject="natural science", grade="grade2", topic="physics"),
    "2": problem(1, image=True, hint="h", subject="social science", grade="grade12"),
    "3": problem(2, hint="h", subject=None, grade=None),
    "4": problem(0, subject="language science", grade="grade6", topic="physics"),
    "5": problem(0) | {"split": "val"},
}


def science(folder: Path, problems: Mapping[str, Any] = PROBLEMS) -> str:
    """ScienceQA in the least of its layout: no images, no texts, no pid_splits.json."""
    folder.mkdir(exist_ok=True)
    (folder / "problems.json").write_text(json.dumps(problems))
    return str(folder)


def llava(file: Path, rows: Sequence[tuple[str, str, bool]]) -> Path:
    said = [
        {"question_id": name, "text": text, "prompt": "<image>\nx" if image else "x"}
        for name, text, image in rows
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in said))
    return file


def table(file: Path, rows: Sequence[Mapping[str, Any]], *without: str) -> Path:
    columns = [name for name in rows[0] if name not in without]
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, columns, delimiter="\t", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    return file


def bench(index: int, answer: str, said: str | None, **more: Any) -> dict[str, Any]:
    row = {"index": index, "A": "red", "B": "green", "answer": answer, "prediction": said}
    return row | {"category": "ocr", "l2-category": "coarse_perception", "split": "dev"} | more


PASSES = [
    bench(1, "A", "A"),
    bench(1000001, "B", "B"),
    bench(2, "B", "B", category="colour"),
    bench(1000002, "A", "B", category="colour"),
    bench(3, "A", "?"),
    bench(1000003, "B", "B"),
]


# --- ScienceQA ----------------------------------------------------------------------------------


def test_every_figure_of_a_small_set(tmp_path: Path) -> None:
    file = tmp_path / "choices.json"
    file.write_text(json.dumps({"results": {"1": 0, "2": 0, "3": 2, "4": -1}}))
    scored = score(file, "scienceqa", "scienceqa-official-breakdown", science(tmp_path / "d"), None)
    got = scored.as_json()
    assert (got["overall"], got["n"], got["right"], got["unparsed"]) == (0.5, 4, 2, 1)
    assert (got["image"], got["text"]) == (0.5, 0.5)
    assert [got[name] for name in GROUPS] == [1.0, 0.0, 0.0, 0.5, 0.5, 0.0, 0.5, 0.0]
    assert got["topic"] == {"physics": 0.5}
    assert got["counts"]["official"]["TXT"] == {"n": 2, "right": 1}
    assert got["without_metadata"] == {"subject": 1, "grade": 1}
    assert "answered_only" not in got
    assert got["unit"] == "question"
    assert any("nothing is extracted" in note for note in scored.notes())
    assert sum("1 of 4 questions have no" in note for note in scored.notes()) == 2


def test_llava_counts_a_missing_answer_and_drops_it_from_the_image_part(tmp_path: Path) -> None:
    rows = [("1", "C", True), ("1", "A", True), ("3", "C", True), ("9", "A", True)]
    file, data = llava(tmp_path / "a.jsonl", rows), science(tmp_path / "d")
    scored = score(file, "scienceqa:test", "llava-sqa", data, None)
    got = scored.as_json()
    assert (got["overall"], got["answered_only"]) == (0.5, 1.0)
    assert (got["missing"], got["unknown"], got["repeated"]) == (2, 1, 1)
    assert got["image"] == 1.0  # 1 and 3, whose prompts have the mark; 2 is missing
    assert got["counts"]["modality"] == {"image": {"n": 2, "right": 2}}
    assert got["text"] is None
    assert got["IMG"] == 0.5  # 1 and 2, as the data say
    assert any("neither image nor text" in note for note in scored.notes())
    other = score(file, "scienceqa", "lmms-sqa", data, None).as_json()
    assert (other["image"], other["text"]) == (0.5, 0.5)


def test_columns_that_the_data_lack_make_no_figures(tmp_path: Path) -> None:
    file, rows = tmp_path / "a.json", {k: dict(v) for k, v in PROBLEMS.items()}
    file.write_text(json.dumps({"1": 0, "2": 1}))
    for row in rows.values():
        del row["image"], row["hint"]
    got = score(file, "scienceqa", "grace-sqa", science(tmp_path / "d", rows), None).as_json()
    assert got["overall"] == 0.5
    assert "image" not in got
    assert [got[name] for name in ("NAT", "TXT", "IMG", "NO")] == [1.0, None, None, None]


def test_parts_and_splits(tmp_path: Path) -> None:
    file, data = tmp_path / "a.json", science(tmp_path / "d")
    file.write_text(json.dumps({"1": 0, "2": 1, "5": 0}))
    assert score(file, "scienceqa", "grace-sqa", data, "test:image").as_json()["overall"] == 1.0
    for name in ("val", "validation"):
        assert score(file, "scienceqa", "grace-sqa", data, name).as_json()["n"] == 1
    (tmp_path / "d" / "pid_splits.json").write_text(json.dumps({"test": ["1"], "val": []}))
    assert score(file, "scienceqa", "grace-sqa", data, None).as_json()["n"] == 1
    for split in ("train", "val"):
        with pytest.raises(UsageError, match="no split"):
            score(file, "scienceqa", "grace-sqa", data, split)


def test_answers_to_other_data_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text(json.dumps({"70": 0, "71": 1}))
    with pytest.raises(ArtifactError, match="none of the 2 answers"):
        score(file, "scienceqa", "grace-sqa", science(tmp_path / "d"), None)


# --- MMBench ------------------------------------------------------------------------------------


def test_the_three_ways_of_counting(tmp_path: Path) -> None:
    data, file = table(tmp_path / "d.tsv", PASSES, "prediction"), table(tmp_path / "a.tsv", PASSES)
    circular = score(file, "mmbench", "lmms-mmbench-openai", str(data), None).as_json()
    rows = score(file, "mmbench", "grace-mmbench", str(data), None).as_json()
    for got in (circular, rows):
        assert (got["circular"], got["vanilla_pass_0"]) == (
            pytest.approx(1 / 3),
            pytest.approx(2 / 3),
        )
        assert got["all_rows"] == pytest.approx(4 / 6)
        assert got["unparsed"] == 1
        assert "image" not in got  # the table does not tell
    assert (circular["overall"], circular["n"]) == (pytest.approx(1 / 3), 3)
    assert (rows["overall"], rows["n"]) == (pytest.approx(4 / 6), 6)
    assert circular["category"] == {"colour": 0.0, "ocr": 0.5}
    assert rows["category"] == {"colour": 0.5, "ocr": 0.75}
    assert circular["l2_category"] == {"coarse_perception": pytest.approx(1 / 3)}
    assert (circular["unit"], rows["unit"]) == ("circular question", "row")
    theirs = score(file, "mmbench", "vlmevalkit-exact", str(data), None).as_json()
    assert theirs["by_split"]["dev"]["CP"] == theirs["overall"] == theirs["l2_category"]["CP"]


def test_options_may_be_in_either_file_and_a_table_may_be_its_own_data(tmp_path: Path) -> None:
    bare = table(tmp_path / "d.tsv", PASSES, "prediction", "A", "B")
    said = [
        row | {"prediction": {"A": "red", "B": "green"}.get(row["prediction"])} for row in PASSES
    ]
    whole, short = table(tmp_path / "a.tsv", said), tmp_path / "short.tsv"
    got = [score(whole, "mmbench", "vlmevalkit-exact", source, None).as_json()["overall"]
           for source in (str(bare), str(whole), None)]  # fmt: skip
    table(short, said, "A", "B", "answer", "split")
    got.append(score(short, "mmbench", "vlmevalkit-exact", str(whole), None).as_json()["overall"])
    assert got == [pytest.approx(1 / 3)] * 4


def test_a_missing_pass_is_not_right_and_the_evaluator_s_own_figure_stands_beside(
    tmp_path: Path,
) -> None:
    data = table(tmp_path / "d.tsv", PASSES, "prediction")
    file = table(tmp_path / "a.tsv", [row for row in PASSES if row["index"] != 1000002])
    scored = score(file, "mmbench", "vlmevalkit-exact", str(data), "dev")
    got = scored.as_json()
    assert (got["missing"], got["unparsed"]) == (1, 1)
    assert got["overall"] == pytest.approx(1 / 3)
    assert got["answered_only"] == pytest.approx(2 / 3)  # questions 1 and 2
    assert any("1 of 6 rows of the data have no answer" in note for note in scored.notes())


def test_rows_without_a_gold_answer_are_left_out(tmp_path: Path) -> None:
    more = [*PASSES, bench(8, "", "A", split="test")]
    data, file = table(tmp_path / "d.tsv", more), table(tmp_path / "a.tsv", more)
    scored = score(file, "mmbench", "vlmevalkit-exact", str(data), None)
    assert (scored.as_json()["n"], scored.as_json()["no_gold"]) == (3, 1)
    for name in ("dev", "val", "validation"):
        assert score(file, "mmbench", "vlmevalkit-exact", str(data), name).as_json()["n"] == 3
    with pytest.raises(UsageError, match="no gold answers"):
        score(file, "mmbench", "vlmevalkit-exact", str(data), "test")
    with pytest.raises(UsageError, match="no split 'train'"):
        score(file, "mmbench", "vlmevalkit-exact", str(data), "train")


def test_other_options_than_the_data_s_are_said(tmp_path: Path) -> None:
    data = table(tmp_path / "d.tsv", PASSES, "prediction")
    file = table(tmp_path / "a.tsv", [PASSES[0] | {"B": "grün"}, *PASSES[1:]])
    scored = score(file, "mmbench", "vlmevalkit-exact", str(data), None)
    assert scored.as_json()["other_options"] == 1
    assert any("another version or language" in note for note in scored.notes())


def test_no_first_pass_is_a_usage_error(tmp_path: Path) -> None:
    file = table(tmp_path / "a.tsv", [PASSES[1]])
    with pytest.raises(UsageError, match="has its first pass"):
        score(file, "mmbench", "vlmevalkit-exact", str(file), None)


# --- a run folder -------------------------------------------------------------------------------


def test_a_scoring_is_a_run_that_compare_reads(tmp_path: Path) -> None:
    data, runs = science(tmp_path / "d"), []
    for name, texts in {"one": ["A", "B", "C", "B"], "two": ["A", "x", "C", "A"]}.items():
        file = llava(
            tmp_path / f"{name}.jsonl", [(str(n + 1), t, n < 2) for n, t in enumerate(texts)]
        )
        runs.append(tmp_path / name)
        scored = score(file, "scienceqa", "llava-sqa", data, None)
        write(scored, file, runs[-1])
        write(scored, file, runs[-1])  # the same again changes nothing
        (stated,) = Metrics.model_validate(store.read_json(runs[-1] / "metrics.json")).tasks
        assert stated == scored.metrics
        assert {row.raw for row in store.read_predictions(runs[-1] / "predictions.jsonl")} == {None}
    with pytest.raises(ArtifactError, match="other settings"):
        write(scored, tmp_path / "one.jsonl", runs[1])
    (task,) = compare(runs, runs[0]).tasks
    assert [arm.accuracy for arm in task.arms] == [0.75, 0.75]
    assert [arm.unparsed for arm in task.arms] == [(0,), (1,)]
    assert task.definition.protocol == ("llava-sqa",)


# --- the command --------------------------------------------------------------------------------


def command(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main([str(part) for part in arguments])
    printed = capsys.readouterr()
    return int(ended.value.code or 0), printed.out, printed.err


def test_the_command_s_two_outputs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, data = llava(tmp_path / "a.jsonl", [("1", "A", True)]), science(tmp_path / "d")
    asked = ("score", file, "--task", "scienceqa", "--protocol", "llava-sqa", "--data", data)
    code, out, err = command(capsys, *asked, "--json", "--out", tmp_path / "run")
    value = json.loads(out)
    assert (code, value["overall"], value["missing"]) == (0, 0.25, 3)
    assert "next: qatbench compare" in err
    code, out, err = command(capsys, *asked)
    assert code == 0
    assert "25.00" in out
    assert "note: 3 of 4 rows" in err
    assert "next: qatbench protocols llava-sqa" in err
    code, _, err = command(capsys, *asked[:-1], f"mmbench={data}")
    assert (code, err.splitlines()[1][:5]) == (2, "hint:")
    assert command(capsys, "score", file, "--task", "x", "--protocol", "llava-sqa")[0] == 2
    assert command(capsys, "score", tmp_path / "no", *asked[2:])[0] == 3
    (tmp_path / "a.jsonl").write_text('{"question_id": 1}\n')
    code, _, err = command(capsys, *asked)
    assert (code, "a.jsonl, line 1: text is missing" in err) == (4, True)


def test_a_run_of_this_tool_is_scored_as_it_scored_itself(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, run = science(tmp_path / "d"), tmp_path / "run"
    run.mkdir()
    row = {"task": "scienceqa", "choices": ["A", "B", "C"], "gold": "A", "status": "ok"}
    said = [row | {"id": "1", "chosen": "A", "raw": "B."}, row | {"id": "2", "chosen": "B"}]
    said.append(row | {"id": "3", "chosen": None, "status": "error"})
    asked = ("score", run, "--task", "scienceqa", "--data", data, "--json", "--protocol")
    for file, right in (("predictions.jsonl", 2), ("responses.jsonl", 1)):
        rows = said if file == "responses.jsonl" else [{**one, "raw": None} for one in said]
        (run / file).write_text("".join(json.dumps(one) + "\n" for one in rows))
        _, out, _ = command(capsys, *asked, "lmms-sqa")
        value = json.loads(out)
        assert (value["right"], value["missing"], value["unparsed"]) == (right, 2, 0)


# --- against the originals ----------------------------------------------------------------------


@pytest.mark.parity
def test_every_reference_vector_through_the_scorer(shared_dir: Path) -> None:
    wrong, checked = [], 0
    for vector in lines(shared_dir / "fixtures/scoring/vectors.jsonl"):
        options = dict(zip(LETTERS, vector["options"], strict=False))
        question = Question(id="1", task="x", text="-", options=options, gold="A")
        answer = Answer("line 1", "1", vector["response"])
        got = prediction(question, answer, protocols.get(vector["protocol"]))
        expected = vector["expected_choice_or_null"]
        checked += 1
        if (got.chosen, got.status) != (expected, "ok" if expected else "unparsed"):
            wrong.append(vector["id"])
    assert wrong == []
    assert checked == 6368


def percent(share: float | None) -> str | int:
    return -1 if share is None else f"{100 * share:.2f}"


@pytest.mark.parity
def test_scienceqa_sets_agree_with_the_originals(shared_dir: Path, tmp_path: Path) -> None:
    seen: Counter[str] = Counter()
    for case in lines(shared_dir / "fixtures/scoring/aggregates.jsonl"):
        name, problems = case["protocol"], case["problems"]
        folder = tmp_path / str(case["id"])
        data = science(folder, problems)
        if "predictions" in case:
            said = [(pid, text, bool(problems[pid]["image"])) for pid, text in case["predictions"]]
            file = llava(folder / "a.jsonl", said)
        else:
            (file := folder / "a.json").write_text(json.dumps({"results": case["results"]}))
        scored = score(file, "scienceqa", name, data, None)
        got = scored.as_json()
        chosen = {r.id: -1 if r.chosen is None else LETTERS.index(r.chosen) for r in scored.rows}
        if name == "llava-sqa":
            told = f"Total: {got['n']}, Correct: {got['right']}, "
            told += f"Accuracy: {percent(got['overall'])}%, IMG-Accuracy: {percent(got['image'])}%"
            assert told == case["printed"]
            assert chosen == case["results"]
        elif name == "grace-sqa":
            theirs = case["summary"]
            assert chosen == case["pred"]
            assert got["unparsed"] == theirs["parse_fail"]
            assert got["overall"] == pytest.approx(theirs["overall_acc"])
            mine = {kind: got["counts"][kind] for kind in ("subject", "modality", "category")}
            assert mine == {
                kind: {k: {"n": v["total"], "right": v["correct"]} for k, v in theirs[by].items()}
                for kind, by in (("subject", "by_subject"), ("modality", "by_modality"),
                                 ("category", "by_category"))
            }  # fmt: skip
        else:
            assert {by: percent(got[k]) for k, by in GROUPS.items()} == {
                by: case["scores"][by] for by in GROUPS.values()
            }
            assert percent(got["overall"]) == case["scores"]["acc_average"]
            for topic, share in got["topic"].items():
                assert percent(share) == case["scores"][f"acc_{topic}"]
        seen[name] += 1
    assert seen == {"llava-sqa": 4, "grace-sqa": 1, "scienceqa-official-breakdown": 3}


@pytest.mark.parity
def test_circular_sets_agree_with_the_originals(shared_dir: Path, tmp_path: Path) -> None:
    seen: Counter[str] = Counter()
    for case in lines(shared_dir / "fixtures/scoring/circular.jsonl"):
        data = table(tmp_path / "data.tsv", case["rows"], "prediction")
        file = table(tmp_path / "said.tsv", case["rows"])
        got = score(file, "mmbench", case["protocol"], str(data), None).as_json()
        expected = case["expected"]
        if "by_split" in expected:
            assert got["by_split"] == {k: pytest.approx(v) for k, v in expected["by_split"].items()}
        elif not case.get("random_fallback"):
            for kind in ("overall", "category", "l2_category"):
                assert got[kind] == pytest.approx(expected[kind]), (case["id"], kind)
        assert got["unparsed"] == case.get("parse_fail", got["unparsed"])
        seen["drawn" if case.get("random_fallback") else "stated"] += 1
    assert seen["stated"] == 111
    assert seen["drawn"] == 5


@pytest.mark.parity
@pytest.mark.parametrize(
    ("file", "published", "right"),
    [
        (
            "scienceqa_gpt3_final_test_QCM-ALE_2_seed_3.json.gz",
            {"overall": "75.17", "TXT": "74.68", "IMG": "67.43", "NO": "79.93"},
            3188,
        ),
        # The file's own `correct` has one fewer, 90.898 %: without an option that was drawn.
        (
            "scienceqa_test_sqa_llava_13b_v0.json.gz",
            {"overall": "90.92", "TXT": "89.49", "IMG": "88.00", "NO": "90.66"},
            3856,
        ),
    ],
)
def test_published_figures(
    shared_dir: Path,
    capsys: pytest.CaptureFixture[str],
    file: str,
    published: dict[str, str],
    right: int,
) -> None:
    asked = ["score", shared_dir / "data/answers" / file, "--task", "scienceqa", "--protocol"]
    asked += ["scienceqa-official-breakdown", "--data", shared_dir / "data/scienceqa", "--json"]
    code, out, _ = command(capsys, *asked)
    value = json.loads(out)
    assert code == 0
    assert {name: percent(value[name]) for name in published} == published
    assert (value["right"], value["n"], value["missing"]) == (right, 4241, 0)
    assert value["without_metadata"] == {"subject": 3785, "grade": 3785}
