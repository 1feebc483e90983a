"""speed: figures follow from given times, cases go in turns, and what cannot run says so."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tiny import Make, Source

from qatbench import cli, store
from qatbench.engine import pick, plain
from qatbench.engine.runner import Direct, Started
from qatbench.errors import PrerequisiteError, QatbenchError, UsageError
from qatbench.records_speed import Speed, SpeedRow, spread
from qatbench.report import speed as words
from qatbench.stages.common import silent
from qatbench.stages.meter import Meter, is_out_of_memory
from qatbench.stages.speed import speed
from qatbench.stages.speed_measure import SpeedSettings
from qatbench.stages.speed_prompts import prompts
from qatbench.stages.speed_questions import Asked
from qatbench.tasks import selector
from qatbench.vlm import layout
from qatbench.vlm.batch import Encoded, Encoder
from qatbench.vlm.counts import decode_bytes
from qatbench.vlm.load import ModelFolder, find, load


class Clock:
    """Time that passes only when something says so, and what happened in it."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.events: list[str] = []

    def __call__(self) -> float:
        return self.seconds


class Machine(Meter):
    """A meter whose memory is numbers: 1000 bytes are others', a copy takes 0.1 s."""

    def __init__(self, clock: Clock) -> None:
        super().__init__("cpu", clock)
        self.counts_memory = True
        self.clock, self.holds, self.most, self.released = clock, 1000, 1000, 0

    def now(self) -> float:
        return self.clock()

    def held(self) -> int:
        return self.holds

    def watch(self) -> None:
        self.most = self.holds

    def peak(self) -> int:
        return self.most

    def collect(self) -> None:
        pass

    def release(self) -> None:
        self.released += 1

    def bandwidth(self, repeats: int, size: int | None = None) -> tuple[int, list[float]]:
        return 500, [10_000.0] * repeats


class Fake(Direct):
    """A runner of stated speed: seconds a prompt token and a step, whatever the batch."""

    kernel, attention = "fake", "none"

    def __init__(self, loaded: Any, engine: str, machine: Machine, step: float) -> None:
        self.loaded, self.engine, self.machine, self.seconds = loaded, engine, machine, step
        self.rooms: list[int] = []
        machine.holds += 300  # weights

    def start(self, given: Sequence[Encoded], room: int) -> Started:
        self.rooms.append(room)
        self.machine.clock.seconds += self.seconds / 10 * len(given[0])
        if not self.machine.clock.events:
            self.machine.holds += 40  # the first runner that starts keeps something
        self.machine.clock.events.append(f"{self.loaded.folder.name} {self.engine} {len(given)}")
        self.machine.most = max(self.machine.most, self.machine.holds + 50 * len(given))
        return Started(torch.zeros(len(given), dtype=torch.long), room, None)

    def step(self, started: Started, count: int) -> torch.Tensor:
        self.machine.clock.seconds += self.seconds * count
        self.seconds *= 1.5 if len(self.rooms) == 1 else 1  # the warm-up was faster
        return torch.zeros(len(started.first), count, dtype=torch.long)

    def weight_bytes(self) -> int:
        return 300

    def cache_bytes(self, started: Started) -> int:
        return 7 * len(started.first) * started.room


@pytest.fixture
def machine() -> Machine:
    return Machine(Clock())


