"""data check: counts against known figures; what is missing is told apart from what is wrong."""

from __future__ import annotations

import base64
import csv
import io
import json
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
from PIL import Image

from qatbench import cli
from qatbench.errors import UsageError
from qatbench.stages import data as stage
from qatbench.stages.common import silent
from qatbench.stages.data_places import OWN, places
from qatbench.tasks import known_figures, mmbench, scienceqa, selector
from qatbench.tasks.known_figures import Figures

SMALL = Figures("small", 12, image=6, hint=6, both=6, neither=6, choices={3: 9, 4: 3})


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Releases as large as the tests' data: 12 rows a split, two circular questions."""
    monkeypatch.setattr(known_figures, "SCIENCEQA", {"train": SMALL, "test": SMALL})
    monkeypatch.setattr(known_figures, "EXPECTED", {"scienceqa": ("train", "test")})
    dev = Figures("dev", 5, 2, passes={3: 1, 2: 1})
    monkeypatch.setattr(known_figures, "DEV_2023_10", dev)


def check(*given: object, images: bool = False) -> list[stage.Checked]:
    return stage.check(places([str(one) for one in given]), images=images, progress=silent)


def one(*given: object, images: bool = False) -> tuple[stage.Checked, dict[str, stage.Part]]:
    (found,) = check(*given, images=images)
    return found, {part.split: part for part in found.parts}


def edit(folder: Path, pid: str, **changes: Any) -> None:
    file = folder / "problems.json"
    problems = json.loads(file.read_text())
    problems[pid] |= changes
    file.write_text(json.dumps(problems))


# --- ScienceQA ------------------------------------------------------------------------------------


def test_a_whole_copy_is_complete(tmp_path: Path) -> None:
    folder = tiny.save_questions(tmp_path)
    found, parts = one(folder, images=True)
    assert {name: part.state for name, part in parts.items()} == dict.fromkeys(
        ("train", "test"), "complete"
    )
    assert (found.missing, found.is_wrong) == ((), False)
    assert set(found.files) == {"problems.json", "pid_splits.json"}
    test = parts["test"]
    assert (test.missing, test.wrong, test.figures["image_here"]) == ((), (), 6)
    assert test.digest == selector.digest(scienceqa.load(folder, "test"))


def test_images_that_are_not_there_are_missing_not_wrong(tmp_path: Path) -> None:
    folder = tiny.save_questions(tmp_path, missing=("test-i2", "test-i4"))
    found, parts = one(folder, images=True)
    test = parts["test"]
    assert (test.state, found.is_wrong) == ("rows complete", False)
    assert test.missing_images == ("test/test-i2/image.png", "test/test-i4/image.png")
    assert test.missing[0].startswith("2 of 6 images, e.g. test/test-i2/image.png")
    assert parts["train"].state == "complete"


def test_rows_and_splits_that_are_not_there_are_missing(tmp_path: Path) -> None:
    folder = tiny.save_questions(tmp_path)
    splits = json.loads((folder / "pid_splits.json").read_text())
    (folder / "pid_splits.json").write_text(json.dumps({"test": splits["test"][:7]}))
    found, parts = one(folder)
    assert (parts["test"].state, found.is_wrong) == ("incomplete", False)
    assert parts["test"].missing == ("5 of the 12 rows of small",)
    assert found.missing == ("split train: none of 12 rows",)


def test_a_damaged_image_is_wrong_when_images_are_looked_at(tmp_path: Path) -> None:
    folder = tiny.save_questions(tmp_path)
    (folder / "images/test/test-i1/image.png").write_bytes(b"\x89PNG cut")
    assert not one(folder)[0].is_wrong
    found, parts = one(folder, images=True)
    assert found.is_wrong
    assert parts["test"].damaged_images == (
        "test-i1: image cannot be decoded: UnidentifiedImageError",
    )


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"image": None}, "image: 5, not 6 as in small"),
        ({"hint": ""}, "hint: 5, not 6 as in small"),
        ({"choices": ["red", "green", "blue", "grey"]}, "choices: {3: 8, 4: 4}, not"),
    ],
)
def test_a_whole_split_with_other_figures_is_wrong(
    tmp_path: Path, changes: dict[str, Any], told: str
) -> None:
    folder = tiny.save_questions(tmp_path)
    edit(folder, "test-i0", **changes)
    found, parts = one(folder)
    assert found.is_wrong
    assert any(text.startswith(told) for text in parts["test"].wrong)
    assert parts["train"].state == "complete"


def test_more_rows_than_the_release_are_wrong(tmp_path: Path) -> None:
    _, parts = one(tiny.save_questions(tmp_path, text=7))
    assert parts["test"].wrong == ("13 rows, more than the 12 of small",)


