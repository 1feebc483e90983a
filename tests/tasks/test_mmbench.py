from __future__ import annotations

import base64
import csv
import io
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from qatbench.errors import ArtifactError, PrerequisiteError, UsageError
from qatbench.tasks import mmbench, selector

SECRET = "Which  of the leaves is red? "
COLUMNS = ["index", "question", "hint", *"ABCD", "answer", "category", "image", "source"]
COLUMNS += ["l2-category", "comment", "split"]


def png(shade: int = 30) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (200, shade, 30)).save(buffer, format="PNG")
    return buffer.getvalue()


def encoded(shade: int = 30) -> str:
    return base64.b64encode(png(shade)).decode()


def line(index: object, **changes: Any) -> dict[str, Any]:
    row = {"index": index, "question": SECRET, "A": "left", "B": "right", "answer": "B"}
    row |= {"category": "ocr", "l2-category": "coarse_perception", "image": encoded()}
    return row | {"split": "dev"} | {name.replace("_", "-"): v for name, v in changes.items()}


def write(file: Path, rows: Sequence[Mapping[str, Any]], columns: Sequence[str] = COLUMNS) -> Path:
    with file.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, columns, delimiter="\t", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    return file


# --- from_row -----------------------------------------------------------------------------------


def test_a_row_becomes_a_question() -> None:
    row = line("2000241", hint=" padded ", C=None, D="", source=None)

    got = mmbench.from_row(row)

    assert (got.id, got.task, got.split) == ("2000241", "mmbench", "dev")
    assert (got.text, got.hint) == (SECRET, " padded ")  # cleaning is the prompt's
    assert (got.options, got.gold) == ({"A": "left", "B": "right"}, "B")
    assert (got.category, got.l2_category) == ("ocr", "coarse_perception")
    assert (got.group, got.circular_pass) == ("241", 2)
    assert got.image == png()


def test_options_may_have_a_gap_and_a_fifth_letter() -> None:
    got = mmbench.from_row({"index": 0, "question": "q", "A": "x", "C": "y", "E": "z"})
    assert (got.options, got.gold) == ({"A": "x", "C": "y", "E": "z"}, None)
    assert (got.id, got.group, got.circular_pass) == ("0", "0", 0)
    assert not got.has_image


def test_nan_is_a_missing_hint_and_on_the_hub_a_missing_option() -> None:
    cells = {"index": 1, "question": "q", "hint": "nan", "A": "x", "B": "y", "C": "nan"}
    table, hub = mmbench.from_row(cells), mmbench.from_row(cells | {"L2-category": "logic"})
    assert (table.hint, hub.hint) == ("", "")
    assert (list(table.options), list(hub.options)) == (["A", "B", "C"], ["A", "B"])
    assert hub.l2_category == "logic"
    assert (
        mmbench.from_row(cells | {"hint": float("nan"), "C": float("nan")}).options == hub.options
    )


def test_the_hub_s_image_is_its_bytes() -> None:
    got = mmbench.from_row(line(1, image={"bytes": b"abc", "path": None}))
    assert got.image == b"abc"


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("index", {"index": None}),
        ("index", {"index": SECRET}),
        ("index", {"index": -1}),
        ("index", {"index": 1.0}),
        ("index", {"index": True}),
        ("question", {"question": None}),
        ("question", {"question": ""}),
        ("question", {"question": 5}),
        ("options", {"B": None}),
        ("B", {"B": 3}),
        ("answer", {"answer": "C"}),
        ("answer", {"answer": "b"}),
        ("answer", {"answer": SECRET}),
        ("hint", {"hint": ["h"]}),
        ("category", {"category": 1}),
        ("image", {"image": encoded()[:-1]}),
        ("image", {"image": f"{encoded()[:40]}\t{encoded()[40:]}"}),
        ("image", {"image": SECRET}),
        ("image", {"image": "17"}),  # of another row, which only its file knows
        ("image", {"image": 3}),
        ("image", {"image": {"bytes": None, "path": "x.png"}}),
    ],
)
def test_a_bad_row_names_index_and_field_and_tells_no_text(
    field: str, changes: dict[str, Any]
) -> None:
    index = "?" if field == "index" else "81"
    with pytest.raises(ArtifactError) as caught:
        mmbench.from_row(line(81) | changes)
    assert caught.value.message.startswith(f"MMBench row {index}: {field} ")
    assert SECRET not in caught.value.message
    assert caught.value.hint


# --- a TSV --------------------------------------------------------------------------------------


