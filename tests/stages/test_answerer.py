"""Generate mode on this project's engine, and what the record says of it."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
from tiny import Make

from qatbench import cli, store
from qatbench.engine import cuda, fast, writing
from qatbench.engine.fast import FastRunner
from qatbench.engine.plain import PlainRunner
from qatbench.errors import PrerequisiteError, QatbenchError, UsageError
from qatbench.stages.answerer import answerer
from qatbench.stages.ask import Asked, ask
from qatbench.stages.common import silent
from qatbench.stages.evaluate import EvalSettings, evaluate
from qatbench.stages.speed import SpeedSettings, speed
from qatbench.tasks import selector
from qatbench.vlm import kernel
from qatbench.vlm import load as loading
from qatbench.vlm.batch import Encoder
from qatbench.vlm.load import ModelFolder, find

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


@pytest.mark.parametrize("kind", [PrerequisiteError, UsageError])
def test_an_engine_that_cannot_run_the_model_is_an_error_if_named_and_a_note_if_not(
    kind: type[QatbenchError], models: dict[str, ModelFolder], data: dict[str, str],
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path,
) -> None:  # fmt: skip
    def refuse(*args: Any) -> None:
        raise kind("heads of an odd size")

    monkeypatch.setattr(fast, "FastRunner", refuse)
    note = "not by the engine qatbench: heads of an odd size"
    figures = run(models["text"], asking(), data, tmp_path / "auto")
    assert (figures["engine"], figures["engine_note"]) == ("transformers", note)
    command = [
        *("eval", str(models["text"].path), "--task", "scienceqa:test:text", "--mode", "generate"),
        *("--limit", "2", "--device", "cpu", "--data", data["scienceqa"]),
    ]
    told = []
    for engine in ("auto", "qatbench"):
        with pytest.raises(SystemExit) as ended:
            cli.main([*command, "--engine", engine, "--out", str(tmp_path / f"told-{engine}")])
        told.append((ended.value.code, capsys.readouterr().err.splitlines()))
    (code, lines), (failed, last) = told
    assert code == 0
    assert f"Answers {note}" in lines  # while it runs
    assert f"note: answers {note}" in lines  # and when a bar has gone over it
    assert (failed, last[-1]) == (kind.exit_code, "error: heads of an odd size")
    assert not (tmp_path / "told-qatbench" / "metrics.json").exists()


@pytest.mark.parametrize("lacks", ["bindings", "NVRTC"])
def test_what_cuda_lacks_is_found_before_the_engine_loads_anything(
    lacks: str, models: dict[str, ModelFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone() -> None:
        raise RuntimeError("Failure finding libnvrtc.so")

    def on_the_cpu(folder: ModelFolder, *, device: str, **how: Any) -> loading.Loaded:
        loads.append(device)
        return load(folder, device="cpu", **how)

    loads: list[str] = []
    load = loading.load
    monkeypatch.setattr(loading, "load", on_the_cpu)
    if lacks == "bindings":
        cuda._binding.cache_clear()
        monkeypatch.setitem(sys.modules, "cuda.bindings.driver", None)  # importing it fails
    else:
        monkeypatch.setattr(cuda, "_binding", lambda name: SimpleNamespace(nvrtcVersion=gone))
    with pytest.raises(PrerequisiteError, match=f"the engine's kernels need .*{lacks}"):
        answerer(asking("qatbench"), models["text"], "cuda", torch.bfloat16, silent)
    assert not loads
    found = answerer(asking(), models["text"], "cuda", torch.bfloat16, silent)
    assert loads == ["cuda"], "the plain model alone, once"
    assert found.write is None
    assert found.record["engine"] == "transformers"
    assert found.record["engine_note"].startswith(
        "not by the engine qatbench: the engine's kernels"
    )


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


@pytest.mark.parametrize(("bits", "dense"), [(4, True), (3, True), (8, False)])
def test_eval_ask_and_speed_multiply_a_packed_checkpoint_alike(
    bits: int, dense: bool, make: Make, data: dict[str, str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(kernel, "_memory", lambda: 10**12)
    folder = find(str(make("text", "rtn", bits).path))
    figures = run(folder, asking(limit=2), data, tmp_path / "run")
    assert figures["engine"] == "qatbench"
    assert (figures["kernel"] == "Linear") == dense
    asked = Asked("Which animal is a mammal?", (), 2, engine="qatbench", device="cpu")
    assert ask([folder], asked, silent)["answers"][0]["kernel"] == figures["kernel"]
    settings = SpeedSettings(
        engines=("qatbench",), required=True, batches=(1,), contexts=(8,), tokens=1, repeats=1,
        device="cpu",
    )  # fmt: skip
    (row,) = speed([folder], settings, {}, silent).rows
    assert (row.status, row.kernel) == ("ok", figures["kernel"])


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
