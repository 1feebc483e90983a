from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from qatbench.errors import ArtifactError, PrerequisiteError, UsageError
from qatbench.tasks import scienceqa

METADATA = {
    "task": "closed choice",
    "grade": "grade4",
    "subject": "natural science",
    "topic": "biology",
    "category": "Plants",
    "skill": "Name the part",
    "lecture": "",
    "solution": "",
}


def problem(question: str, split: str, **changes: Any) -> dict[str, Any]:
    row = {"question": question, "choices": ["leaf", "root", "stem"], "answer": 1, "hint": ""}
    return row | {"image": None, "split": split} | METADATA | changes


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (3, 2), (200, 30, 30)).save(buffer, format="PNG")
    return buffer.getvalue()


@pytest.fixture
def original(tmp_path: Path) -> Path:
    """Four rows in the original layout; of the two image files one is missing."""
    problems = {
        "7": problem("What drinks water?", "test", hint="A plant."),
        "3": problem("What is red here?", "test", image="image.png", subject=None, topic=""),
        "12": problem("What is it?", "test", image="image.png", choices=["yes", "no"], answer=0),
        "1": problem("What is a leaf?", "train"),
        "2": problem("What is a stem?", "val"),
    }
    splits = {"train": ["1"], "val": ["2"], "test": ["12", "3", "7"], "minitest": ["3"]}
    (tmp_path / "problems.json").write_text(json.dumps(problems))
    (tmp_path / "pid_splits.json").write_text(json.dumps(splits))
    image = tmp_path / "images" / "test" / "3" / "image.png"
    image.parent.mkdir(parents=True)
    image.write_bytes(png())
    return tmp_path


def write_parquet(file: Path, rows: list[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    rows = [{k: v for k, v in row.items() if k != "split"} for row in rows]
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    columns = {name: pa.array([row[name] for row in rows]) for name in rows[0]}
    columns["image"] = pa.array([row["image"] for row in rows], type=image)
    columns["answer"] = pa.array([row["answer"] for row in rows], type=pa.int8())
    pq.write_table(pa.table(columns), file)


# --- from_row -----------------------------------------------------------------------------------


def test_a_row_becomes_a_question() -> None:
    row = problem("  What is  it? ", "test", hint=" padded ")

    got = scienceqa.from_row(row, pid="9")

    assert (got.id, got.task, got.split) == ("9", "scienceqa", "test")
    assert (got.text, got.hint) == ("  What is  it? ", " padded ")  # cleaning is the prompt's
    assert got.options == {"A": "leaf", "B": "root", "C": "stem"}
    assert got.gold == "B"
    assert (got.subject, got.topic, got.category) == ("natural science", "biology", "Plants")
    assert (got.skill, got.grade) == ("Name the part", "grade4")
    assert not got.has_image


def test_absent_null_and_empty_metadata_are_none() -> None:
    row = {"question": "q", "choices": ["x", "y"], "answer": 0, "subject": None, "grade": ""}

    got = scienceqa.from_row(row, pid="9")

    assert got.subject is got.topic is got.category is got.skill is got.grade is got.split is None
    assert got.hint == ""


def test_a_row_without_an_answer_has_no_gold() -> None:
    assert scienceqa.from_row({"question": "q", "choices": ["x", "y"]}, pid="9").gold is None


@pytest.mark.parametrize("root", [None, Path("data/images")])
def test_an_image_name_is_a_path_below_the_root(root: Path | None) -> None:
    row = problem("q", "val", image="image.png")

    got = scienceqa.from_row(row, pid="9", image_root=root)

    assert got.image == (root or Path()) / "val/9/image.png"


def test_an_image_of_a_hub_row_is_its_bytes() -> None:
    picture = Image.open(io.BytesIO(png()))
    with_bytes = scienceqa.from_row(
        problem("q", "val", image={"bytes": b"abc", "path": "image.png"}), pid="9"
    )
    decoded = scienceqa.from_row(problem("q", "val", image=picture), pid="9")
    four_inks = scienceqa.from_row(problem("q", "val", image=picture.convert("CMYK")), pid="9")

    assert with_bytes.image == b"abc"
    for question in (decoded, four_inks):
        assert isinstance(question.image, bytes)
        assert Image.open(io.BytesIO(question.image)).size == (3, 2)
    assert Image.open(io.BytesIO(decoded.image)).tobytes() == picture.tobytes()


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("answer", {"answer": 3}),
        ("answer", {"answer": -1}),
        ("answer", {"answer": "1"}),
        ("answer", {"answer": 1.0}),
        ("answer", {"answer": True}),
        ("answer", {"answer": None}),
        ("choices", {"choices": ["only"]}),
        ("choices", {"choices": ["x"] * 27}),
        ("choices", {"choices": "xy"}),
        ("choices", {"choices": None}),
        ("choices", {"choices": ["x", 2]}),
        ("question", {"question": None}),
        ("question", {"question": 5}),
        ("hint", {"hint": ["h"]}),
        ("subject", {"subject": 1}),
        ("image", {"image": 3}),
        ("image", {"image": {"bytes": None, "path": None}}),
        ("image", {"image": "../image.png"}),
        ("split", {"image": "image.png", "split": None}),
    ],
)
def test_a_bad_row_names_pid_and_field(field: str, changes: dict[str, Any]) -> None:
    with pytest.raises(ArtifactError, match=rf"row p81: {field}\b"):
        scienceqa.from_row(problem("q", "test") | changes, pid="p81")


