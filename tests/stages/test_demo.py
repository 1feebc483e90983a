"""The demo in small: recipes/mini.yaml with few steps, without a network, the same twice."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
NO_NETWORK = """
import socket, sys
def refuse(*args, **kwargs):
    raise OSError(f"the network was used: {args[:2]}")
socket.socket.connect = socket.socket.connect_ex = socket.create_connection = refuse
socket.getaddrinfo = refuse
from qatbench.cli import main
sys.argv = ["qatbench", *sys.argv[1:]]
main()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the recipe made small, and a cache of its own."""
    folder = tmp_path_factory.mktemp("demo")
    recipe = yaml.safe_load((ROOT / "recipes" / "mini.yaml").read_text(encoding="utf-8"))
    recipe["training"] |= {"steps": 2, "batch_size": 4, "micro_batch_size": 4}
    recipe["calibration"]["samples"] = 4
    recipe["evaluation"]["limit"] = 40
    (folder / "mini.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    return folder


def run(folder: Path, out: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", NO_NETWORK, "run", "mini.yaml", "--out", out, *arguments]
    environment = os.environ | {"XDG_CACHE_HOME": str(folder / "cache")}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def ended(folder: Path) -> subprocess.CompletedProcess[str]:
    return run(folder, "first")


def test_the_demo_needs_no_network_and_ends_with_a_table(
    ended: subprocess.CompletedProcess[str], folder: Path
) -> None:
    assert ended.returncode == 0, ended.stderr[-2000:]
    lines = ended.stdout.splitlines()
    assert max(map(len, lines)) <= 100
    shown = [line.split()[0] for line in lines if re.match(r"\w+ +\d", line)]
    assert shown == ["base", "sft", "kd", "rtn", "gptq", "awq", "qat", "grace"]
    assert "report: first/demo/report.md" in ended.stdout
    report = (folder / "first" / "demo" / "report.md").read_text()
    (last,) = re.findall(r"^\|  \| 2-2 \| .*$", report.split("| grace |")[-1], re.MULTILINE)
    assert "- |" not in last  # CE, KD, RCKA, gate and beta all took part


def test_the_same_predictions_twice(ended: subprocess.CompletedProcess[str], folder: Path) -> None:
    assert ended.returncode == 0
    again = run(folder, "second", "--arm", "gptq", "--arm", "grace")
    assert again.returncode == 0, again.stderr[-2000:]
    for arm in ("gptq", "grace/seed-0"):
        first = (folder / "first" / "demo" / arm / "predictions.jsonl").read_bytes()
        assert first == (folder / "second" / "demo" / arm / "predictions.jsonl").read_bytes()


def test_the_network_is_really_off(folder: Path) -> None:
    code = NO_NETWORK.split("from qatbench")[0] + "socket.create_connection(('localhost', 80))"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "the network was used" in ended.stderr
