"""speed --engine vllm: its steps are told apart by the clock, or it is refused; no GPU here."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import fake_vllm
import pytest
import torch
from tiny import Make, Source

from qatbench import cli
from qatbench.engine import pick, plain, vllm
from qatbench.engine.runner import Room
from qatbench.engine.vllm import VllmRunner
from qatbench.errors import PrerequisiteError, UsageError
from qatbench.report import speed as words
from qatbench.stages.common import silent
from qatbench.stages.meter import Meter
from qatbench.stages.speed import speed
from qatbench.stages.speed_measure import SpeedSettings
from qatbench.stages.speed_prompts import prompts
from qatbench.vlm.batch import Encoded, Encoder
from qatbench.vlm.load import ModelFolder, find, load

Begin = Callable[..., tuple[VllmRunner, Any]]
CPU: dict[str, Any] = {"device": "cpu", "dtype": torch.float32}


@pytest.fixture
def there(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The fake's class of `LLM`, installed."""
    return fake_vllm.install(monkeypatch)


@pytest.fixture
def begin(there: Any) -> Begin:
    """A model in the engine, and the fake that holds it."""

    def one(folder: ModelFolder, rows: int = 3, prompt: int = 40, tokens: int = 6) -> Any:
        runner = pick.load("vllm", folder, **CPU, room=Room(rows, prompt, tokens))
        return runner, there.made[-1]

    return one


def texts(runner: VllmRunner, *lengths: int) -> list[Encoded]:
    encoder = Encoder(runner.loaded)
    return [encoder.tokens(range(5, 5 + length)) for length in lengths]


# --- what is told -------------------------------------------------------------------------------


@pytest.mark.parametrize("ahead", [True, False])
@pytest.mark.parametrize("family", ["text", "llava", "qwen2_vl", "qwen3_vl"])
def test_tokens_are_those_of_plain_transformers_however_they_are_asked_for(
    source: Source, begin: Begin, there: Any, family: str, ahead: bool
) -> None:
    there.ahead = ahead
    folder = source(family)
    reference = plain.PlainRunner(load(folder, **CPU))
    runner, fake = begin(folder)
    assert runner.ahead == ahead
    image: Any = "none" if family == "text" else "grey"
    given = prompts(Encoder(reference.loaded), 3, 300, image=image, seed=1)
    assert all(bool(one.images) == (family != "text") for one in given)
    runner, fake = begin(folder, prompt=300)
    mine = prompts(Encoder(runner.loaded), 3, 300, image=image, seed=1)
    assert [one.ids for one in mine] == [one.ids for one in given]
    for _ in range(2):  # a second batch begins anew
        runner.prepare(mine)
        started = runner.start(mine, 6)
        parts = [started.first[:, None], runner.step(started, 2), runner.step(started, 0)]
        told = torch.cat([*parts, runner.step(started, 3)], 1)
        wanted = reference.start(given, 6)
        assert torch.equal(told, torch.cat([wanted.first[:, None], reference.step(wanted, 5)], 1))
        assert not fake.llm_engine.has_unfinished_requests()
        with pytest.raises(UsageError, match="room for 0"):
            runner.step(started, 1)
    assert fake.rendered == (0 if family == "text" else 2 * 3)  # no picture is known from before


def test_it_is_asked_greedily_and_for_no_more_than_the_room(
    models: dict[str, ModelFolder], begin: Begin
) -> None:
    runner, fake = begin(models["text"], rows=2, prompt=33, tokens=5)
    assert fake.asked["max_num_batched_tokens"] == 66  # two prompts in one step
    assert fake.asked["max_model_len"] == 38
    assert fake.asked["enable_prefix_caching"] is False
    assert fake.asked["load_format"] == "safetensors"
    assert fake.asked["dtype"] == "float32"
    started = runner.start(texts(runner, 33, 33), 5)
    asked = fake.llm_engine.params[-1]
    assert (asked.temperature, asked.max_tokens, asked.ignore_eos, asked.detokenize) == (
        0.0, 5, True, False,
    )  # fmt: skip
    assert asked.output_kind is fake_vllm.RequestOutputKind.DELTA
    text = fake.loaded.model.config
    token = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * 4
    assert runner.cache_bytes(started) == 2 * 48 * token  # 38 tokens a row are three blocks of 16
    assert runner.weight_bytes() == 2 * 10 * 5 * 4
    assert (runner.kernel, runner.attention) == ("UnquantizedLinearMethod", "FLASH_ATTN")
    assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    assert os.environ["VLLM_LOGGING_LEVEL"] == "1"  # as it was set