@pytest.fixture
def fakes(
    models: dict[str, ModelFolder], machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> list[ModelFolder]:
    """Two text models: after the warm-up `slow` takes 0.3 s a step and `quick` 0.15 s in plain
    transformers, a third of that in this project's engine."""
    folder = models["text"]
    loaded = load(folder, device="cpu", dtype=torch.float32)
    folders = [ModelFolder(name, folder.path, folder.config, {}) for name in ("slow", "quick")]

    def made(engine: str, folder: ModelFolder, **_: Any) -> Fake:
        step = (0.2 if folder.name == "slow" else 0.1) / (3 if engine == "qatbench" else 1)
        there = type(loaded)(folder, loaded.model, loaded.tokenizer, None, "dense")
        return Fake(there, engine, machine, step)

    monkeypatch.setattr(pick, "load", made)
    return folders


def by_case(found: Speed) -> dict[tuple[str, str, int, int], SpeedRow]:
    return {(row.model, row.engine, row.batch, row.context): row for row in found.rows}


SMALL = SpeedSettings(batches=(1, 4), contexts=(20,), tokens=10, repeats=3, warm_up=1)


def test_figures_follow_from_the_times(fakes: list[ModelFolder], machine: Machine) -> None:
    found = speed(fakes, SMALL, {}, silent, machine)
    rows = by_case(found)
    assert len(rows) == len(found.rows) == 2 * 2 * 2
    slow = rows["slow", "transformers", 4, 20]
    assert slow.status == "ok"
    assert slow.decode_tokens_per_second is not None
    assert slow.decode_tokens_per_second.n == 3
    assert slow.decode_tokens_per_second.median == pytest.approx(4 / 0.3)
    assert slow.first_token_seconds is not None
    assert slow.first_token_seconds.median == pytest.approx(0.03 * 20)
    assert slow.prefill_tokens_per_second is not None
    assert slow.prefill_tokens_per_second.median == pytest.approx(4 / 0.03)
    assert slow.cache_bytes == 7 * 4 * 11  # the first token and ten more
    assert slow.weight_bytes == 300
    # warm-up, at 0.2 s a step, is in none of the repeats
    alone = rows["slow", "transformers", 1, 20].decode_tokens_per_second
    assert alone is not None
    assert alone.values == pytest.approx((1 / 0.3,) * 3)


def test_ratios_are_to_the_first_model_and_to_plain_transformers(
    fakes: list[ModelFolder], machine: Machine
) -> None:
    rows = by_case(speed(fakes, SMALL, {}, silent, machine))
    ratios = {
        key[:2]: (row.decode_to_first, row.decode_to_plain, row.prefill_to_plain)
        for key, row in rows.items()
        if row.batch == 4
    }
    assert ratios == {
        ("slow", "transformers"): pytest.approx((1, 1, 1)),
        ("quick", "transformers"): pytest.approx((2, 1, 1)),
        ("slow", "qatbench"): pytest.approx((1, 3, 3)),
        ("quick", "qatbench"): pytest.approx((2, 3, 3)),
    }


def test_repeats_are_in_turns(fakes: list[ModelFolder], machine: Machine) -> None:
    turn = ["slow transformers", "slow qatbench", "quick transformers", "quick qatbench"]
    speed(fakes, SMALL, {}, silent, machine)
    wanted = [f"{who} {batch}" for batch in (1, 4) for _ in range(4) for who in turn]
    assert machine.clock.events == wanted
    machine.clock.events = ["apart"]
    apart = SpeedSettings(
        batches=(1,), contexts=(20,), tokens=2, repeats=2, warm_up=0, in_turns=False
    )
    found = speed(fakes, apart, {}, silent, machine)
    assert machine.clock.events[1:] == [f"{who} 1" for who in turn for _ in range(2)]
    assert not found.in_turns
    assert "one model and engine after the other" in words.render(found)


def test_the_peak_is_what_one_model_holds(fakes: list[ModelFolder], machine: Machine) -> None:
    rows = by_case(speed(fakes, SMALL, {}, silent, machine))
    # its weights, what its engine kept from the first run on, what a run takes beside them;
    # nothing of the other three
    assert rows["slow", "transformers", 4, 20].peak_bytes == 300 + 40 + 4 * 50
    assert rows["quick", "qatbench", 4, 20].peak_bytes == 300 + 4 * 50


def test_the_limit_is_bytes_over_bandwidth(fakes: list[ModelFolder], machine: Machine) -> None:
    found = speed(fakes, SMALL, {}, silent, machine)
    row = by_case(found)["slow", "qatbench", 4, 20]
    moved = decode_bytes(fakes[0].config, 4, 4, 20 + 5)
    assert row.moved_bytes == moved
    assert row.limit_tokens_per_second == pytest.approx(4 * 10_000 / (moved or 0))
    assert row.share_of_limit == pytest.approx((4 / 0.1) / (4 * 10_000 / (moved or 0)))


def test_the_limit_is_of_what_an_engine_reads_of_the_head(
    fakes: list[ModelFolder], machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = fakes[0].config
    monkeypatch.setattr(Fake, "head_bytes", lambda self, rows: 100 * rows)
    row = by_case(speed(fakes, SMALL, {}, silent, machine))["slow", "qatbench", 4, 20]
    text = layout.text_sizes(config)
    head = 4 * int(text["vocab_size"]) * int(text["hidden_size"])
    assert row.moved_bytes == (decode_bytes(config, 4, 4, 20 + 5) or 0) - head + 400


def test_memory_that_runs_out_is_a_row(
    fakes: list[ModelFolder], machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = Fake.start

    def full(self: Fake, given: Sequence[Encoded], room: int) -> Started:
        if self.loaded.folder.name == "slow" and len(given) == 4 and len(self.rooms) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return start(self, given, room)

    monkeypatch.setattr(Fake, "start", full)
    told: list[tuple[int, int]] = []
    found = speed(fakes, SMALL, {}, lambda what, done, total: told.append((done, total)), machine)
    rows = by_case(found)
    assert {key for key, row in rows.items() if row.status == "out of memory"} == {
        ("slow", "transformers", 4, 20), ("slow", "qatbench", 4, 20),
    }  # fmt: skip
    lost = rows["slow", "qatbench", 4, 20]
    assert lost.decode_tokens_per_second is None  # though some repeats went well
    assert rows["quick", "qatbench", 4, 20].decode_to_first is None
    assert rows["quick", "qatbench", 4, 20].decode_to_plain == pytest.approx(3)
    assert told[-1][0] == told[-1][1] == 2 * 2 * 2 * 4
    assert "slow in qatbench, out of memory: a batch of 4 at 20 tokens" in words.render(found)
    assert words.speed_rows(found)[-3]["decode tok/s"] == "out of memory"


def test_weights_that_do_not_fit_are_rows(
    fakes: list[ModelFolder], machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = pick.load

    def one(engine: str, folder: ModelFolder, **how: Any) -> Any:
        if folder.name == "quick":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return made(engine, folder, **how)

    monkeypatch.setattr(pick, "load", one)
    rows = by_case(speed(fakes, SMALL, {}, silent, machine))
    lost = rows["quick", "transformers", 1, 20]
    assert (lost.status, lost.kernel) == ("out of memory", "-")
    assert "--apart" in lost.reason
    assert rows["slow", "transformers", 1, 20].status == "ok"


@pytest.mark.parametrize("kind", [PrerequisiteError, UsageError])
def test_an_engine_that_cannot_run_is_a_row_unless_it_was_named(
    fakes: list[ModelFolder],
    machine: Machine,
    monkeypatch: pytest.MonkeyPatch,
    kind: type[QatbenchError],
) -> None:
    made = pick.load

    def one(engine: str, folder: ModelFolder, **how: Any) -> Any:
        if engine == "qatbench":
            raise kind("the engine needs a GPU")
        return made(engine, folder, **how)

    monkeypatch.setattr(pick, "load", one)
    rows = by_case(speed(fakes, SMALL, {}, silent, machine))
    assert rows["slow", "qatbench", 1, 20].status == "not run"
    assert rows["slow", "qatbench", 1, 20].reason == "the engine needs a GPU"
    only = SpeedSettings(engines=("qatbench",), required=True, batches=(1,), contexts=(20,))
    with pytest.raises(kind, match="needs a GPU"):
        speed(fakes, only, {}, silent, machine)
    only = SpeedSettings(engines=("qatbench",), batches=(1,), contexts=(20,))
    with pytest.raises(PrerequisiteError, match="needs a GPU") as error:
        speed(fakes, only, {}, silent, machine)
    assert error.value.hint == "--engine transformers"


# --- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"contexts": (512, 2048)}, "1024 positions"),
        ({"contexts": (960,), "tokens": 64}, "need 1025"),
        ({"image": "mini"}, "sees pictures"),
        ({"engines": ("transformers", "sglang")}, "no engine 'sglang'"),
        ({"engines": ("transformers", "transformers")}, "named twice"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_loading(
    models: dict[str, ModelFolder],
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    said: str,
) -> None:
    monkeypatch.setattr(pick, "load", lambda *_, **__: pytest.fail("a model was loaded"))
    settings = SpeedSettings(**({"contexts": (20,), "batches": (1,)} | changes))
    with pytest.raises(UsageError, match=said):
        speed([models["text"]], settings, {}, silent)


def test_a_context_that_just_fits_does() -> None:
    """A prompt, its first token and those after it need 959 + 65 = 1024 positions."""
    from qatbench.stages import speed as stage

    folder = ModelFolder("m", Path(), {"model_type": "llama", "max_position_embeddings": 1024}, {})
    settings = SpeedSettings(contexts=(959,), tokens=64)
    stage._check([folder], settings)


def test_memory_in_torchs_words() -> None:
    assert is_out_of_memory(torch.OutOfMemoryError("x"))
    cpu = "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
    assert is_out_of_memory(RuntimeError(cpu))
    assert not is_out_of_memory(RuntimeError("shapes cannot be multiplied"))


def test_bandwidth_counts_what_is_read_and_written() -> None:
    clock = Clock()

    def tick() -> float:
        clock.seconds += 0.5
        return clock.seconds

    assert Meter("cpu", tick).bandwidth(3, 1000) == (1000, [4000.0] * 3)


# --- prompts ------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["text", "llava", "qwen2", "qwen2_vl", "qwen3_vl"])
@pytest.mark.parametrize("image", ["none", "mini", "grey"])
def test_prompts_have_their_length_and_no_special_token(
    source: Source, family: str, image: Any
) -> None:
    loaded = load(source(family), device="cpu", dtype=torch.float32)
    encoder = Encoder(loaded)
    made = prompts(encoder, 3, 300, image=image, seed=1)
    assert [len(one) for one in made] == [300] * 3
    assert made[0].ids != made[1].ids
    assert [one.ids for one in prompts(encoder, 3, 300, image=image, seed=1)] == [
        one.ids for one in made
    ]
    assert prompts(encoder, 3, 300, image=image, seed=2)[0].ids != made[0].ids
    pictured = image != "none" and loaded.arch.is_vlm
    assert bool(made[0].pixels) == pictured
    head = len(made[0].ids) - 300 if not pictured else made[0].ids.index(encoder.image_token)
    special = set(loaded.tokenizer.all_special_ids)
    if not pictured:
        assert not special.intersection(token for one in made for token in one.ids)
    elif loaded.arch.mrope:
        again = encoder._placed(made[0].ids, "", made[0].pixels)
        assert made[0].places is not None
        assert torch.equal(made[0].places, again.places)
        assert torch.equal(made[0].kinds, again.kinds)
    assert head >= 0
    assert plain.PlainRunner(loaded).start(made, 2).first.shape == (3,)


def test_a_context_below_a_picture_is_refused(models: dict[str, ModelFolder]) -> None:
    encoder = Encoder(load(models["llava"], device="cpu", dtype=torch.float32))
    with pytest.raises(UsageError, match="a picture and its marks are"):
        prompts(encoder, 1, 10, image="grey", seed=0)


# --- bytes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["text", "llava", "qwen2", "qwen3", "qwen2_vl"])
def test_bytes_of_a_step_are_those_of_the_language_model(source: Source, family: str) -> None:
    folder = source(family)
    loaded = load(folder, device="cpu", dtype=torch.float32)
    vision = (*loaded.arch.vision, *loaded.arch.projector)
    weights = sum(
        4 * value.numel()
        for name, value in loaded.model.named_parameters()
        if not name.startswith(vision) and "embed_tokens" not in name
    )
    assert decode_bytes(folder.config, 4, 1, 0) == weights
    runner = plain.PlainRunner(loaded)
    cache = runner.cache_bytes(runner.start([Encoder(loaded).tokens([5, 6, 7])] * 2, 3))
    assert decode_bytes(folder.config, 4, 2, 6) == weights + cache


def test_a_tied_head_is_moved_too(source: Source) -> None:
    tied, free = source("qwen2", tied=True), source("qwen2")
    assert decode_bytes(tied.config, 2, 1, 0) == decode_bytes(free.config, 2, 1, 0)


def test_packed_linears_count_as_they_are_stored(
    make: Make, models: dict[str, ModelFolder]
) -> None:
    folder = find(str(make("text", "rtn", 4).path))
    stored = 0
    with safe_open(folder.path / "model.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118
            if name.endswith(("qweight", "qzeros", "scales")):
                stored += file.get_tensor(name).nbytes
    dense = decode_bytes(models["text"].config, 2, 1, 0)
    packed = decode_bytes(folder.config, 2, 1, 0)
    linears = sum(
        2 * value.numel()
        for name, value in load(
            models["text"], device="cpu", dtype=torch.float32
        ).model.named_parameters()
        if "_proj" in name
    )
    assert packed is not None
    assert dense is not None
    assert packed - stored == dense - linears
    config = folder.config | {"quantization_config": {"quant_method": "unheard-of"}}
    assert decode_bytes(config, 2, 1, 0) is None


# --- the whole of it ----------------------------------------------------------------------------


def test_questions_are_those_of_the_task_and_in_turns(
    models: dict[str, ModelFolder], data: dict[str, str], make: Make
) -> None:
    asked = Asked(selector.parse("scienceqa:test:text"), "qatbench", 3)
    settings = SpeedSettings(
        engines=("transformers",), batches=(1,), contexts=(8,), tokens=2, repeats=2, asked=asked
    )
    folders = [models["text"], find(str(make("text", "rtn", 4).path))]
    found = speed(folders, settings, data, silent)
    first, packed = found.evaluations
    assert first.questions == 3
    assert first.questions_per_second is not None
    assert first.questions_per_second.n == 2
    assert packed.kernel != first.kernel == "Linear"
    assert found.notes == ()
    assert found.models[1].bits == 4
    images = Asked(selector.parse("scienceqa:test:image"), "qatbench", 2)
    with pytest.raises(UsageError, match="text model"):
        speed(folders, SpeedSettings(contexts=(8,), asked=images), data, silent)


def test_the_verb(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "argv", ["qatbench"])

    def command(*args: str) -> tuple[Any, str, str]:
        with pytest.raises(SystemExit) as ended:
            cli.main(["speed", *args])
        told = capsys.readouterr()
        return ended.value.code, told.out, told.err

    small = ("mini/student", "--engine", "transformers", "--batch", "1,2", "--context", "64",
             "--tokens", "3", "--repeats", "2", "--image", "mini", "--device", "cpu")  # fmt: skip
    out = tmp_path / "speed"
    code, text, err = command(*small, "--out", str(out), "--json")
    assert (code, err.splitlines()[-1].startswith("next: qatbench compare")) == (0, True)
    found = Speed.model_validate_json(text)
    assert found == Speed.model_validate(store.read_json(out / "speed.json"))
    assert [(row.batch, row.images, row.status) for row in found.rows] == [
        (1, 1, "ok"), (2, 1, "ok"),
    ]  # fmt: skip
    row = found.rows[0]
    assert (row.engine, row.kernel, row.attention, row.dtype) == (
        "transformers", "Linear", "sdpa", "float32",
    )  # fmt: skip
    assert row.fingerprint == find("mini/student").fingerprint()
    assert row.peak_bytes is None
    assert row.decode_to_first == row.decode_to_plain == 1
    assert found.versions["torch"]
    page = (out / "speed.md").read_text()
    assert "not measured" in page
    assert "no task was given" in page
    assert page == words.render(found)
    assert not list(out.glob(".*"))
    code, text, _ = command(*small)
    assert (code, "decode tok/s" in text, "GB/s read and written" in text) == (0, True, True)
    assert "peak MB" not in text
    assert "peak memory: not measured" in text
    for flags, said in (
        (("--batch", "0"), "whole numbers"),
        (("--out", str(out / "speed.md")), "is a file"),
        (("--context", "512,2048"), "1024 positions"),
        (("--protocol", "qatbench"), "no task"),
    ):
        code, text, err = command(*small, *flags)
        assert (code, text) == (2, "")
        assert said in err


def test_a_spread_says_the_middle_and_the_ends() -> None:
    told = spread([3.0, 1.0, 2.0, 10.0])
    assert (told.median, told.low, told.high, told.n) == (2.5, 1.0, 10.0, 4)
    assert json.loads(told.model_dump_json())["values"] == [3.0, 1.0, 2.0, 10.0]
