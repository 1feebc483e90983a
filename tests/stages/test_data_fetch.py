"""data fetch: what is asked of the hub, and that nothing is left half-written."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qatbench import cli
from qatbench.errors import PrerequisiteError, UsageError
from qatbench.stages import data_fetch as stage
from qatbench.stages.common import silent
from qatbench.stages.data_fetch import fetch
from qatbench.tasks import mmbench, scienceqa

SCIENCE = {"question": "q", "choices": ["x", "y"], "answer": 0, "hint": "", "image": None}
BENCH = {"index": 1, "question": "q", "A": "x", "B": "y", "answer": "A", "L2-category": "z"}


class Hub:
    """A hub that holds some files: folder__split -> its only row."""

    def __init__(self, **files: dict[str, Any]) -> None:
        self.files = {tuple(name.split("__")): row for name, row in files.items()}
        self.asked: list[tuple[str, list[str]]] = []

    def __call__(self, repository: str, folder: Path, patterns: list[str]) -> None:
        self.asked.append((repository, patterns))
        (folder / ".cache").mkdir(parents=True, exist_ok=True)
        for (part, split), row in self.files.items():
            if f"{part}/*.parquet" in patterns:
                (folder / part).mkdir(exist_ok=True)
                file = folder / part / f"{split}-00000-of-00001.parquet"
                pq.write_table(pa.Table.from_pylist([row]), file)


def get(task: str, source: str | None, to: Path, hub: Any) -> Path:
    return fetch(task, source, to, progress=silent, download=hub, reach=lambda: None)


def test_scienceqa_is_one_folder_of_parquet(tmp_path: Path) -> None:
    hub = Hub(data__test=SCIENCE, data__train=SCIENCE)
    folder = get("scienceqa", None, tmp_path / "a" / "sqa", hub)
    assert hub.asked == [("derek-thomas/ScienceQA", ["data/*.parquet", "*.parquet"])]
    assert [q.id for q in scienceqa.load(folder, "test")] == ["test-0"]
    assert {path.name for path in folder.iterdir()} == {"data"}
    assert {path.name for path in folder.parent.iterdir() if path.suffix != ".lock"} == {"sqa"}


@pytest.mark.parametrize(
    ("task", "source", "repository", "part"),
    [
        ("mmbench", None, "lmms-lab/MMBench", "en"),
        ("mmbench", "lmms-lab/MMBench/cn", "lmms-lab/MMBench", "cn"),
        ("scienceqa", "lmms-lab/ScienceQA", "lmms-lab/ScienceQA", "ScienceQA-FULL"),
        ("scienceqa", "lmms-lab-encoder/ScienceQA/ScienceQA-IMG", "lmms-lab-encoder/ScienceQA",
         "ScienceQA-IMG"),
    ],
)  # fmt: skip
def test_one_configuration_is_fetched(
    tmp_path: Path, task: str, source: str | None, repository: str, part: str
) -> None:
    row = BENCH if task == "mmbench" else SCIENCE
    names = ("en__dev", "cn__dev", "ScienceQA-FULL__dev", "ScienceQA-IMG__dev")
    hub = Hub(**dict.fromkeys(names, row))
    folder = get(task, source, tmp_path / "x", hub)
    assert hub.asked == [(repository, [f"{part}/*.parquet"])]
    assert {path.name for path in folder.iterdir()} == {part}
    load = mmbench.load if task == "mmbench" else scienceqa.load
    assert len(load(folder, "dev")) == 1


def test_what_was_cut_off_goes_on_and_is_not_seen(tmp_path: Path) -> None:
    to = tmp_path / "x"

    def cut(repository: str, folder: Path, patterns: list[str]) -> None:
        (folder / "data").mkdir(parents=True)
        (folder / "data" / "half").write_text("")
        raise ConnectionError("line\nlost")

    with pytest.raises(PrerequisiteError, match="ConnectionError: line lost") as caught:
        get("scienceqa", None, to, cut)
    assert "hf download derek-thomas/ScienceQA" in caught.value.hint
    assert not to.exists()
    assert (tmp_path / "x.partial" / "data" / "half").exists()
    get("scienceqa", None, to, Hub(data__test=SCIENCE))
    assert (to / "data" / "half").exists()
    assert not (tmp_path / "x.partial").exists()


def test_a_hub_without_the_files_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(PrerequisiteError, match="has no parquet files at zz/"):
        get("mmbench", "lmms-lab/MMBench/zz", tmp_path / "x", Hub(en__dev=BENCH))
    assert [path for path in tmp_path.iterdir() if path.suffix != ".lock"] == []


def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("")
    with pytest.raises(UsageError, match="holds something"):
        get("scienceqa", None, tmp_path, Hub(data__test=SCIENCE))
    with pytest.raises(UsageError, match="is no hub id"):
        get("scienceqa", "../x", tmp_path / "y", Hub(data__test=SCIENCE))


def test_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from huggingface_hub import constants

    def run(*args: object) -> object:
        with pytest.raises(SystemExit) as ended:
            cli.main(["data", "fetch", *map(str, args)])
        return ended.value.code

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["qatbench"])
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # refused at once
    assert run("mmbench") == 3
    error, hint = capsys.readouterr().err.splitlines()[-2:]
    assert error.startswith("error: cannot fetch lmms-lab/MMBench: http://127.0.0.1:9 cannot be")
    assert "--include 'en/*.parquet' --local-dir data/mmbench" in hint
    assert list(tmp_path.iterdir()) == []

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(stage, "_snapshot", Hub(en__dev=BENCH))
    assert run("mmbench", "--json") == 0
    out, err = capsys.readouterr()
    value = json.loads(out)
    assert value["folder"] == "data/mmbench"
    assert value["places"][0]["parts"][0]["state"] == "incomplete"  # 1 of 4329 rows
    assert "next: qatbench eval MODEL --task mmbench --data data/mmbench" in err
