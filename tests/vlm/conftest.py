"""Tiny models, made once for all tests of this folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch

from qatbench.vlm.load import Loaded, find, load


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_questions(tmp_path_factory.mktemp("data") / "scienceqa")


@pytest.fixture(scope="session")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    folder = tiny.save_text_model(tmp_path_factory.mktemp("models") / "text")
    return load(find(str(folder)), device="cpu", dtype=torch.float32)


@pytest.fixture(scope="session")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    folder = tiny.save_llava(tmp_path_factory.mktemp("models") / "llava")
    return load(find(str(folder)), device="cpu", dtype=torch.float32)


@pytest.fixture(params=["text_model", "llava"])
def any_model(request: pytest.FixtureRequest) -> Loaded:
    model: Loaded = request.getfixturevalue(request.param)
    return model