def test_pictures_are_not_kept(source: Source, begin: Begin) -> None:
    _, fake = begin(source("llava"))
    assert fake.asked["limit_mm_per_prompt"] == {"image": 1, "video": 0}
    assert fake.asked["mm_processor_cache_gb"] == 0


def test_a_packed_model_names_its_kernel(make: Make, begin: Begin) -> None:
    runner, _ = begin(find(str(make("text", "rtn", 4).path)))
    assert runner.kernel == "auto_gptq/MarlinLinearKernel"


def test_rows_can_be_left_and_a_batch_given_up(
    models: dict[str, ModelFolder], begin: Begin
) -> None:
    runner, fake = begin(models["text"])
    given = texts(runner, 10, 20, 30)
    alone = runner.start(given[2:], 6)
    wanted = runner.step(alone, 5)
    started = runner.start(given, 6)
    runner.step(started, 1)
    runner.keep(started, [2, 0])
    assert len(fake.llm_engine.aborted) == 1
    assert torch.equal(runner.step(started, 2)[0], wanted[0, 1:3])
    with pytest.raises(UsageError, match="room for a batch once"):
        runner.grow(started, 4)
    again = runner.start(given[2:], 6)  # what was not told to its end is taken back
    assert len(fake.llm_engine.aborted) == 3
    assert torch.equal(runner.step(again, 5), wanted)
    runner.close()
    assert fake.llm_engine.closed == 1


# --- what is refused ----------------------------------------------------------------------------


def test_a_batch_that_is_not_told_in_step_is_refused(
    models: dict[str, ModelFolder], begin: Begin, there: Any
) -> None:
    there.budget = 50  # of tokens a step: the third prompt is read behind the first one's tokens
    runner, _ = begin(models["text"])
    with pytest.raises(PrerequisiteError, match="3 rows of 30 tokens in step"):
        runner.start(texts(runner, 30, 30, 30), 6)


def test_a_batch_that_ends_early_is_refused(models: dict[str, ModelFolder], begin: Begin) -> None:
    runner, fake = begin(models["text"])
    started = runner.start(texts(runner, 10), 6)
    fake.llm_engine.abort_request(started.state.names)
    with pytest.raises(PrerequisiteError, match="ended a batch after 1 of 4 tokens"):
        runner.step(started, 3)


def test_a_batch_beyond_the_cache_is_refused(models: dict[str, ModelFolder], begin: Begin) -> None:
    runner, _ = begin(models["text"], rows=1, prompt=250, tokens=6)
    runner.start(texts(runner, 250), 6)
    with pytest.raises(PrerequisiteError, match="4 rows of 206 need 52"):
        runner.start(texts(runner, 200, 200, 200, 200), 6)


def test_other_tokens_than_the_prompts_are_refused(
    source: Source, begin: Begin, there: Any
) -> None:
    there.spoils = 1
    runner, _ = begin(source("llava"), prompt=300)
    given = prompts(Encoder(runner.loaded), 1, 300, image="grey", seed=1)
    with pytest.raises(PrerequisiteError, match="vLLM makes 301 of a prompt's 300 tokens"):
        runner.prepare(given)


def test_what_it_does_not_run_is_one_line(
    models: dict[str, ModelFolder], begin: Begin, there: Any
) -> None:
    there.fails = ValueError("no kernel for a head of 32\nmany more lines")
    with pytest.raises(PrerequisiteError) as error:
        begin(models["text"])
    assert error.value.message.endswith(": no kernel for a head of 32")
    assert "0.33" in error.value.hint
    there.fails = torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(torch.OutOfMemoryError):
        begin(models["text"])
    with pytest.raises(UsageError, match="for speed alone"):
        pick.load("vllm", models["text"], **CPU)