@pytest.mark.parametrize("field", ["question", "choices"])
def test_a_row_needs_question_and_choices(field: str) -> None:
    row = problem("q", "test")
    del row[field]
    with pytest.raises(ArtifactError, match=f"row p81: {field} is missing"):
        scienceqa.from_row(row, pid="p81")


# --- the original layout ------------------------------------------------------------------------


def test_the_order_is_that_of_the_split_list(original: Path) -> None:
    got = scienceqa.load(original, "test")

    assert [q.id for q in got] == ["12", "3", "7"]
    assert [q.image is not None and q.image.is_file() for q in got] == [False, True, False]
    assert got[1].image == original / "images/test/3/image.png"
    assert (got[1].subject, got[1].topic) == (None, None)


def test_subsets_go_by_the_record_not_by_the_file(original: Path) -> None:
    assert [q.id for q in scienceqa.load(str(original), "test", subset="image")] == ["12", "3"]
    assert [q.id for q in scienceqa.load(str(original), "test", subset="text")] == ["7"]


def test_other_splits(original: Path) -> None:
    assert [q.id for q in scienceqa.load(original, "minitest")] == ["3"]
    assert [q.id for q in scienceqa.load(original, "validation")] == ["2"]
    assert [q.id for q in scienceqa.load(original, "trainval")] == ["1", "2"]


def test_an_unknown_split_lists_those_there(original: Path) -> None:
    with pytest.raises(UsageError, match="no split 'dev'") as caught:
        scienceqa.load(original, "dev")
    assert "train, val, test, minitest" in caught.value.hint


def test_an_empty_subset_is_a_usage_error(original: Path) -> None:
    with pytest.raises(UsageError, match="no question in the subset 'image'"):
        scienceqa.load(original, "train", subset="image")


@pytest.mark.parametrize(
    ("file", "content", "match"),
    [
        ("problems.json", '{"3": ', "cannot read .*problems.json"),
        ("problems.json", "\xff\xfe", "cannot read .*problems.json"),
        ("problems.json", "[1]", "problems.json is not a JSON object"),
        ("problems.json", "{}", "pid 12 of split test has no record"),
        ("pid_splits.json", "", "cannot read .*pid_splits.json"),
        ("pid_splits.json", '{"test": "3"}', "test is not a list"),
        ("pid_splits.json", '{"test": [3]}', "test is not a list"),
        ("pid_splits.json", '{"test": ["3", "3"]}', "pid 3 is listed twice"),
    ],
)
def test_damaged_files_are_artifact_errors(
    original: Path, file: str, content: str, match: str
) -> None:
    (original / file).write_bytes(content.encode("latin-1"))
    with pytest.raises(ArtifactError, match=match):
        scienceqa.load(original, "test")


def test_a_missing_split_list_is_an_artifact_error(original: Path) -> None:
    (original / "pid_splits.json").unlink()
    with pytest.raises(ArtifactError, match=r"cannot read .*pid_splits\.json"):
        scienceqa.load(original, "test")


def test_a_file_in_place_of_the_images_is_an_artifact_error(original: Path) -> None:
    (original / "images").rename(original / "away")
    assert len(scienceqa.load(original, "test")) == 3  # scoring needs no images
    (original / "images").write_text("")
    with pytest.raises(ArtifactError, match="images is not a folder"):
        scienceqa.load(original, "test")


