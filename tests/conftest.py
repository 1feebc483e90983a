"""Fixtures that tests of several parts use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder of real data and reference vectors, which the project does not ship."""
    beside = Path(__file__).resolve().parents[2] / "shared"
    folder = Path(os.environ.get("QATBENCH_SHARED", beside))
    if not (folder / "fixtures").is_dir():
        pytest.skip(f"no reference data at {folder} (set QATBENCH_SHARED to their folder)")
    return folder