def test_a_device_that_it_was_not_built_for(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_vllm.install(monkeypatch, "cuda")
    with pytest.raises(PrerequisiteError, match="runs on cuda, not on cpu"):
        vllm.require("cpu")
    with pytest.raises(PrerequisiteError, match="not on cuda:1") as error:
        vllm.require("cuda:1")
    assert "CUDA_VISIBLE_DEVICES=1" in error.value.hint
    assert vllm.require("cuda:0") == {"vllm": fake_vllm.VERSION}
    monkeypatch.setitem(sys.modules, "vllm.platforms", SimpleNamespace())
    with pytest.raises(PrerequisiteError, match=r"cannot be imported: .*current_platform"):
        vllm.require("cuda")


def test_without_it_the_verb_says_so_before_a_model_is_loaded(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_vllm.install(monkeypatch)
    monkeypatch.setitem(sys.modules, "vllm", None)  # as if it were not there
    monkeypatch.setattr(pick, "load", lambda *_, **__: pytest.fail("a model was loaded"))
    monkeypatch.setattr(Meter, "bandwidth", lambda *_: pytest.fail("something was measured"))
    monkeypatch.setattr(sys, "argv", ["qatbench"])
    with pytest.raises(SystemExit) as ended:
        cli.main(["speed", "mini/student", "--engine", "vllm", "--device", "cpu",
                  "--context", "64"])  # fmt: skip
    told = capsys.readouterr()
    assert (ended.value.code, told.out) == (3, "")
    assert "error: vLLM is not installed\n" in told.err
    assert "hint: pip install vllm" in told.err


# --- what is measured ---------------------------------------------------------------------------


class Machine(Meter):
    """A meter whose memory is a number, and whose clock waits for the fake's device."""

    def __init__(self, device: fake_vllm.Device) -> None:
        self.clock = SimpleNamespace(seconds=0.0)
        super().__init__("cpu", lambda: self.clock.seconds)
        self.fake, self.counts_memory = device, True
        device.clock = self.clock

    def now(self) -> float:
        self.fake.wait(self.fake.free)
        self.clock.seconds += 1e-9  # what takes none of the fake's time takes some
        return self.clock.seconds

    def held(self) -> int:
        return 1000

    watch = collect = release = lambda self: None

    def peak(self) -> int:
        return 5000

    def bandwidth(self, repeats: int, size: int | None = None) -> tuple[int, list[float]]:
        return 500, [10_000.0] * repeats


@pytest.mark.parametrize("ahead", [True, False])
def test_reading_and_telling_are_timed_apart(
    models: dict[str, ModelFolder], there: Any, ahead: bool
) -> None:
    there.ahead = ahead
    there.device.prompt_token, there.device.step = 0.01, 0.5
    settings = SpeedSettings(
        engines=("transformers", "vllm"), required=True, batches=(1, 2), contexts=(20, 30),
        tokens=4, repeats=2, **CPU | {"dtype": "float32"},
    )  # fmt: skip
    found = speed([models["text"]], settings, {}, silent, Machine(there.device))
    rows = {(row.engine, row.batch, row.context): row for row in found.rows}
    assert len(rows) == 8
    for batch, context in ((1, 20), (2, 20), (1, 30), (2, 30)):
        row = rows["vllm", batch, context]
        assert row.status == "ok"
        assert row.first_token_seconds is not None
        assert row.first_token_seconds.values == pytest.approx([batch * context * 0.01] * 2)
        assert row.decode_tokens_per_second is not None
        assert row.decode_tokens_per_second.values == pytest.approx([batch / 0.5] * 2)
        assert row.peak_bytes is None  # its cache is there for the largest case in every one
        assert row.cache_bytes
    assert rows["transformers", 2, 20].peak_bytes == 4000
    assert (there.made[0].asked["max_num_seqs"], there.made[0].asked["max_model_len"]) == (2, 35)
    assert [fake.llm_engine.closed for fake in there.made] == [1]
    assert found.versions["vllm"] == fake_vllm.VERSION
    assert vllm.NOTE in found.notes
    page = words.render(found)
    assert vllm.NOTE in page
    assert "not measured" in page


def test_what_does_not_fit_is_a_row(models: dict[str, ModelFolder], there: Any) -> None:
    there.fails = torch.OutOfMemoryError("CUDA out of memory")
    settings = SpeedSettings(
        engines=("transformers", "vllm"), required=True, batches=(1,), contexts=(20,), tokens=2,
        repeats=1, device="cpu",
    )  # fmt: skip
    found = speed([models["text"]], settings, {}, silent, Machine(there.device))
    assert {row.engine: row.status for row in found.rows} == {
        "transformers": "ok", "vllm": "out of memory",
    }  # fmt: skip
    lost = next(row for row in found.rows if row.engine == "vllm")
    assert "room for the largest case" in lost.reason


def test_it_is_measured_only_where_it_is_named(models: dict[str, ModelFolder]) -> None:
    assert SpeedSettings().engines == pick.ENGINES == ("transformers", "qatbench")
    with pytest.raises(UsageError, match="no engine 'sglang'") as error:
        speed([models["text"]], SpeedSettings(engines=("sglang",)), {}, silent)
    assert error.value.hint == "--engine transformers or qatbench or vllm"
