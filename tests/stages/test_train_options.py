"""Training's options: where it starts, what of it is trained, and how weights are held."""

from __future__ import annotations

import dataclasses
import json
import sys
import types
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file
from tiny import Make

from qatbench import store
from qatbench.errors import PrerequisiteError, UsageError
from qatbench.quant import lsq
from qatbench.quant.grid import LSQ_RATIOS, Grid, dequantize, quantize, search_scales
from qatbench.quant.packing import unpack_gptq
from qatbench.stages.common import silent
from qatbench.stages.student import language_linears
from qatbench.stages.train import TrainingRun, TrainRequest, train
from qatbench.stages.train_settings import TrainSettings
from qatbench.tasks import selector
from qatbench.vlm.load import ModelFolder, find, load

SETTINGS = TrainSettings(
    method="qat", steps=4, group_size=tiny.GROUP, batch_size=4, micro_batch_size=2, lr=1e-3,
    scale_lr=1e-2, omega_warmup=2,
)  # fmt: skip
GRID = Grid(4, tiny.GROUP)
PROJECTOR = "model.multi_modal_projector"

Models = dict[str, ModelFolder]


@pytest.fixture
def ask(models: Models, data: dict[str, str]) -> Any:
    """A request on a family of tiny models; grace is taught by the student itself."""

    def one(family: str, settings: TrainSettings, **more: Any) -> TrainRequest:
        subset = more.pop("subset", "text" if family == "text" else "all")
        rows = selector.load(selector.parse(f"scienceqa:train:{subset}"), data)
        teacher = models[family] if settings.method in ("grace", "kd") else None
        known = {"teacher": teacher, "device": "cpu", "save_every": 2} | more
        return TrainRequest(settings=settings, student=models[family], questions=rows, **known)

    return one


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]


def digests(folder: Path) -> dict[str, str]:
    return {file.name: store.file_digest(file) for file in folder.glob("*.safetensors")}


class Cut(Exception):  # noqa: N818 - stands for a kill, not for an error
    """Stands for a kill."""


def cut_and_resumed(asked: TrainRequest, out: Path, after: int = 3) -> None:
    def cut(what: str, done: int, total: int) -> None:
        if what.startswith("Training") and done == after:
            raise Cut

    with pytest.raises(Cut):
        train(asked, out, resume=False, progress=cut)
    train(asked, out, resume=True, progress=silent)


@pytest.fixture
def _compiler() -> Iterator[None]:
    with torch._dynamo.config.patch(disable=False):  # these tests switch it off
        yield


# --- the projector and the scales ---------------------------------------------------------------


def test_a_frozen_projector_stays_as_it_was(ask: Any, models: Models, tmp_path: Path) -> None:
    train(ask("llava", replace(SETTINGS, projector="frozen")), tmp_path / "out", resume=False,
          progress=silent)  # fmt: skip
    old, new = (
        load(f, device="cpu", dtype=torch.float32, kernel="dense").model.state_dict()
        for f in (models["llava"], find(str(tmp_path / "out")))
    )
    kept = [name for name in old if PROJECTOR in name or "vision_tower" in name]
    assert len(kept) > 4
    assert all(torch.equal(old[name], new[name]) for name in kept)
    assert not torch.equal(old["lm_head.weight"], new["lm_head.weight"])


def test_a_quantized_projector_is_stored_as_its_rounded_values(ask: Any, tmp_path: Path) -> None:
    asked = ask("llava", replace(SETTINGS, projector="quantized"))
    run = TrainingRun(asked, "cpu", tmp_path)
    run.fit(silent)
    names = [f"{PROJECTOR}.linear_1", f"{PROJECTOR}.linear_2"]
    layers = lsq.quantized_layers(run.student.model)
    assert sorted(layers) == sorted([*language_linears(asked.student), *names])
    expected = {n: dequantize(*layers[n].codes_and_scales(), GRID).bfloat16() for n in names}
    moved = {n: layers[n].log_scale.grad is None and layers[n].log_scale.detach() for n in names}
    start = TrainingRun(asked, "cpu", tmp_path / "again").student.model
    assert all(not torch.equal(moved[n], start.get_submodule(n).log_scale) for n in names)

    told = run.figures()["notes"]
    run.export()

    stored = load_file(tmp_path / "model.safetensors")
    for name in names:
        key = f"{name.removeprefix('model.')}.weight"
        assert torch.equal(stored[key], expected[name])
    assert any("projector" in note and "16-bit" in note for note in told)