def test_a_loaded_row_needs_its_answer(original: Path) -> None:
    problems = json.loads((original / "problems.json").read_text())
    del problems["3"]["answer"]
    (original / "problems.json").write_text(json.dumps(problems))
    with pytest.raises(ArtifactError, match="row 3: answer is missing"):
        scienceqa.load(original, "test")


@pytest.mark.parametrize("source", ["/nowhere/scienceqa", "./nowhere", Path("no/where"), "nowhere"])
def test_nothing_there_is_a_missing_prerequisite(source: str | Path) -> None:
    with pytest.raises(PrerequisiteError, match="no ScienceQA data at"):
        scienceqa.load(source, "test")


def test_a_folder_without_data_is_an_artifact_error(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="holds no ScienceQA data"):
        scienceqa.load(tmp_path, "test")


# --- parquet and the hub ------------------------------------------------------------------------


@pytest.mark.parametrize("below", ["", "data"])
def test_parquet_shards_are_one_split(tmp_path: Path, below: str) -> None:
    rows = [problem("q0", "test"), problem("q1", "test", image={"bytes": png(), "path": "x.png"})]
    write_parquet(tmp_path / below / "test-00001-of-00002.parquet", rows[1:])
    write_parquet(tmp_path / below / "test-00000-of-00002.parquet", rows[:1])
    write_parquet(tmp_path / below / "validation-00000-of-00001.parquet", [problem("v", "val")])
    write_parquet(tmp_path / below / "train-00000-of-00001.parquet", [problem("t", "train")])

    got = scienceqa.load(tmp_path, "test")

    assert [(q.id, q.text, q.split, q.gold) for q in got] == [
        ("test-0", "q0", "test", "B"),
        ("test-1", "q1", "test", "B"),
    ]
    assert [q.image for q in got] == [None, png()]
    assert [q.id for q in scienceqa.load(tmp_path, "test", subset="image")] == ["test-1"]
    for name in ("val", "validation"):
        assert [q.id for q in scienceqa.load(tmp_path, name)] == ["val-0"]
    assert [q.id for q in scienceqa.load(tmp_path, "trainval")] == ["train-0", "val-0"]
    with pytest.raises(UsageError, match="no split 'dev'") as caught:
        scienceqa.load(tmp_path, "dev")
    assert "test, train, val" in caught.value.hint


def test_shards_of_older_uploads_have_a_hash(tmp_path: Path) -> None:
    names = ("test-00000-of-00002-f0e719df791966ff", "test-00001-of-00002-1028f23e353fbe3e")
    for name in names:
        write_parquet(tmp_path / "data" / f"{name}.parquet", [problem(name, "test")])
    assert [(q.id, q.text) for q in scienceqa.load(tmp_path, "test")] == [
        ("test-0", names[0]),
        ("test-1", names[1]),
    ]
    assert scienceqa.splits(tmp_path) == ["test"]


def test_one_parquet_file(tmp_path: Path) -> None:
    file = tmp_path / "test-00000-of-00001.parquet"
    write_parquet(file, [problem("q", "test")])
    assert [q.id for q in scienceqa.load(file, "test")] == ["test-0"]
    with pytest.raises(UsageError, match="no split 'train'"):
        scienceqa.load(file, "train")


def test_a_missing_shard_is_an_artifact_error(tmp_path: Path) -> None:
    write_parquet(tmp_path / "test-00000-of-00002.parquet", [problem("q", "test")])
    with pytest.raises(ArtifactError, match="has 1 of its 2 parquet files"):
        scienceqa.load(tmp_path, "test")