def test_rows_of_a_split_in_the_order_of_the_file(tmp_path: Path) -> None:
    rows = [line(1000002), line(5, split="test"), line(2), line(1000003)]
    file = write(tmp_path / "any.tsv", rows)

    got = mmbench.load(file, "dev")

    assert [(q.id, q.group, q.circular_pass) for q in got] == [
        ("1000002", "2", 1),
        ("2", "2", 0),
        ("1000003", "3", 1),
    ]
    assert [q.id for q in mmbench.load(str(file), "test")] == ["5"]
    assert [q.id for q in mmbench.load(file, "validation")] == [q.id for q in got]
    with pytest.raises(UsageError, match="no split 'train'") as caught:
        mmbench.load(file, "train")
    assert caught.value.hint == "splits there: dev, test"


@pytest.mark.parametrize("text", ["None", "NA", "N/A", "nan", "null", "NULL", "#N/A", "1", "1.0"])
def test_every_text_of_a_cell_is_kept(tmp_path: Path, text: str) -> None:
    file = write(tmp_path / "x.tsv", [line(1, A=text, C=text), line(2, A='say "x"\nor\ty')])
    first, second = mmbench.load(file, "dev")
    assert first.options == {"A": text, "B": "right", "C": text}
    assert second.options["A"] == 'say "x"\nor\ty'


def test_an_image_cell_may_be_the_index_of_the_row_that_has_it(tmp_path: Path) -> None:
    rows = [line(1000001, image="1"), line(2, image=""), line(2000001, image="0000001")]
    rows += [line(7, image=encoded(90)), line(1, split="test")]  # of another split, even
    first, none, second, other = mmbench.load(write(tmp_path / "x.tsv", rows), "dev")
    assert first.image == png()
    assert first.image is second.image  # kept once
    assert (none.image, other.image) == (None, png(90))


@pytest.mark.parametrize("other", [None, "", "2"])
def test_an_image_that_the_file_does_not_have_is_an_artifact_error(
    tmp_path: Path, other: str | None
) -> None:
    rows = [line(2), line(1000001, image="1")] + ([] if other is None else [line(1, image=other)])
    file = write(tmp_path / "x.tsv", rows)
    with pytest.raises(ArtifactError) as caught:
        mmbench.load(file, "dev")
    assert caught.value.message == (
        f"{file}, row 2 (index 1000001): image is that of row 1, which is not there or has none"
    )


def test_subsets_go_by_the_image(tmp_path: Path) -> None:
    file = write(tmp_path / "x.tsv", [line(1), line(2, image="")])
    assert [q.id for q in mmbench.load(file, "dev", subset="image")] == ["1"]
    assert [q.id for q in mmbench.load(file, "dev", subset="text")] == ["2"]
    with pytest.raises(UsageError, match="no question in the subset 'text'"):
        mmbench.load(write(tmp_path / "y.tsv", [line(1)]), "dev", subset="text")


def test_answers_alone_need_no_images_and_no_categories(tmp_path: Path) -> None:
    file = write(tmp_path / "x.tsv", [line(1)], ["index", "question", "A", "B", "answer"])
    (got,) = mmbench.load(file, "dev")
    assert (got.gold, got.image, got.category, got.split) == ("B", None, None, None)


@pytest.mark.parametrize(
    ("name", "split"),
    [("mmbench_dev_20230712", "dev"), ("MMBench_TEST_EN", "test"), ("mine", "dev"), ("x", "own")],
)
def test_without_a_split_column_the_file_name_tells(tmp_path: Path, name: str, split: str) -> None:
    columns = [column for column in COLUMNS if column != "split"]
    file = write(tmp_path / f"{name}.tsv", [line(1)], columns)
    assert len(mmbench.load(file, split)) == 1
    empty = write(tmp_path / f"{name}.tsv", [line(1, split="")])
    assert len(mmbench.load(empty, split)) == 1
    if name.lower().startswith("mmbench"):
        with pytest.raises(UsageError, match="no split 'train'"):
            mmbench.load(file, "train")


def test_a_folder_with_one_file_or_one_a_split(tmp_path: Path) -> None:
    write(tmp_path / "MMBench_EN.tsv", [line(1), line(2, split="test")])
    assert [q.id for q in mmbench.load(tmp_path, "test")] == ["2"]
    write(tmp_path / "mmbench_dev_cn.tsv", [line(3)])
    write(tmp_path / "mmbench_test_en.tsv", [line(4, split="test")])
    assert [q.id for q in mmbench.load(tmp_path, "val")] == ["3"]
    with pytest.raises(UsageError, match="no split 'train'") as caught:
        mmbench.load(tmp_path, "train")
    assert caught.value.hint == "splits there: dev, test"
    write(tmp_path / "mmbench_dev_en.tsv", [line(5)])
    with pytest.raises(UsageError, match=r"dev_cn\.tsv, mmbench_dev_en\.tsv") as caught:
        mmbench.load(tmp_path, "dev")
    assert "--data mmbench=" in caught.value.hint
    write(tmp_path / "mmbench_dev.tsv", [line(6)])
    assert [q.id for q in mmbench.load(tmp_path, "dev")] == ["6"]