def test_a_projector_that_cannot_be_what_is_asked_is_refused(ask: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no projector"):
        TrainingRun(ask("text", replace(SETTINGS, projector="frozen")), "cpu", tmp_path)
    run = TrainingRun(ask("llava", SETTINGS), "cpu", tmp_path)
    from qatbench.stages.student import _projector_linears

    for bad in (48, 128):
        lsq.detach(run.student.model)
        with pytest.raises(UsageError, match=rf"group size {bad} .* 64 inputs of {PROJECTOR}"):
            _projector_linears(run.student, Grid(4, bad))


def test_lsqs_factor_scales_the_gradient_of_every_layer(ask: Any, tmp_path: Path) -> None:
    run = TrainingRun(ask("text", replace(SETTINGS, scale_gradient="lsq")), "cpu", tmp_path)
    factors = {layer.gradient_factor for layer in lsq.quantized_layers(run.student.model).values()}
    assert factors == {lsq.lsq_gradient_factor(GRID, 64)}
    assert run.student.model.training


# --- how weights and moments are held -------------------------------------------------------------


@pytest.mark.usefixtures("_compiler")
@pytest.mark.parametrize("weights", ["float32", "bfloat16"])
def test_eight_bit_adam_resumes_exactly(weights: Any, ask: Any, tmp_path: Path) -> None:
    settings = replace(SETTINGS, method="grace", optimizer="adamw8bit", weights=weights)
    asked = ask("text", settings)
    train(asked, tmp_path / "whole", resume=False, progress=silent)
    cut_and_resumed(asked, tmp_path / "cut")
    assert digests(tmp_path / "cut") == digests(tmp_path / "whole")
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")


@pytest.mark.usefixtures("_compiler")
def test_eight_bit_moments_are_saved_as_they_are(ask: Any, tmp_path: Path) -> None:
    settings = replace(SETTINGS, steps=2, optimizer="adamw8bit", weights="bfloat16")
    run = TrainingRun(ask("text", settings), "cpu", tmp_path)
    run.fit(silent)
    stored = load_file(tmp_path / "state" / "step-0000002" / "state.safetensors")
    name = "model.layers.0.mlp.up_proj"
    weight = run.parameters[f"{name}.weight"]
    state = run.optimizer.of(weight).state[weight]
    assert stored[f"exp_avg.codes/{name}.weight"].dtype == torch.uint8
    for moment in ("exp_avg", "exp_avg_sq"):
        for part in ("codes", "scale", "qmap"):
            held = getattr(state[moment], part)
            assert torch.equal(stored[f"{moment}.{part}/{name}.weight"], held)
    assert stored[f"weight/{name}.weight"].dtype == torch.bfloat16
    assert stored[f"weight/{name}.log_scale"].dtype == torch.float32
    assert stored[f"exp_avg/{name}.log_scale"].dtype == torch.float32  # never in 8 bits
    with pytest.raises(KeyError):
        run.optimizer.of(torch.nn.Parameter(torch.ones(1)))


@pytest.mark.usefixtures("_compiler")
def test_small_updates_of_16_bit_weights_are_not_lost(ask: Any, tmp_path: Path) -> None:
    settings = replace(SETTINGS, steps=8, lr=1e-5, optimizer="adamw8bit", weights="bfloat16")
    run = TrainingRun(ask("text", settings), "cpu", tmp_path)
    before = {n: p.detach().clone() for n, p in run.parameters.items()}
    run.fit(silent)
    name = "model.layers.0.mlp.up_proj.weight"
    large = before[name].abs() > 0.05
    moved = (run.parameters[name] != before[name])[large].float().mean().item()
    # An update is about lr = 1e-5; above 0.05 half a step of bf16 is 1.2e-4 and more, so rounding
    # to nearest keeps every weight. By chance some percents move by a step in eight updates.
    assert 0.01 < moved < 0.6


@pytest.mark.usefixtures("_compiler")
def test_16_bit_weights_need_stochastic_rounding_and_their_own_dtype(
    ask: Any, tmp_path: Path
) -> None:
    settings = replace(SETTINGS, weights="bfloat16")
    with pytest.raises(UsageError, match="nearest"):
        TrainingRun(ask("text", settings), "cpu", tmp_path)
    settings = replace(settings, optimizer="adamw8bit")
    with pytest.raises(UsageError, match="not float32"):
        TrainingRun(ask("text", settings, dtype="float32"), "cpu", tmp_path)
    with (
        torch._dynamo.config.patch(disable=True),
        pytest.raises(PrerequisiteError, match="switched off"),
    ):
        TrainingRun(ask("text", settings), "cpu", tmp_path)


def test_a_projector_without_gradients_is_saved_and_resumed(ask: Any, tmp_path: Path) -> None:
    asked = ask("llava", SETTINGS, subset="text")
    train(asked, tmp_path / "whole", resume=False, progress=silent)
    cut_and_resumed(asked, tmp_path / "cut")
    assert digests(tmp_path / "cut") == digests(tmp_path / "whole")


def test_a_parameter_that_misses_steps_is_resumed_exactly(ask: Any, tmp_path: Path) -> None:
    asked = ask("llava", replace(SETTINGS, batch_size=1, steps=12))  # some steps see no image
    train(asked, tmp_path / "whole", resume=False, progress=silent)
    cut_and_resumed(asked, tmp_path / "cut", after=9)
    assert digests(tmp_path / "cut") == digests(tmp_path / "whole")


def test_checkpointing_changes_nothing(ask: Any, tmp_path: Path) -> None:
    settings = replace(SETTINGS, method="grace")
    for name, on in (("plain", False), ("again", True)):
        asked = ask("llava", settings, checkpointing=on)
        run = TrainingRun(asked, "cpu", tmp_path / name)
        assert run.student.model.is_gradient_checkpointing == on
        (tmp_path / name).mkdir()
        run.fit(silent)
    plain, again = lines(tmp_path / "plain"), lines(tmp_path / "again")
    assert all(line["rcka"] is not None for line in again)
    assert plain == again  # the CPU repeats its sums in the same order


def test_the_last_blocks_may_keep_their_activations(ask: Any, tmp_path: Path) -> None:
    runs, recomputed = {}, {}
    for kept in (0, 1, 99):
        asked = ask("llava", SETTINGS, checkpointing=True, kept_blocks=kept)
        runs[kept] = TrainingRun(asked, "cpu", tmp_path / str(kept))
        blocks = runs[kept].student.model.model.language_model.layers
        recomputed[kept] = [block.gradient_checkpointing for block in blocks]
    n = len(recomputed[0])
    assert n > 1
    assert recomputed == {0: [True] * n, 1: [True] * (n - 1) + [False], 99: [False] * n}
    losses = {run.step(0)["ce"] for run in runs.values()}
    gradients = [torch.cat([p.flatten() for p in run.parameters.values()]) for run in runs.values()]
    assert len(losses) == 1
    assert torch.equal(gradients[0], gradients[1])
    assert torch.equal(gradients[0], gradients[2])


def test_compiled_blocks_train_as_eager_ones_at_any_length(ask: Any, tmp_path: Path) -> None:
    settings = replace(SETTINGS, method="grace", steps=3, packing="group")
    with pytest.raises(PrerequisiteError, match="switched off"):  # switched off for these tests
        TrainingRun(ask("llava", settings, compile_blocks=True), "cpu", tmp_path)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(disable=False):
        for name, on in (("eager", False), ("compiled", True)):
            asked = ask("llava", settings, compile_blocks=on, checkpointing=on, kept_blocks=1)
            run = TrainingRun(asked, "cpu", tmp_path / name)
            (tmp_path / name).mkdir()
            run.fit(silent)
        counts = torch._dynamo.utils.counters
        # of the student, recomputed and kept, and of the teacher, each for one length and for any
        assert counts["stats"]["unique_graphs"] >= 6
        assert not counts["graph_break"]
    assert any("compiled" in note for note in run.notes)
    for one, other in zip(lines(tmp_path / "eager"), lines(tmp_path / "compiled"), strict=True):
        for term in ("ce", "kd", "rcka"):  # fp32 sums in another order
            assert one[term] == pytest.approx(other[term], rel=1e-4, abs=1e-5)


def test_compiled_training_is_eager_training(ask: Any, tmp_path: Path) -> None:
    with pytest.raises(PrerequisiteError, match="switched off"):  # switched off for these tests
        TrainingRun(ask("text", SETTINGS, compile=True), "cpu", tmp_path)
    with torch._dynamo.config.patch(disable=False):  # both in turn
        for name, on in (("eager", False), ("compiled", True)):
            (tmp_path / name).mkdir()
            TrainingRun(ask("text", replace(SETTINGS, steps=2), compile=on), "cpu",
                        tmp_path / name).fit(silent)  # fmt: skip
    for one, other in zip(lines(tmp_path / "eager"), lines(tmp_path / "compiled"), strict=True):
        assert one["ce"] == pytest.approx(other["ce"], rel=1e-5)  # scale gradients: order of sums


# --- the teacher ----------------------------------------------------------------------------------


def test_an_int8_teacher_says_nearly_the_same(ask: Any, tmp_path: Path) -> None:
    settings = replace(SETTINGS, method="grace", steps=1)
    seen = {}
    for name, held in (("plain", "auto"), ("small", "int8")):
        asked = ask("llava", settings, teacher_dtype=held)
        record = train(asked, tmp_path / name, resume=False, progress=silent)
        seen[name] = lines(tmp_path / name)[0]["kd"]
        assert any("8 bits" in note for note in record["figures"]["notes"]) == (held == "int8")
    assert seen["small"] != seen["plain"]
    # 8 bits a weight are 0.4 % noise; what the student's 4 bits cost is 30 times that
    assert seen["small"] == pytest.approx(seen["plain"], rel=0.1)
    run = TrainingRun(ask("llava", settings, teacher_dtype="int8"), "cpu", tmp_path)
    assert run.teacher is not None
    names = set(language_linears(run.request.student))
    small = {
        name.removesuffix(".weight")
        for name, p in run.teacher.model.named_parameters()
        if "Int8" in type(p.data).__name__ or "Int8" in type(p).__name__
    }
    assert small == names


def test_heads_may_be_padded_but_hold_every_token(ask: Any, models: Models, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    words = AutoTokenizer.from_pretrained(models["text"].path)
    for name, rows in (("padded", len(words) + 13), ("short", len(words) - 3)):
        model = AutoModelForCausalLM.from_pretrained(models["text"].path)
        model.resize_token_embeddings(rows)
        model.save_pretrained(tmp_path / name)
        words.save_pretrained(tmp_path / name)
    settings = replace(SETTINGS, method="grace", steps=1)
    asked = ask("text", settings, teacher=find(str(tmp_path / "padded")))
    train(asked, tmp_path / "out", resume=False, progress=silent)
    with pytest.raises(UsageError, match=r"output rows for \d+ tokens"):
        TrainingRun(replace(asked, teacher=find(str(tmp_path / "short"))), "cpu", tmp_path)


# --- where it starts ------------------------------------------------------------------------------


@pytest.mark.usefixtures("_compiler")
@pytest.mark.parametrize("family", ["text", "llava"])
@pytest.mark.parametrize("weights", ["float32", "bfloat16"])
def test_a_start_from_rtn_is_that_checkpoint_bit_for_bit(
    family: str, weights: Any, ask: Any, make: Make, tmp_path: Path
) -> None:
    made = make(family, "rtn", 4)
    settings = replace(SETTINGS, weights=weights, optimizer="adamw8bit")
    run = TrainingRun(ask(family, settings, init=find(str(made.path))), "cpu", tmp_path)
    assert any("scales as packed" in note for note in run.figures()["notes"])
    packed, arch = load_file(made.path / "model.safetensors"), run.student.arch
    for name in language_linears(run.request.student):
        key = arch.file_key(name)
        parts = {p: packed[f"{key}.{p}"] for p in ("qweight", "qzeros", "scales", "g_idx")}
        codes, scales = run.student.model.get_submodule(name).codes_and_scales()
        assert torch.equal(codes, unpack_gptq(parts, GRID)[0])
        assert torch.equal(scales, unpack_gptq(parts, GRID)[1])
    ids = torch.arange(3, 40)[None]
    dtype = getattr(torch, weights)
    ptq = load(find(str(made.path)), device="cpu", dtype=dtype, kernel="dense").model
    with torch.no_grad():
        assert torch.equal(run.student.model(ids).logits, ptq(ids).logits)


def test_a_start_from_awq_takes_its_norms_and_searches_scales(
    ask: Any, make: Make, models: Models, tmp_path: Path
) -> None:
    made = make("text", "awq", 4)
    asked = ask("text", SETTINGS, init=find(str(made.path)))
    run = TrainingRun(asked, "cpu", tmp_path)
    (note,) = [note for note in run.figures()["notes"] if "starts from" in note]
    assert "searched" in note
    old, new = (
        load(f, device="cpu", dtype=torch.float32, kernel="dense").model.state_dict()
        for f in (models["text"], find(str(made.path)))
    )
    norm, layer = "model.layers.0.input_layernorm.weight", "model.layers.0.self_attn.q_proj"
    assert not torch.equal(old[norm], new[norm])  # AWQ has smoothed it
    mine = run.student.model.state_dict()
    assert torch.equal(mine[norm], new[norm])
    assert torch.equal(mine[f"{layer}.weight"], new[f"{layer}.weight"])
    scales = search_scales(new[f"{layer}.weight"], GRID, ratios=LSQ_RATIOS)
    assert torch.equal(run.student.model.get_submodule(layer).codes_and_scales()[1], scales)


def test_a_start_on_another_grid_is_searched_anew(ask: Any, make: Make, tmp_path: Path) -> None:
    made = find(str(make("text", "rtn", 4).path))
    run = TrainingRun(ask("text", replace(SETTINGS, bits=3), init=made), "cpu", tmp_path)
    assert any("searched for 14 of 14 layers" in note for note in run.figures()["notes"])
    layer = run.student.model.get_submodule("model.layers.0.mlp.up_proj")
    weight = load(made, device="cpu", dtype=torch.float32, kernel="dense").model.state_dict()[
        "model.layers.0.mlp.up_proj.weight"
    ]
    scales = search_scales(weight, Grid(3, tiny.GROUP), ratios=LSQ_RATIOS)
    assert torch.equal(layer.codes_and_scales()[0], quantize(weight, scales, layer.grid))


def test_a_start_must_be_a_packed_checkpoint_of_the_student(
    ask: Any, make: Make, models: Models, tmp_path: Path
) -> None:
    plain = ask("text", SETTINGS, init=models["text"])
    with pytest.raises(UsageError, match="not a quantized checkpoint"):
        train(plain, tmp_path / "a", resume=False, progress=silent)
    other = ask("text", SETTINGS, init=find(str(make("llava", "rtn", 4).path)))
    with pytest.raises(UsageError, match="another architecture"):
        train(other, tmp_path / "b", resume=False, progress=silent)
    assert not (tmp_path / "b").exists()
    start = find(str(make("text", "rtn", 4).path))
    config = start.config | {"vocab_size": start.config["vocab_size"] + 8}
    bigger = tmp_path / "bigger"
    tiny.save_text_model(bigger)
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(bigger)
    model.resize_token_embeddings(config["vocab_size"])
    model.save_pretrained(bigger)
    sized = dataclasses.replace(ask("text", SETTINGS, init=start), student=find(str(bigger)))
    with pytest.raises(UsageError, match="is no checkpoint of"):
        TrainingRun(sized, "cpu", tmp_path)


def test_a_start_is_part_of_what_a_run_is(ask: Any, make: Make, tmp_path: Path) -> None:
    start = find(str(make("text", "rtn", 4).path))
    asked = ask("text", replace(SETTINGS, steps=1), init=start)
    record = train(asked, tmp_path / "out", resume=False, progress=silent)
    assert record["spec"]["init"] == start.fingerprint()
    plain = train(replace(asked, init=None), tmp_path / "plain", resume=False, progress=silent)
    assert "init" not in plain["spec"]
    assert plain["fingerprint"] != record["fingerprint"]


# --- tensorboard ----------------------------------------------------------------------------------


def test_tensorboard_gets_the_terms_of_each_step_where_it_is_installed(
    ask: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[str, float, int]] = []
    opened: list[tuple[str, int]] = []

    class Writer:
        def __init__(self, folder: str, purge_step: int) -> None:
            opened.append((folder, purge_step))

        def add_scalar(self, name: str, value: float, step: int) -> None:
            told.append((name, value, step))

        def close(self) -> None:
            opened.append(("closed", 0))

    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    TrainingRun(ask("text", replace(SETTINGS, steps=2)), "cpu", tmp_path).fit(silent)
    assert opened == [(str(tmp_path / "tensorboard"), 1), ("closed", 0)]
    logged = lines(tmp_path)
    assert [(v, s) for n, v, s in told if n == "train/ce"] == [(x["ce"], x["step"]) for x in logged]
    assert not {n for n, _, _ in told} & {"train/step", "train/kd"}  # kd is null without a teacher

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # not installed
    (tmp_path / "without").mkdir()
    TrainingRun(ask("text", replace(SETTINGS, steps=1)), "cpu", tmp_path / "without").fit(silent)
    assert len(lines(tmp_path / "without")) == 1
