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


@pytest.fixture(scope="session")
def every_model(
    text_model: Loaded, llava: Loaded, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Loaded]:
    root = tmp_path_factory.mktemp("every")
    rest = {
        name: load(find(str(save(root / name))), device="cpu", dtype=torch.float32)
        for name, save in tiny.SAVE.items()
        if name not in ("text", "llava")
    }
    return {"text": text_model, "llava": llava} | rest


@pytest.fixture(params=list(tiny.SAVE))
def any_model(request: pytest.FixtureRequest, every_model: dict[str, Loaded]) -> Loaded:
    return every_model[request.param]


@pytest.fixture(params=tiny.QWEN_VLMS)
def qwen_vlm(request: pytest.FixtureRequest, every_model: dict[str, Loaded]) -> Loaded:
    return every_model[request.param]