# --- damage -------------------------------------------------------------------------------------

HEAD = "index\tquestion\tA\tB\tanswer\tsplit\n"


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("", "cannot read "),
        (HEAD + '1\t"' + SECRET, "cannot read "),  # cut within quotes
        (HEAD + "1\tq\tx\ty\tA\tdev\n2\tq\tx\ty\tA\tdev\tmore\n", "cannot read "),
        (HEAD + "1\tq\tx\ty\tA\tdev\tmore\n", "rows have more cells than the header"),
        (HEAD + "1\tq\tx\ty\tA\tdev\n2\tq\tx", "row 2 (index 2): split is missing"),
        (HEAD + f"1\t{SECRET}\tx\ty\tA\tdev\n2\t{SECRET}\tx\ty\tC\tdev\n", "row 2 (index 2): answ"),
        (
            HEAD + f"1\tq\tx\ty\tA\tdev\n{SECRET}\tq\tx\ty\tA\tdev\n",
            "row 2 (index ?): index is miss",
        ),
        (
            HEAD + "1\tq\tx\ty\tA\tdev\n1\tq\tx\ty\tA\tdev\n",
            "row with index 1: index is there twice",
        ),
        (HEAD + "1\tq\tx\ty\tA\tdev\n2\tq\tx\ty\t\tdev\n", "row with index 2: answer is missing"),
        ("index,question,A,B\n1,q,x,y\n", "no column index"),
        ("index\tquestion\tA\tanswer\n1\tq\tx\tA\n", "no column B"),
        ("index\tquestion\n\xff\xfe", "cannot read "),
    ],
)
def test_damaged_files_are_artifact_errors(tmp_path: Path, content: str, told: str) -> None:
    file = tmp_path / "mmbench_dev.tsv"
    file.write_bytes(content.encode("latin-1"))
    with pytest.raises(ArtifactError) as caught:
        mmbench.load(file, "dev")
    assert told in caught.value.message
    assert str(file) in caught.value.message
    assert SECRET not in caught.value.message
    assert "\n" not in caught.value.message
    assert caught.value.hint


def test_a_split_without_answers_names_the_one_that_has_them(tmp_path: Path) -> None:
    file = write(tmp_path / "x.tsv", [line(1), line(2, split="test", answer="")])
    with pytest.raises(UsageError, match=r"split test of .* has no answers") as caught:
        mmbench.load(file, "test")
    assert "dev" in caught.value.hint


@pytest.mark.parametrize("source", ["/nowhere/mmbench", "./nowhere", Path("no/where"), "nowhere"])
def test_nothing_there_is_a_missing_prerequisite(source: str | Path) -> None:
    with pytest.raises(PrerequisiteError, match="no MMBench data at"):
        mmbench.load(source, "dev")


def test_a_folder_without_data_is_an_artifact_error(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="holds no MMBench data"):
        mmbench.load(tmp_path, "dev")


# --- parquet and the hub ------------------------------------------------------------------------


def write_parquet(folder: Path, *indices: int) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    cells = {"question": "q", "hint": "nan", "A": "x", "B": "nan", "C": "z", "D": "nan"}
    cells |= {"answer": "C", "category": "ocr", "L2-category": "logic_reasoning"}
    columns = {name: pa.array([cell] * len(indices)) for name, cell in cells.items()}
    columns["index"] = pa.array(indices, type=pa.int64())
    columns["image"] = pa.array([{"bytes": png(), "path": None}] * len(indices), type=image)
    file = folder / "dev-00000-of-00001.parquet"
    pq.write_table(pa.table(columns), file)
    return file


@pytest.mark.parametrize("below", ["", "data"])
def test_parquet_in_the_hub_s_schema(tmp_path: Path, below: str) -> None:
    file = write_parquet(tmp_path / below, 4, 1000004)
    for source in (tmp_path, file):
        first, second = mmbench.load(source, "dev")
        assert (first.id, second.group, second.circular_pass) == ("4", "4", 1)
        assert (first.options, first.gold, first.hint) == ({"A": "x", "C": "z"}, "C", "")
        assert (first.split, first.l2_category) == ("dev", "logic_reasoning")
        assert first.image == png()
    with pytest.raises(UsageError, match="no split 'test'"):
        mmbench.load(tmp_path, "test")
    file.write_bytes(b"PAR1 no")
    with pytest.raises(ArtifactError, match=r"cannot read .*00001\.parquet"):
        mmbench.load(tmp_path, "dev")


