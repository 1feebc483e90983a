"""The README's result table says what the committed comparison says."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_result_rows_are_those_of_the_committed_report() -> None:
    tables = ROOT / "results" / "smol-scienceqa" / "tables" / "arms.csv"
    if not tables.is_file():
        pytest.skip("results/smol-scienceqa is not in this copy")
    with tables.open(newline="") as stream:
        arms = {row["arm"]: row for row in csv.DictReader(stream)}
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `?([\w-]+)`? \| ([\d.]+) \| (\[.*?\]) \| (.*?) \| (.*?) \|", text, re.M)
    shown = {row[0]: row[1:] for row in rows if row[0] in arms}
    assert len(shown) == len(arms)
    for name, cells in shown.items():
        row = arms[name]
        assert cells == (row["acc %"], row["95 % CI"], row["diff"], row["p"]), name