def test_ids_twice_are_wrong_and_equal_rows_are_counted(tmp_path: Path) -> None:
    folder = tiny.save_questions(tmp_path)
    problems = json.loads((folder / "problems.json").read_text())
    edit(folder, "test-t1", **problems["test-t0"])
    _, parts = one(folder)
    assert parts["test"].figures["repeated"] == 1
    splits = json.loads((folder / "pid_splits.json").read_text())
    splits["test"][1] = "test-t0"
    (folder / "pid_splits.json").write_text(json.dumps(splits))
    _, parts = one(folder)
    assert "1 ids are there twice, e.g. test-t0" in parts["test"].wrong


def test_a_damaged_split_is_wrong_and_others_are_still_counted(tmp_path: Path) -> None:
    folder = tiny.save_questions(tmp_path)
    edit(folder, "test-t0", answer=9)
    found, parts = one(folder)
    assert list(parts) == ["train"]
    assert found.wrong == ("ScienceQA row test-t0: answer is 9, outside the 3 choices",)


def test_metadata_that_are_not_there_are_told(tmp_path: Path) -> None:
    folder = tiny.save_questions(tmp_path)
    edit(folder, "test-t0", subject=None)
    _, parts = one(folder)
    assert parts["test"].state == "rows complete"
    assert parts["test"].missing[0].startswith("the subject of 1 rows")


def test_the_real_figures_are_those_of_the_paper() -> None:
    img = known_figures.scienceqa("test", only_images=True, place="x")
    assert img is not None
    assert (img.release, img.rows) == ("ScienceQA-IMG", 2017)
    whole = {"rows": 4377, "place": "mmbench_dev_20230712"}
    cases = [
        (("dev", whole), known_figures.DEV_2023_07),
        (("dev", {"rows": 4377, "place": "mine"}), known_figures.DEV_2023_07),
        (("test", {"rows": 6666, "place": "MMBench_TEST_EN"}), known_figures.TEST),
        (("test", {"rows": 2040, "place": "x"}), known_figures.CC),
        (("dev", {"rows": 9, "place": "CCBench"}), known_figures.CC),
        (("dev", {"rows": 9, "place": "MMBench_DEV_EN_V11"}), None),
    ]
    for (split, how), expected in cases:
        assert known_figures.mmbench(split, **how) is expected  # type: ignore[arg-type]
    assert sum(n * k for k, n in (known_figures.DEV_2023_07.passes or {}).items()) == 4377
    assert sum((known_figures.DEV_2023_07.passes or {}).values()) == 1176


# --- MMBench --------------------------------------------------------------------------------------

TEXTS = ["left", "right", "up"]


def passes(group: int, texts: list[str], n: int) -> list[dict[str, str]]:
    """The first passes of one question whose answer is the first text."""
    rows = []
    for turn in range(n):
        shown = texts[-turn:] + texts[:-turn] if turn else texts
        row = {"index": str(group + turn * 1_000_000), "question": f"q{group}", "split": "dev"}
        row |= dict(zip("ABC", shown, strict=False)) | {"answer": "ABC"[shown.index(texts[0])]}
        rows.append(row | {"image": picture() if not turn else str(group)})
    return rows


def picture() -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (40, 40), (9, 9, 9)).save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def write(file: Path, rows: list[dict[str, str]]) -> Path:
    names = ["index", "question", "A", "B", "C", "answer", "image", "split"]
    with file.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, names, delimiter="\t")
        writer.writeheader()
        writer.writerows(rows)
    return file


def test_questions_and_passes_of_mmbench(tmp_path: Path) -> None:
    rows = passes(1, TEXTS, 3) + passes(2, TEXTS[:2], 2)
    found, parts = one(write(tmp_path / "mmbench.tsv", rows), images=True)
    assert (found.is_wrong, parts["dev"].state) == (False, "complete")
    assert parts["dev"].figures["passes"] == {3: 1, 2: 1}
    assert (parts["dev"].figures["image_here"], parts["dev"].figures["questions"]) == (5, 2)


def test_a_whole_file_with_other_passes_is_wrong(tmp_path: Path) -> None:
    rows = passes(1, TEXTS, 3) + passes(2, TEXTS[:2], 1) + passes(3, TEXTS[:2], 1)
    found, parts = one(write(tmp_path / "mmbench.tsv", rows))
    assert found.is_wrong
    assert "questions: 3, not 2 as in dev" in parts["dev"].wrong


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda rows: rows[1].update(answer="A"), "1 questions differ between their passes, e.g."),
        (lambda rows: rows[1].update(A="other"), "1 questions differ between their passes, e.g. 1"),
        (lambda rows: rows[1].update(question="x"), "1 questions differ between their passes"),
        (lambda rows: rows[0].update(index="3000001"), "1 questions lack their first pass, e.g. 1"),
    ],
)
def test_passes_that_are_not_one_question_s_are_wrong(
    tmp_path: Path, change: Any, told: str
) -> None:
    rows = passes(1, TEXTS, 3)
    rows[1]["image"] = rows[2]["image"] = ""
    change(rows)
    _, parts = one(write(tmp_path / "mmbench.tsv", rows))
    assert any(text.startswith(told) for text in parts["dev"].wrong)