def test_configurations_of_a_snapshot(tmp_path: Path) -> None:
    write_parquet(tmp_path / "cn", 4)
    assert [q.id for q in mmbench.load(tmp_path, "dev")] == ["4"]
    write_parquet(tmp_path / "en", 5)
    with pytest.raises(UsageError, match="several configurations: cn, en") as caught:
        mmbench.load(tmp_path, "dev")
    assert caught.value.hint.endswith(f"--data mmbench={tmp_path / 'cn'}")
    assert [q.id for q in mmbench.load(tmp_path / "en", "dev")] == ["5"]


@pytest.mark.parametrize("text", ["None", "NA", "N/A", "null", "NULL", "#N/A"])
def test_every_text_of_a_parquet_cell_but_nan_is_kept(tmp_path: Path, text: str) -> None:
    file = tmp_path / "dev-00000-of-00001.parquet"
    cells = {"index": 1, "question": "q", "hint": "nan", "A": text, "B": "y", "C": "nan"}
    pq.write_table(pa.Table.from_pylist([cells | {"answer": "A", "L2-category": "x"}]), file)
    (got,) = mmbench.load(tmp_path, "dev")
    assert (got.options, got.hint) == ({"A": text, "B": "y"}, "")


def test_splits_and_rows_without_answers_can_be_looked_at(tmp_path: Path) -> None:
    rows = [line(1), line(5, split="test", answer=""), line(5, split="test", answer="")]
    file = write(tmp_path / "x.tsv", rows)
    assert mmbench.splits(file) == ["dev", "test"]
    assert [(q.id, q.gold) for q in mmbench.read(file, "test")] == [("5", None), ("5", None)]
    write_parquet(tmp_path / "p", 4)
    assert mmbench.splits(tmp_path / "p") == ["dev"]


@pytest.mark.parametrize(("source", "part"), [("a/b", "en"), ("a/b/cn", "cn")])
def test_the_hub_is_asked_for_one_split_of_one_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, part: str
) -> None:
    import huggingface_hub

    def fake(name: str, *, repo_type: str, allow_patterns: str) -> str:
        assert (name, repo_type, allow_patterns) == ("a/b", "dataset", f"{part}/dev-*.parquet")
        return str(tmp_path)

    write_parquet(tmp_path / part, 4)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake)
    assert [q.id for q in mmbench.load(source, "dev")] == ["4"]


def test_an_unreachable_hub_is_a_missing_prerequisite(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # refused at once
    with pytest.raises(PrerequisiteError, match="cannot load lmms-lab/MMBench") as caught:
        mmbench.load("lmms-lab/MMBench", "dev")
    assert "HF_HUB_OFFLINE" in caught.value.hint
    assert "\n" not in caught.value.message


# --- the task -----------------------------------------------------------------------------------


def test_the_task_is_scored_on_dev_and_its_data_stay_home() -> None:
    assert str(selector.parse("mmbench")) == "mmbench:dev"
    assert str(selector.parse("mmbench:test:image")) == "mmbench:test:image"
    assert str(selector.parse("scienceqa")) == "scienceqa:test"
    assert not selector.shareable("mmbench", None)
    assert mmbench.SHAREABLE is False


def test_a_limit_takes_whole_circular_questions(tmp_path: Path) -> None:
    rows = [line(turn * 1_000_000 + n) for turn in range(3) for n in range(8)]
    file = write(tmp_path / "x.tsv", rows)
    questions = selector.load(selector.parse("mmbench"), {"mmbench": str(file)})
    got = selector.limit(questions, 3)
    assert len(got) == 9
    assert len({q.group for q in got}) == 3


def test_no_slow_import() -> None:
    code = "import sys, qatbench.tasks.mmbench; "
    check = "sys.exit(any(m in sys.modules for m in ('torch', 'pandas', 'pyarrow')))"
    root = Path(__file__).resolve().parents[2]
    subprocess.run([sys.executable, "-c", code + check], check=True, cwd=root)


# --- the real rows ------------------------------------------------------------------------------


@pytest.mark.parity
def test_the_real_rows(shared_dir: Path) -> None:
    folder = shared_dir / "data/mmbench"
    dev, test = mmbench.load(folder, "dev"), mmbench.load(folder, "test")
    assert (len(dev), len(test)) == (10, 10)
    questions = dev + test
    assert len({q.category for q in questions}) == 20
    assert all(q.gold in q.options and q.circular_pass == 0 for q in questions)
    assert sum(len(q.options) == 3 for q in questions) == 2
    assert sum(bool(q.hint) for q in questions) == 1
    for question in questions:
        assert isinstance(question.image, bytes)
        assert min(Image.open(io.BytesIO(question.image)).size) > 50
