"""Tiny models of every family, questions and packed checkpoints, made once for this folder."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import tiny
import torch
from engine_types import Ask, Load, Packs

from qatbench.stages import proof
from qatbench.stages.common import silent
from qatbench.stages.quantize import quantize
from qatbench.tasks import protocols, scienceqa
from qatbench.vlm import load as models
from qatbench.vlm.batch import Encoded, Encoder
from qatbench.vlm.load import Loaded, ModelFolder, find


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_questions(tmp_path_factory.mktemp("data") / "scienceqa")


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], ModelFolder]:
    """A tiny model's folder by its family."""
    root = tmp_path_factory.mktemp("models")
    return cache(lambda family: find(str(tiny.SAVE[family](root / family))))


@pytest.fixture(scope="session")
def load(source: Callable[[str], ModelFolder]) -> Load:
    """A tiny family or a built-in model, in fp32 on the CPU."""

    def one(name: str) -> Loaded:
        folder = find(name) if "/" in name else source(name)
        return models.load(folder, device="cpu", dtype=torch.float32)

    return cache(one)


@pytest.fixture(scope="session")
def ask(data: Path) -> Ask:
    """Prompts of unlike lengths from the whole test split; of a VLM some have pictures."""

    def some(loaded: Loaded, count: int) -> list[Encoded]:
        encoder, protocol = Encoder(loaded), protocols.get("qatbench")
        questions = scienceqa.load(data, "test", subset="all" if loaded.arch.is_vlm else "text")
        every = max(1, len(questions) // count)
        return [encoder.prompt(protocol.prompt(q), q.image) for q in questions[::every][:count]]

    return some


@pytest.fixture(scope="session")
def pack(
    source: Callable[[str], ModelFolder], data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Packs:
    """A tiny model's checkpoint by family and method, at 4 bits in groups of 32."""
    root = tmp_path_factory.mktemp("checkpoints")

    def one(family: str, method: str) -> ModelFolder:
        out, chosen = root / f"{family}-{method}", tiny.settings(family, method)
        with pytest.MonkeyPatch.context() as here:
            here.setattr(proof, "elsewhere", proof.answers)  # in this process
            quantize(source(family), chosen, {"scienceqa": str(data)}, out, resume=False,
                     progress=silent)  # fmt: skip
        return find(str(out))

    return cache(one)


@pytest.fixture(name="cache")
def empty_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache for each test; where the kernels lie in it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "qatbench" / "kernels"