def test_a_split_without_answers_can_be_checked(tmp_path: Path) -> None:
    rows = [row | {"answer": "", "split": "test"} for row in passes(1, TEXTS, 3)]
    found, parts = one(write(tmp_path / "mmbench.tsv", rows))
    assert not found.is_wrong
    assert parts["test"].figures["unanswered"] == 3
    with pytest.raises(UsageError, match="cannot be scored here"):
        mmbench.load(tmp_path / "mmbench.tsv", "test")


# --- places ---------------------------------------------------------------------------------------


def test_a_folder_is_looked_into(tmp_path: Path) -> None:
    tiny.save_questions(tmp_path / "scienceqa")
    (tmp_path / "mmbench").mkdir()
    file = write(tmp_path / "mmbench" / "x.tsv", passes(1, TEXTS, 3))
    found = places([str(tmp_path)])
    assert [(p.task, p.path) for p in found] == [
        ("scienceqa", tmp_path / "scienceqa"),
        ("mmbench", file),
    ]
    assert places([f"mmbench={tmp_path}"]) == [found[1]]


def test_parquet_is_told_by_its_columns(tmp_path: Path) -> None:
    for name, columns in (("en", ["index", "A"]), ("data", ["choices"]), ("other", ["x"])):
        (tmp_path / name).mkdir()
        table = pa.table({column: ["1"] for column in columns})
        pq.write_table(table, tmp_path / name / "dev-00000-of-00001.parquet")
    found = {(p.task, p.path) for p in places([str(tmp_path)])}
    assert found == {("mmbench", tmp_path / "en"), ("scienceqa", tmp_path)}


def test_own_questions_and_drawn_ones_have_no_known_figures(tmp_path: Path) -> None:
    file = tmp_path / "my.jsonl"
    file.write_text(json.dumps({"question": "q", "options": ["x", "y"], "answer": 0}))
    found, parts = one(file)
    assert (found.place.task, parts["all"].state, parts["all"].known) == (OWN, "readable", None)
    folder = tiny.save_questions(tmp_path / "drawn", text=20)
    (folder / "LICENSE").write_text("of this drawn benchmark")
    assert {part.state for part in one(folder)[1].values()} == {"readable"}


def test_what_is_not_here_may_be_a_hub_id() -> None:
    told = {
        text: places([text])[0].absent or "" for text in ("owner/name/cn", "./gone/data", "gone")
    }
    assert {text for text, why in told.items() if "if it is a hub id" in why} == {"owner/name/cn"}
    assert all("is not here" in why for why in told.values())


def test_an_unknown_task_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="no task 'sciencqa'"):
        places(["sciencqa=DIR"])


# --- the command ----------------------------------------------------------------------------------


@pytest.fixture
def qatbench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> Any:
    work = tmp_path / "cwd"
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setattr(sys, "argv", ["qatbench"])

    def call(*args: object) -> tuple[object, str, str]:
        with pytest.raises(SystemExit) as ended:
            cli.main([str(arg) for arg in args])
        return ended.value.code, *capsys.readouterr()

    return call


def test_exit_codes_and_json(qatbench: Any, tmp_path: Path) -> None:
    folder = tiny.save_questions(tmp_path / "here", missing=("test-i0",))
    code, out, err = qatbench("data", "check", "--data", folder, "--json")
    (place,) = json.loads(out)["places"]
    assert code == 0
    assert [part["state"] for part in place["parts"]] == ["complete", "rows complete"]
    assert place["parts"][1]["missing_images"] == ["test/test-i0/image.png"]
    assert "next: qatbench eval MODEL --task scienceqa --data" in err
    for secret in (tiny.SECRET_HINT, "Which animal"):
        assert secret not in out
    (folder / "pid_splits.json").write_text("{")
    code, out, _ = qatbench("data", "check", "--data", folder)
    assert code == 1
    assert "wrong: cannot read" in out
    code, out, err = qatbench("data", "check")
    assert (code, "absent: data is not here" in out) == (3, True)
    assert "next: qatbench data fetch scienceqa" in err


def test_without_a_path_the_fetched_data_are_checked(qatbench: Any) -> None:
    tiny.save_questions(Path("data/scienceqa"))
    code, out, _ = qatbench("data", "check")
    assert code == 0
    assert "12 of 12" in out


@pytest.mark.parity
def test_the_real_data(shared_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    science, bench = check(shared_dir / "data")
    parts = {part.split: part for part in science.parts}
    assert not science.is_wrong
    assert (parts["test"].state, parts["train"].state) == ("rows complete", "incomplete")
    assert parts["test"].figures["rows"] == parts["test"].known == 4241
    assert (parts["test"].figures["image_here"], parts["test"].figures["image"]) == (204, 2017)
    assert len(parts["test"].missing_images) == 1813
    assert (parts["train"].figures["rows"], parts["train"].known) == (541, 12726)
    assert [part.known for part in bench.parts] == [4329, 6666]
