"""compare --render: a report is drawn again from its comparison, with questions where data are."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from run_folders import predictions, write_run

from qatbench import cli

QUESTIONS = [
    {"id": str(k), "question": f"Is {k} even?", "options": ["yes", "no"], "answer": "A"}
    for k in range(4)
]


@pytest.fixture
def compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A comparison of two arms on a user's own four questions, on disk."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["qatbench"])
    for name, right in (("base", [1, 1, 1, 0]), ("rtn", [0, 1, 1, 1])):
        write_run(tmp_path / name, predictions(right, task="own"), method=name)
    assert run("compare", "rtn", "--baseline", "base", "--out", "out", "--draws", "100") == 0
    return tmp_path / "out"


def run(*words: str) -> object:
    with pytest.raises(SystemExit) as ended:
        cli.main(list(words))
    return ended.value.code


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes()
            for file in sorted(folder.rglob("*")) if file.is_file()}  # fmt: skip


def test_a_report_is_a_pure_function_of_its_comparison(compared: Path) -> None:
    before = contents(compared)
    for name in before:
        if name != "comparison.json":
            (compared / name).unlink()
    assert run("compare", "--render", str(compared)) == 0
    assert contents(compared) == before


def test_data_fill_the_gallery_and_nothing_else_does(compared: Path, tmp_path: Path) -> None:
    assert "Is 0 even?" not in (compared / "report.html").read_text()
    file = tmp_path / "own.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    before = contents(compared)
    assert run("compare", "--render", str(compared), "--data", str(file)) == 0
    after = contents(compared)
    page = after.pop("report.html").decode()
    assert "Is 0 even?" in page  # lost
    assert "Is 3 even?" in page  # gained
    assert "Is 1 even?" not in page  # right in both
    before.pop("report.html")
    assert after == before


def test_the_gate_holds_when_a_report_is_drawn_again(compared: Path) -> None:
    assert run("compare", "--render", str(compared), "--max-drop", "0") == 0
    write_run(compared.parent / "worse", predictions([0, 0, 1, 0], task="own"), method="gptq")
    assert run("compare", "worse", "--baseline", "base", "--out", "out2", "--draws", "100") == 0
    assert run("compare", "--render", "out2", "--max-drop", "1.0") == 1


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (["compare", "--render", "nowhere"], 3, "no comparison.json in nowhere"),
        (["compare", "--render", "out", "--baseline", "base"], 2, "takes no runs"),
        (["compare", "rtn"], 2, "needs run folders and --baseline"),
        (["compare"], 2, "needs run folders and --baseline"),
        (["compare", "--render", "out", "--data", "scienceqa=mini"], 2, "no task 'scienceqa'"),
    ],
)
def test_bad_input_is_one_line(
    compared: Path, capsys: pytest.CaptureFixture[str], words: list[str], code: int, told: str
) -> None:
    capsys.readouterr()
    before = contents(compared)
    assert run(*words) == code
    error, hint = capsys.readouterr().err.splitlines()
    assert told in error
    assert hint.startswith("hint: ")
    assert contents(compared) == before


def test_a_damaged_comparison_is_exit_4(compared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = compared / "comparison.json"
    content = json.loads(file.read_text())
    content["tasks"][0]["arms"][0]["n"] = 0
    file.write_text(json.dumps(content))
    assert run("compare", "--render", str(compared)) == 4
    assert "damaged or of another version: tasks.0.arms.0.n" in capsys.readouterr().err
