"""Real ScienceQA and MMBench rows with their images, through a vision-language model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from qatbench import store


def evaluate(out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "qatbench",
        "eval",
        "mini/student",
        "--out",
        str(out),
        "--json",
    ]
    return subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)


@pytest.fixture(scope="session")
def scienceqa_dir(shared_dir: Path) -> Path:
    return shared_dir / "data" / "scienceqa"


@pytest.mark.parity
def test_every_row_of_minitest_is_answered(scienceqa_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    ended = evaluate(out, "--task", "scienceqa:minitest", "--data", str(scienceqa_dir))
    assert ended.returncode == 0, ended.stderr
    rows = store.read_predictions(out / "predictions.jsonl")
    assert Counter((row.status, row.meta["has_image"]) for row in rows) == {
        ("ok", True): 204, ("ok", False): 220,
    }  # fmt: skip
    assert len({row.chosen for row in rows}) > 2


@pytest.mark.parity
def test_without_its_images_minitest_ends_with_a_summary(
    scienceqa_dir: Path, tmp_path: Path
) -> None:
    bare = tmp_path / "data"
    bare.mkdir()
    for name in ("problems.json", "pid_splits.json"):
        os.symlink(scienceqa_dir / name, bare / name)
    out = tmp_path / "run"
    ended = evaluate(out, "--task", "scienceqa:minitest", "--data", str(bare))
    assert ended.returncode == 4
    assert ended.stdout == ""
    error, hint = ended.stderr.strip().splitlines()[-2:]
    assert error.startswith(
        "error: 204 of 424 questions ended in an error: 204 x missing image (first: "
    )
    assert hint.startswith("hint: complete the data and --resume")
    rows = store.read_predictions(out / "predictions.jsonl")
    assert Counter(row.status for row in rows) == {"error": 204, "ok": 220}
    assert not (out / "metrics.json").exists()


@pytest.mark.parity
@pytest.mark.parametrize("mode", ["options", "generate"])
def test_every_row_of_mmbench_is_answered(shared_dir: Path, tmp_path: Path, mode: str) -> None:
    file = shared_dir / "data" / "mmbench" / "mmbench_en_20.tsv"
    out = tmp_path / "run"
    ended = evaluate(
        out, "--task", "mmbench:dev", "--task", "mmbench:test", "--data", f"mmbench={file}",
        "--protocol", "vlmevalkit-exact", "--mode", mode, "--limit", "20",
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    rows = store.read_predictions(out / "predictions.jsonl")
    assert len(rows) == 20
    assert all(row.meta["has_image"] for row in rows)
    unread = sum(row.status == "unparsed" for row in rows)
    assert {row.status for row in rows} <= ({"ok"} if mode == "options" else {"ok", "unparsed"})
    (task,) = json.loads(ended.stdout)["tasks"]
    assert (task["overall"]["n"], task["errors"], task["unparsed"]) == (20, 0, unread)
