"""Fixtures that tests of several parts use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Tiny tensors gain nothing from a second thread, and test runs side by side would wait for each
# other's. Set before torch is imported, and passed on to the commands that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder of real data and reference vectors, which the project does not ship."""
    beside = Path(__file__).resolve().parents[2] / "shared"
    folder = Path(os.environ.get("QATBENCH_SHARED", beside))
    if not (folder / "fixtures").is_dir():
        pytest.skip(f"no reference data at {folder} (set QATBENCH_SHARED to their folder)")
    return folder
