"""ask: answers of several checkpoints side by side, one loaded at a time."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from PIL import Image
from tiny import Make

from qatbench import cli
from qatbench.engine import pick, plain
from qatbench.errors import ArtifactError, PrerequisiteError, UsageError
from qatbench.stages import ask as stage
from qatbench.stages.ask import Asked, ask, differs_at
from qatbench.stages.common import silent
from qatbench.vlm.batch import Encoder
from qatbench.vlm.generate import generate
from qatbench.vlm.load import ModelFolder, find, load


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    Image.new("RGB", (48, 48), (200, 30, 30)).save(tmp_path / "red.png")
    return tmp_path / "red.png"


@pytest.mark.parametrize(
    ("first", "other", "at"),
    [
        ([1, 2], [1, 2], None),
        ([1, 2], [1, 3], 1),
        ([1, 2], [1], 1),
        ([], [5], 0),
        ([], [], None),
    ],
)
def test_where_answers_differ(first: list[int], other: list[int], at: int | None) -> None:
    assert differs_at(first, other) == at
    assert differs_at(other, first) == at


def test_answers_are_those_of_generate(models: dict[str, ModelFolder], picture: Path) -> None:
    asked = Asked("Which animal is a mammal?", (picture,), 12, device="cpu")
    (answer,) = ask([models["llava"]], asked, silent)["answers"]
    loaded = load(models["llava"], device="cpu", dtype=torch.float32)
    prompt = Encoder(loaded).prompt(asked.question, picture)
    assert answer["text"] == generate(loaded, [prompt], 12)[0].strip()
    assert answer["prompt_tokens"] == len(prompt)
    assert answer["tokens"]
    assert answer["fingerprint"] == models["llava"].fingerprint()


def test_an_answer_stops_where_the_model_ends_it(
    models: dict[str, ModelFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = Asked("Which animal is a mammal?", (), 12, device="cpu")
    (free,) = ask([models["text"]], asked, silent)["answers"]
    end = free["tokens"][4]
    monkeypatch.setattr(stage, "ends", lambda loaded: {end})
    (cut,) = ask([models["text"]], asked, silent)["answers"]
    assert cut["ended"]
    assert cut["tokens"] == free["tokens"][: free["tokens"].index(end)]


def test_side_by_side_and_one_at_a_time(
    models: dict[str, ModelFolder], make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    alive: list[str] = []

    class Counted(plain.PlainRunner):
        def __init__(self, loaded: Any) -> None:
            super().__init__(loaded)
            self.name = loaded.folder.name
            assert not alive, "another model is still loaded"
            alive.append(self.name)

        def __del__(self) -> None:
            alive.remove(self.name)

    monkeypatch.setattr(plain, "PlainRunner", Counted)
    other = find(str(tiny.save_text_model(tmp_path / "other", seed=7)))
    folders = [models["text"], find(str(make("text", "rtn", 4).path)), other, models["text"]]
    found = ask(folders, Asked("What color is the square?", (), 10, device="cpu"), silent)
    first, packed, unlike, same = found["answers"]
    assert first["differs_at"] is None
    assert same["differs_at"] is None
    assert packed["kernel"] != "Linear"
    assert unlike["differs_at"] == differs_at(first["tokens"], unlike["tokens"]) is not None
    assert not alive


def test_tokens_of_other_vocabularies_are_not_compared(
    models: dict[str, ModelFolder], source: Any
) -> None:
    found = ask([models["text"], source("qwen2")], Asked("What?", (), 4, device="cpu"), silent)
    assert found["answers"][1]["same_tokenizer"] is False
    assert found["answers"][1]["differs_at"] is None


class _Clock:
    """Seconds that only a forward takes: a whole one each."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def test_seconds_and_rate_are_those_of_the_clock(
    models: dict[str, ModelFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, tell = _Clock(), plain.tell

    def slow(*given: Any) -> Any:
        clock.seconds += 0.5
        return tell(*given)

    monkeypatch.setattr(plain, "tell", slow)
    monkeypatch.setattr(stage, "ends", lambda loaded: set())
    asked = Asked("Which animal is a mammal?", (), 11, device="cpu")
    (answer,) = ask([models["text"]], asked, silent, stage.Meter("cpu", clock))["answers"]
    assert (answer["first_token_seconds"], answer["seconds"]) == (0.5, 5.5)
    assert answer["tokens_per_second"] == 2.0
    assert len(answer["tokens"]) == 11
    (answer,) = ask(
        [models["text"]], Asked("What?", (), 1, device="cpu"), silent, stage.Meter("cpu", clock)
    )["answers"]
    assert answer["tokens_per_second"] is None


def test_what_a_gpu_makes_at_first_use_is_not_an_answers_time(
    models: dict[str, ModelFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, start, prepared = _Clock(), plain.PlainRunner.start, []

    def prepare(self: plain.PlainRunner, *given: Any) -> Any:
        clock.seconds += 100.0 if not prepared else 0.25
        prepared.append(1)
        return start(self, *given)

    class OnGpu(stage.Meter):
        def __init__(self) -> None:
            super().__init__("cpu", clock)
            self.device = torch.device("cuda")

    monkeypatch.setattr(plain.PlainRunner, "start", prepare)
    asked = Asked("What?", (), 1, device="cpu")
    (answer,) = ask([models["text"]], asked, silent, OnGpu())["answers"]
    assert answer["first_token_seconds"] == 0.25
    prepared.clear()
    (answer,) = ask([models["text"]], asked, silent, stage.Meter("cpu", clock))["answers"]
    assert answer["first_token_seconds"] == 100.0


def test_nothing_is_told_after_the_end_that_the_engine_does_not_tell_at_once(
    models: dict[str, ModelFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    forwards: list[int] = []
    tell = plain.tell
    monkeypatch.setattr(plain, "tell", lambda *given: (forwards.append(1), tell(*given))[1])
    asked = Asked("Which animal is a mammal?", (), 12, device="cpu")
    monkeypatch.setattr(stage, "ends", lambda loaded: set())
    free = ask([models["text"]], asked, silent)["answers"][0]["tokens"]
    assert len(forwards) == len(free) == 12
    monkeypatch.setattr(stage, "ends", lambda loaded: {free[5]})
    last = free.index(free[5])
    assert last, "an answer that ends with its first token is not what this is about"
    for at_once, told in ((1, last), (4, -(-last // 4) * 4)):  # beside the first token
        forwards.clear()
        monkeypatch.setattr(plain.PlainRunner, "at_once", at_once)
        (answer,) = ask([models["text"]], asked, silent)["answers"]
        assert answer["tokens"] == free[:last]
        assert len(forwards) == 1 + told


def test_what_cannot_be_asked_is_refused_before_anything_is_loaded(
    models: dict[str, ModelFolder], picture: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(pick, "load", lambda *_, **__: pytest.fail("a model was loaded"))
    both = [models["llava"], models["text"]]
    with pytest.raises(UsageError, match="text model"):
        ask(both, Asked("What?", (picture,)), silent)
    with pytest.raises(PrerequisiteError, match=r"gone\.png"):
        ask(both[:1], Asked("What?", (tmp_path / "gone.png",)), silent)
    picture.write_bytes(b"no picture")
    with pytest.raises(ArtifactError, match="cannot be decoded"):
        ask(both[:1], Asked("What?", (picture,)), silent)
    with pytest.raises(UsageError, match="empty"):
        ask(both, Asked(" "), silent)
    with pytest.raises(UsageError, match="no engine 'tgi'"):
        ask(both, Asked("What?", engine="tgi"), silent)


def test_an_answer_beyond_the_positions_is_refused(models: dict[str, ModelFolder]) -> None:
    with pytest.raises(UsageError, match="1024 positions"):
        ask([models["text"]], Asked("What?", (), 1024, device="cpu"), silent)


def test_memory_that_runs_out_is_a_prerequisite(
    models: dict[str, ModelFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(plain.PlainRunner, "start", full)
    with pytest.raises(PrerequisiteError, match="does not fit"):
        ask([models["text"]], Asked("What?", device="cpu"), silent)


def command(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[Any, str, str]:
    with pytest.raises(SystemExit) as ended:
        cli.main(list(args))
    told = capsys.readouterr()
    return ended.value.code, told.out, told.err


def test_the_verb(
    models: dict[str, ModelFolder],
    picture: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(sys, "argv", ["qatbench"])
    llava, other = str(models["llava"].path), str(tiny.save_llava(tmp_path / "other", seed=3))
    given = ("--image", str(picture), "What color?", "--max-new-tokens", "5", "--device", "cpu")
    code, out, err = command(capsys, "ask", llava, other, *given)
    assert (code, err.splitlines()[-1]) == (0, f"next: qatbench speed {llava} {other}")
    assert "tok/s" in out
    assert f"{other}: differs from {llava} from token" in out.replace("\n", "")
    code, out, err = command(capsys, "ask", llava, *given, "--json")
    value = json.loads(out)
    assert (code, value["images"], len(value["answers"])) == (0, ["red.png"], 1)
    code, out, err = command(capsys, "ask", str(models["text"].path), *given)
    assert (code, out) == (2, "")
    assert err.splitlines()[-2].startswith("error: ")
    assert err.splitlines()[-1].startswith("hint: ")
    code, _, err = command(capsys, "ask", "What?")
    assert code == 2
