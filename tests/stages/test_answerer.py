"""Generate mode on this project's engine, and what the record says of it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from qatbench import store
from qatbench.engine import fast, writing
from qatbench.engine.fast import FastRunner
from qatbench.engine.plain import PlainRunner
from qatbench.errors import UsageError
from qatbench.stages.common import silent
from qatbench.stages.evaluate import EvalSettings, evaluate
from qatbench.tasks import selector
from qatbench.vlm import load as loading
from qatbench.vlm.batch import Encoder
from qatbench.vlm.load import ModelFolder

LIMIT = 12
PROMPTS = ("Which animal is a mammal?", "Answer:", "the horse the eagle the salmon water wind coal")
Engine = Literal["auto", "transformers", "qatbench"]


def asking(engine: Engine = "auto", **other: Any) -> EvalSettings:
    part = other.pop("part", "scienceqa:test:text")
    settings = EvalSettings(
        selectors=(selector.parse(part),), protocol={"scienceqa": "grace-sqa"}, mode="generate",
        device="cpu", batch_size=3, engine=engine,
    )  # fmt: skip
    return dataclasses.replace(settings, **other)


def run(model: ModelFolder, settings: EvalSettings, data: dict[str, str], out: Path) -> Any:
    return evaluate(model, settings, data, out, resume=False, progress=silent)["figures"]


@pytest.mark.parametrize("family", ["text", "llava"])
def test_both_engines_write_the_same_and_say_who_wrote(
    family: str, models: dict[str, ModelFolder], data: dict[str, str], tmp_path: Path
) -> None:
    part = "scienceqa:test" if family != "text" else "scienceqa:test:text"
    said = {}
    for engine in ("auto", "qatbench", "transformers"):
        out = tmp_path / engine
        said[engine] = run(models[family], asking(engine, part=part), data, out)  # type: ignore[arg-type]
    assert [said[one]["engine"] for one in said] == ["qatbench", "qatbench", "transformers"]
    assert {said[one]["kernel"] for one in said} == {"Linear"}
    assert "attention" in said["auto"]
    responses = [
        [(row.id, row.raw, row.chosen) for row in store.read_predictions(file)]
        for file in (tmp_path / one / "responses.jsonl" for one in said)
    ]
    assert responses[0] == responses[1] == responses[2]
    assert any(raw for _, raw, _ in responses[0])


def test_an_engine_that_cannot_run_the_model_is_an_error_if_named_and_a_note_if_not(
    models: dict[str, ModelFolder], data: dict[str, str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def refuse(*args: Any) -> None:
        raise UsageError("heads of an odd size")

    monkeypatch.setattr(fast, "FastRunner", refuse)
    figures = run(models["text"], asking(), data, tmp_path / "auto")
    assert figures["engine"] == "transformers"
    assert figures["engine_note"] == "not by the engine qatbench: heads of an odd size"
    with pytest.raises(UsageError, match="odd size"):
        run(models["text"], asking("qatbench"), data, tmp_path / "named")


def test_option_mode_and_kernels_are_the_plain_models(
    models: dict[str, ModelFolder], data: dict[str, str], tmp_path: Path
) -> None:
    for settings, why in (
        (asking("qatbench", mode="options"), "option mode"),
        (asking("qatbench", kernel="dense"), "--kernel dense"),
    ):
        with pytest.raises(UsageError, match=why):
            run(models["text"], settings, data, tmp_path / "run")
        assert not (tmp_path / "run").exists()
    figures = run(models["text"], asking(kernel="dense"), data, tmp_path / "dense")
    assert figures["engine"] == "transformers"
    options = asking(mode="options", protocol={"scienceqa": "qatbench"})
    assert "engine" not in run(models["text"], options, data, tmp_path / "options")


def test_engine_is_part_of_what_a_folder_is_for_only_if_named() -> None:
    assert "engine" not in asking().spec("m", {})
    assert asking("transformers").spec("m", {})["engine"] == "transformers"


@pytest.mark.parametrize("engine", [PlainRunner, FastRunner])
@pytest.mark.parametrize("at_once", [1, 5])
@pytest.mark.parametrize("shrinks_at", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("room", [3, 64])
def test_answers_end_where_they_end_alone_whatever_leaves_the_batch(
    engine: Any, at_once: int, shrinks_at: float, room: int, models: dict[str, ModelFolder],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    loaded = models_load(models["text"])
    prompts = [Encoder(loaded).prompt(text, None) for text in PROMPTS]
    monkeypatch.setattr(writing, "ROOM", room)
    monkeypatch.setattr(writing, "ends", lambda loaded: set())
    endless = [writing.written(engine(loaded), [prompt], LIMIT)[0] for prompt in prompts]
    assert all(len(tokens) == LIMIT for tokens in endless)
    ending = {endless[0][2], endless[1][7]}
    cut = [
        next((i for i, token in enumerate(tokens) if token in ending), LIMIT) for tokens in endless
    ]
    assert len(set(cut)) > 1, "rows that end at different times are what this is about"

    monkeypatch.setattr(writing, "ends", lambda loaded: ending)
    runner = engine(loaded)
    runner.at_once, runner.shrinks_at = at_once, shrinks_at
    kept: list[int] = []
    keep = runner.keep
    monkeypatch.setattr(
        runner, "keep", lambda started, rows: (kept.append(len(rows)), keep(started, rows))
    )
    found = writing.written(runner, prompts, LIMIT)
    assert found == [tokens[:end] for tokens, end in zip(endless, cut, strict=True)]
    assert bool(kept) == (shrinks_at > 0)


def models_load(folder: ModelFolder) -> loading.Loaded:
    return loading.load(folder, device="cpu", dtype=torch.float32)


def test_a_limit_of_one_token_is_the_first(models: dict[str, ModelFolder]) -> None:
    loaded = models_load(models["text"])
    prompts = [Encoder(loaded).prompt(PROMPTS[0], None)]
    first = [int(FastRunner(loaded).start(prompts, 1).first[0])]
    assert writing.written(FastRunner(loaded), prompts, 1) == [first]