def test_a_broken_parquet_file_is_an_artifact_error(tmp_path: Path) -> None:
    (tmp_path / "test.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(ArtifactError, match=r"cannot read .*test\.parquet"):
        scienceqa.load(tmp_path, "test")


def test_an_unreachable_hub_is_a_missing_prerequisite(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # refused at once
    with pytest.raises(PrerequisiteError, match="cannot be reached") as caught:
        scienceqa.load("derek-thomas/ScienceQA", "test")
    assert "HF_HUB_OFFLINE" in caught.value.hint


def test_hub_rows_keep_their_encoded_images(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    from huggingface_hub import constants

    rows = [problem("q0", "test", image={"bytes": png(), "path": None}), problem("q1", "test")]
    table = datasets.Dataset.from_list([{k: v for k, v in r.items() if k != "split"} for r in rows])
    table = table.cast_column("image", datasets.Image())
    splits = datasets.DatasetDict(validation=table)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets, "load_dataset", lambda name: splits)

    got = scienceqa.load("owner/name", "val")

    assert [(q.id, q.image) for q in got] == [("val-0", png()), ("val-1", None)]


@pytest.mark.parametrize(
    ("source", "asked"),
    [
        ("derek-thomas/ScienceQA", ("derek-thomas/ScienceQA",)),
        ("lmms-lab/ScienceQA", ("lmms-lab/ScienceQA", "ScienceQA-FULL")),
        ("lmms-lab-encoder/ScienceQA", ("lmms-lab-encoder/ScienceQA", "ScienceQA-FULL")),
        ("lmms-lab/ScienceQA/ScienceQA-IMG", ("lmms-lab/ScienceQA", "ScienceQA-IMG")),
    ],
)
def test_a_hub_id_may_name_a_configuration(
    monkeypatch: pytest.MonkeyPatch, source: str, asked: tuple[str, ...]
) -> None:
    import datasets
    from huggingface_hub import constants

    def fake(*names: str) -> Any:
        assert names == asked
        row = {k: v for k, v in problem("q", "test").items() if k not in ("split", "image")}
        return {"test": datasets.Dataset.from_list([row])}

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets, "load_dataset", fake)
    assert [q.id for q in scienceqa.load(source, "test")] == ["test-0"]


def test_configurations_of_a_snapshot(tmp_path: Path) -> None:
    write_parquet(tmp_path / "ScienceQA-IMG/test-00000-of-00001.parquet", [problem("i", "test")])
    assert [q.text for q in scienceqa.load(tmp_path, "test")] == ["i"]
    write_parquet(tmp_path / "ScienceQA-FULL/test-00000-of-00001.parquet", [problem("f", "test")])
    with pytest.raises(UsageError, match="configurations: ScienceQA-FULL, ScienceQA-IMG") as caught:
        scienceqa.load(tmp_path, "test")
    assert caught.value.hint.endswith(f"--data scienceqa={tmp_path / 'ScienceQA-FULL'}")
    assert [q.text for q in scienceqa.load(tmp_path / "ScienceQA-IMG", "test")] == ["i"]


@pytest.mark.parametrize("text", ["nan", "None", "NA", "N/A", "null", "NULL", "#N/A"])
def test_every_text_of_a_choice_is_kept(original: Path, tmp_path: Path, text: str) -> None:
    row = problem(text, "test", choices=[text, "x"], answer=0, hint=text)
    write_parquet(tmp_path / "p" / "test.parquet", [row])
    (original / "problems.json").write_text(json.dumps({"3": row}))
    (original / "pid_splits.json").write_text(json.dumps({"test": ["3"]}))
    for source in (tmp_path / "p", original):
        (got,) = scienceqa.load(source, "test")
        assert (got.text, got.options, got.hint) == (text, {"A": text, "B": "x"}, text)


def test_what_the_hub_client_raises_is_a_missing_prerequisite(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import datasets
    from huggingface_hub import constants

    def fail(name: str) -> None:
        raise ConnectionError(name)

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(PrerequisiteError, match="cannot load owner/name from the hub"):
        scienceqa.load("owner/name", "test")


def test_the_data_may_not_be_passed_on_and_torch_is_not_imported() -> None:
    assert scienceqa.SHAREABLE is False
    code = "import sys, qatbench.tasks.selector, qatbench.tasks.protocols; "
    check = "sys.exit(any(m in sys.modules for m in ('torch', 'datasets', 'pyarrow')))"
    root = Path(__file__).resolve().parents[2]
    subprocess.run([sys.executable, "-c", code + check], check=True, cwd=root)


# --- the real data ------------------------------------------------------------------------------


@pytest.mark.parity
def test_counts_of_the_real_test_split(shared_dir: Path) -> None:
    questions = scienceqa.load(shared_dir / "data/scienceqa", "test")
    with_image = [q for q in questions if q.has_image]
    text_only = scienceqa.load(shared_dir / "data/scienceqa", "test", subset="text")

    assert len(questions) == 4241
    assert len(with_image) == 2017
    assert sum(isinstance(q.image, Path) and q.image.is_file() for q in with_image) == 204
    assert len(text_only) == 2224
    chance = sum(q.chance for q in text_only) / len(text_only)
    assert chance == pytest.approx(0.4408, abs=5e-5)  # published with four digits
    assert sum(q.subject is not None for q in questions) == 456
    assert len(scienceqa.load(shared_dir / "data/scienceqa", "trainval")) == 721
