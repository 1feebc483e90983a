"""Tiny models, data and checkpoints, made once for all tests of this folder."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch._dynamo
from tiny import Made, Make, Source, settings

from qatbench.stages import proof
from qatbench.stages.common import silent
from qatbench.stages.quantize import quantize
from qatbench.vlm.load import ModelFolder, find


@pytest.fixture(scope="session", autouse=True)
def _eager() -> None:
    # The library compiles its 3- and 2-bit unpacking for half a minute; eager computes the same.
    torch._dynamo.config.disable = True


@pytest.fixture(autouse=True)
def _in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a proof starts a process of its own, which takes ten seconds, tests do without."""
    monkeypatch.setattr(proof, "elsewhere", proof.answers)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tiny.save_questions(tmp_path_factory.mktemp("data") / "scienceqa")
    return {"scienceqa": str(folder)}


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModelFolder]:
    root = tmp_path_factory.mktemp("models")
    tiny.save_text_model(root / "text")
    tiny.save_llava(root / "llava")
    return {name: find(str(root / name)) for name in ("text", "llava")}


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    """A tiny model of a family, made once: `source("qwen2_vl", tied=True)`."""
    root = tmp_path_factory.mktemp("families")

    def one(family: str, **how: Any) -> ModelFolder:
        folder = root / "-".join([family, *(f"{key}-{value}" for key, value in how.items())])
        return find(str(folder if folder.exists() else tiny.SAVE[family](folder, **how)))

    return one


@pytest.fixture(scope="session")
def make(
    models: dict[str, ModelFolder], data: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Make:
    """Make a checkpoint of a family by a method at a width, or give the one made before."""
    root = tmp_path_factory.mktemp("checkpoints")
    done: dict[tuple[str, str, int], Made] = {}

    def one(family: str, method: str, bits: int) -> Made:
        key = (family, method, bits)
        if key not in done:
            out = root / f"{family}-{method}-{bits}"
            chosen = settings(family, method, bits)
            record = quantize(models[family], chosen, data, out, resume=False, progress=silent)
            done[key] = Made(out, record)
        return done[key]

    return one
