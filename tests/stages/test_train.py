"""Training: what is supervised, exact resume, and that what is trained is what is packed."""

from __future__ import annotations

import contextlib
import gc
import json
import weakref
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from qatbench import store
from qatbench.errors import ArtifactError, NumericsError, PrerequisiteError, UsageError
from qatbench.quant import lsq
from qatbench.quant.grid import Grid
from qatbench.quant.packing import unpack_gptq
from qatbench.stages import train as stage
from qatbench.stages.objective import Distillation, accumulate, look
from qatbench.stages.train import TrainingRun, TrainRequest, train
from qatbench.stages.train_settings import ControllerSettings, TrainSettings, schedule
from qatbench.stages.train_state import StepLog
from qatbench.tasks import selector
from qatbench.vlm import layout
from qatbench.vlm import load as models
from qatbench.vlm.training import TrainingData

CPU = torch.device("cpu")
SETTINGS = TrainSettings(
    method="qat",
    steps=6,
    group_size=tiny.GROUP,
    batch_size=4,
    micro_batch_size=2,
    lr=1e-3,
    scale_lr=1e-2,
    formats=("qatbench", "choices"),
    controller=ControllerSettings(target=0.1, rate=0.05),
    omega_warmup=2,
)


@pytest.fixture(scope="session")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_text_model(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="session")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_llava(tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_questions(tmp_path_factory.mktemp("data"))


def rows_of(data: Path, subset: str = "text") -> list[Any]:
    return selector.load(selector.parse(f"scienceqa:train:{subset}"), {"scienceqa": str(data)})


def request(model: Path, data: Path, settings: TrainSettings, **more: Any) -> TrainRequest:
    teacher = more.pop("teacher", None)
    return TrainRequest(
        settings,
        models.find(str(model)),
        models.find(str(teacher)) if teacher else None,
        rows_of(data, more.pop("subset", "text")),
        "cpu",
        save_every=more.pop("save_every", 2),
    )


def quiet(what: str, done: int, total: int) -> None:
    return None


def weights(folder: Path) -> dict[str, str]:
    return {f.name: store.file_digest(f) for f in folder.glob("*.safetensors")}


# --- data -----------------------------------------------------------------------------------------


def test_only_the_answer_and_the_end_are_supervised(text_model: Path, data: Path) -> None:
    loaded = models.load(models.find(str(text_model)), device="cpu", dtype=torch.float32)
    stream = TrainingData(loaded, rows_of(data), ("qatbench",), seed=0)
    rows = stream.step(0, 4)
    batch = stream.collate(rows, CPU, torch.float32)
    told = loaded.tokenizer.decode(batch.target)
    for row in rows:
        assert loaded.tokenizer.decode(row.target) in told
    # the token after each supervised position is the target
    following = batch.inputs["input_ids"].reshape(-1)[batch.where + 1]
    assert torch.equal(following, batch.target)
    assert len(batch.target) == sum(len(row.target) for row in rows)
    assert all(row.target[-1] == loaded.tokenizer.eos_token_id for row in rows)


def test_an_epoch_shows_every_question_once_in_an_order_of_the_seed(
    text_model: Path, data: Path
) -> None:
    loaded = models.load(models.find(str(text_model)), device="cpu", dtype=torch.float32)
    questions = rows_of(data)

    def texts(seed: int, step: int) -> list[str]:
        stream = TrainingData(loaded, questions, ("qatbench",), seed)
        return [row.prompt.text for row in stream.step(step, 3)]

    epoch = texts(0, 0) + texts(0, 1)
    assert Counter(epoch) == Counter(f"Question: {q.text}\nAnswer:" for q in questions)
    assert texts(0, 0) == texts(0, 0)
    assert any(texts(0, step) != texts(1, step) for step in range(4))


@pytest.mark.parametrize("family", ["text", "llava"])
def test_packed_rows_compute_what_single_rows_do(
    family: str, text_model: Path, llava: Path, data: Path
) -> None:
    path, subset = (text_model, "text") if family == "text" else (llava, "all")
    loaded = models.load(models.find(str(path)), device="cpu", dtype=torch.float32)
    stream = TrainingData(loaded, rows_of(data, subset), ("qatbench", "choices"), seed=0)
    rows = sorted(stream.step(0, 6), key=len, reverse=True)
    with torch.no_grad():
        packed = look(loaded.model, stream.collate(rows, CPU, torch.float32), images=False)
        alone = []
        for row in rows:
            ids = torch.tensor([row.prompt.ids + row.target])
            out = loaded.model(input_ids=ids, **row.prompt.pixels).logits[0]
            alone.append(out[len(row.prompt) - 1 : len(row) - 1])
    # fp32 sums in another order; logits are of order 1
    torch.testing.assert_close(packed.logits, torch.cat(alone), rtol=1e-4, atol=1e-4)


# --- objective ------------------------------------------------------------------------------------


def test_micro_batches_change_neither_loss_nor_gradient(llava: Path, data: Path) -> None:
    teacher = models.load(models.find(str(llava)), device="cpu", dtype=torch.float32)
    with torch.no_grad():
        for parameter in teacher.model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))

    def measure(size: int) -> tuple[Any, dict[str, torch.Tensor]]:
        student = models.load(models.find(str(llava)), device="cpu", dtype=torch.float32)
        stream = TrainingData(student, rows_of(data, "all"), ("qatbench",), seed=0)
        rows = stream.step(0, 6)
        parts = [rows[i : i + size] for i in range(0, 6, size)]
        batches = [stream.collate(part, CPU, torch.float32) for part in parts]
        import contextlib

        loss = accumulate(
            student.model, teacher.model, batches, Distillation(), 0.7, 2.0, contextlib.nullcontext
        )
        named = student.model.named_parameters()
        return loss, {n: p.grad for n, p in named if p.grad is not None}

    (whole, one), (split, many) = measure(6), measure(2)
    for term in ("ce", "kd", "rcka", "gate"):
        assert getattr(whole, term) == pytest.approx(getattr(split, term), rel=1e-4), term
    assert whole.images == split.images > 0
    assert one.keys() == many.keys()
    for name in one:  # gradients of order 1e-2 summed in another order
        torch.testing.assert_close(one[name], many[name], rtol=1e-3, atol=1e-5)


def test_beta_and_omega_weigh_their_terms(llava: Path, data: Path) -> None:
    import contextlib

    teacher = models.load(models.find(str(llava)), device="cpu", dtype=torch.float32)
    with torch.no_grad():
        teacher.model.lm_head.weight.mul_(1.3)
        for parameter in teacher.model.model.language_model.layers[0].parameters():
            parameter.mul_(1.2)

    def gradient(beta: float, omega: float) -> torch.Tensor:
        student = models.load(models.find(str(llava)), device="cpu", dtype=torch.float32)
        stream = TrainingData(student, rows_of(data, "image"), ("qatbench",), seed=0)
        batch = stream.collate(stream.step(0, 3), CPU, torch.float32)
        accumulate(
            student.model, teacher.model, [batch], Distillation(), beta, omega,
            contextlib.nullcontext,
        )  # fmt: skip
        layer = student.model.model.language_model.layers[0].self_attn.q_proj
        grad: torch.Tensor = layer.weight.grad
        return grad

    none, kd, rcka, both = (gradient(b, o) for b, o in ((0, 0), (1, 0), (0, 1), (1, 1)))
    assert not torch.allclose(kd, none, atol=1e-7)
    assert not torch.allclose(rcka, none, atol=1e-9)
    torch.testing.assert_close(both, kd + rcka - none, rtol=1e-3, atol=1e-6)  # linear in both


def test_schedule_warms_up_and_ends_near_zero() -> None:
    factors = [schedule(step, 100, 0.1) for step in range(100)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[9] == factors[10] == 1.0
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert 0 < factors[-1] < 1e-3


# --- runs -----------------------------------------------------------------------------------------


class Cut(Exception):  # noqa: N818 - stands for a kill, not for an error
    """Stands for a kill."""


@pytest.mark.parametrize("method", ["qat", "grace"])
def test_a_resumed_run_equals_an_uninterrupted_one_exactly(
    method: str, text_model: Path, data: Path, tmp_path: Path
) -> None:
    settings = replace(SETTINGS, method=method, seed=3)  # type: ignore[arg-type]
    asked = request(text_model, data, settings, teacher=text_model)
    train(asked, tmp_path / "whole", resume=False, progress=quiet)

    def cut(what: str, done: int, total: int) -> None:
        if what.startswith("Training") and done == 5:  # the last saved state is that of step 4
            raise Cut

    with pytest.raises(Cut):
        train(asked, tmp_path / "cut", resume=False, progress=cut)
    assert not (tmp_path / "cut" / "config.json").exists()
    with pytest.raises(UsageError, match="unfinished"):
        train(asked, tmp_path / "cut", resume=False, progress=quiet)
    log = tmp_path / "cut" / "train.jsonl"
    log.write_text(log.read_text() + '{"step": 6, "ce"')  # torn by the kill
    train(asked, tmp_path / "cut", resume=True, progress=quiet)

    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")
    assert log.read_text() == (tmp_path / "whole" / "train.jsonl").read_text()
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    before = weights(tmp_path / "cut")
    train(asked, tmp_path / "cut", resume=True, progress=cut)  # finished: nothing is done
    assert weights(tmp_path / "cut") == before


def test_what_is_trained_is_what_is_packed(text_model: Path, data: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    asked = request(text_model, data, SETTINGS)
    run = TrainingRun(asked, "cpu", tmp_path)
    run.fit(quiet)
    trained = {
        name: layer.codes_and_scales()
        for name, layer in lsq.quantized_layers(run.student.model).items()
    }
    start = {n: layer.clone() for n, layer in run.parameters.items() if n.endswith("log_scale")}
    run.export()
    tensors = load_file(tmp_path / "model.safetensors")
    names = list(layout.linear_shapes(asked.student.config))
    assert sorted(trained) == sorted(names)
    for name in names:
        packed = {k: tensors[f"{name}.{k}"] for k in ("qweight", "qzeros", "scales", "g_idx")}
        codes, scales = unpack_gptq(packed, Grid(4, tiny.GROUP))
        assert torch.equal(codes, trained[name][0]), name
        assert torch.equal(scales, trained[name][1]), name
    assert start


def test_training_moves_scales_and_lowers_the_loss(
    text_model: Path, data: Path, tmp_path: Path
) -> None:
    run = TrainingRun(request(text_model, data, replace(SETTINGS, steps=20)), "cpu", tmp_path)
    before = {n: p.detach().clone() for n, p in run.parameters.items()}
    run.fit(quiet)
    lines = [json.loads(x) for x in (tmp_path / "train.jsonl").read_text().splitlines()]
    assert lines[-1]["ce"] < 0.8 * lines[0]["ce"]
    still = [n for n, p in run.parameters.items() if torch.equal(p, before[n])]
    assert still == []


def test_llava_keeps_its_vision_tower_and_trains_its_projector(
    llava: Path, data: Path, tmp_path: Path
) -> None:
    settings = replace(SETTINGS, method="grace", steps=3)
    asked = request(llava, data, settings, teacher=llava, subset="all")
    record = train(asked, tmp_path / "out", resume=False, progress=quiet)
    lines = [json.loads(x) for x in (tmp_path / "out" / "train.jsonl").read_text().splitlines()]
    assert all(line["rcka"] is not None and line["images"] > 0 for line in lines)
    assert [line["omega"] for line in lines] == [1.5, 3.0, 3.0]  # warm-up over two steps
    assert "RCKA inactive: no images" not in record["figures"]["notes"]
    old, new = (
        models.load(models.find(str(f)), device="cpu", dtype=torch.float32, kernel="dense")
        for f in (llava, tmp_path / "out")
    )
    theirs = dict(new.model.named_parameters())
    for name, value in old.model.named_parameters():
        if name.startswith("model.vision_tower"):
            assert torch.equal(value, theirs[name]), name
    changed = [
        name
        for name, value in old.model.named_parameters()
        if "multi_modal_projector" in name and not torch.equal(value, theirs[name])
    ]
    assert changed


def test_without_images_the_report_is_told_that_rcka_was_inactive(
    text_model: Path, data: Path, tmp_path: Path
) -> None:
    settings = replace(SETTINGS, method="grace", steps=2)
    asked = request(text_model, data, settings, teacher=text_model)
    record = train(asked, tmp_path / "out", resume=False, progress=quiet)
    assert record["figures"]["notes"] == ["RCKA inactive: no images"]
    assert record["figures"]["samples_seen"] == 8


def test_beta_follows_the_controller(text_model: Path, data: Path, tmp_path: Path) -> None:
    control = ControllerSettings(target=0.0, rate=0.1, initial=0.5, low=0.1, high=0.6)
    settings = replace(SETTINGS, method="grace", controller=control)
    asked = request(text_model, data, settings, teacher=text_model)
    run = TrainingRun(asked, "cpu", tmp_path)
    with torch.no_grad():
        run.teacher.model.lm_head.weight.mul_(2.0)  # type: ignore[union-attr]
    run.fit(quiet)
    lines = [json.loads(x) for x in (tmp_path / "train.jsonl").read_text().splitlines()]
    betas = [line["beta"] for line in lines]
    assert betas[0] == 0.5
    assert betas[1] == pytest.approx(min(0.6, 0.5 + 0.1 * lines[0]["kd"]))
    assert betas == sorted(betas)
    assert betas[-1] == 0.6


# --- refusals -------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_is_a_numerics_error(
    text_model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = stage.accumulate

    def broken(*args: Any) -> Any:
        loss = real(*args)
        loss.ce = float("nan")
        return loss

    monkeypatch.setattr(stage, "accumulate", broken)
    with pytest.raises(NumericsError, match="ce is nan at step 1"):
        train(request(text_model, data, SETTINGS), tmp_path / "x", resume=False, progress=quiet)
    assert not (tmp_path / "x" / "config.json").exists()


def test_a_damaged_state_is_named(text_model: Path, data: Path, tmp_path: Path) -> None:
    asked = request(text_model, data, SETTINGS)

    def cut(what: str, done: int, total: int) -> None:
        if what.startswith("Training") and done == 3:
            raise Cut

    with pytest.raises(Cut):
        train(asked, tmp_path / "x", resume=False, progress=cut)
    state = tmp_path / "x" / "state" / "step-0000002" / "state.safetensors"
    state.write_bytes(state.read_bytes()[:100])
    with pytest.raises(ArtifactError, match="damaged training state"):
        train(asked, tmp_path / "x", resume=True, progress=quiet)


def test_a_teacher_is_needed_and_must_share_the_vocabulary(
    text_model: Path, llava: Path, data: Path, tmp_path: Path
) -> None:
    settings = replace(SETTINGS, method="grace")
    with pytest.raises(PrerequisiteError, match="needs a teacher"):
        train(request(text_model, data, settings), tmp_path / "a", resume=False, progress=quiet)
    asked = request(text_model, data, settings, teacher=llava)
    with pytest.raises(UsageError, match="vocabular"):
        train(asked, tmp_path / "b", resume=False, progress=quiet)


def test_a_grid_that_does_not_divide_names_the_layer(
    text_model: Path, data: Path, tmp_path: Path
) -> None:
    settings = replace(SETTINGS, group_size=48)
    with pytest.raises(UsageError, match=r"group_size 48 .* model\.layers\.0\.self_attn\.q_proj"):
        train(request(text_model, data, settings), tmp_path / "x", resume=False, progress=quiet)
    assert not (tmp_path / "x").exists()


def test_a_run_that_was_cut_before_its_export_tells_what_an_uninterrupted_one_tells(
    llava: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = replace(SETTINGS, method="grace", steps=2)
    asked = request(llava, data, settings, teacher=llava, subset="all", save_every=1)
    whole = train(asked, tmp_path / "whole", resume=False, progress=quiet)["figures"]

    def stop(self: TrainingRun, told: dict[str, Any]) -> dict[str, Any]:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(TrainingRun, "export", stop)
        with pytest.raises(KeyboardInterrupt):
            train(asked, tmp_path / "cut", resume=False, progress=quiet)
    again = train(asked, tmp_path / "cut", resume=True, progress=quiet)["figures"]
    assert again["notes"] == whole["notes"] == []
    assert again["training_seconds"] > 0
    assert again["dtype"] == "float32"


def test_an_export_lets_go_of_the_trained_model(
    text_model: Path, data: Path, tmp_path: Path
) -> None:
    """The library keeps failed imports, whose tracebacks would keep the run and its optimizer."""
    run = TrainingRun(request(text_model, data, replace(SETTINGS, steps=1)), "cpu", tmp_path)
    run.fit(quiet)
    run.export()
    kept = weakref.ref(run)
    del run
    gc.collect()
    assert kept() is None


def test_an_image_without_a_defined_relation_is_left_out_of_the_mean(
    llava: Path, data: Path
) -> None:
    """A plain picture, whose visual tokens all point one way, must not halve the others' term."""
    rows = rows_of(data, "image")[:2]
    student, teacher = (
        models.load(models.find(str(llava)), device="cpu", dtype=torch.float32) for _ in range(2)
    )
    stream = TrainingData(student, rows, ("qatbench",), 0)
    batch = stream.collate(stream.step(0, 2), CPU, torch.float32)
    assert len(batch.images) == 2
    one = replace(batch, images=[batch.images[0]])
    flat = replace(batch, images=[batch.images[0], batch.images[1][:1].repeat(8)])

    def rcka(chosen: Any) -> float | None:
        how = Distillation(kl="none")
        loss = accumulate(
            student.model, teacher.model, [chosen], how, 0.0, 1.0, contextlib.nullcontext
        )
        return loss.rcka

    for parameter in student.model.parameters():
        parameter.data.mul_(1.1)
    alone = rcka(one)
    assert alone
    assert rcka(flat) == pytest.approx(alone, rel=1e-5)


def test_samples_that_were_skipped_are_known_after_a_resume(tmp_path: Path) -> None:
    log = tmp_path / "train.jsonl"
    steps = [{"step": 1, "skipped": {"a/1": "too long"}}, {"step": 2, "skipped": {"a/2": "torn"}}]
    log.write_text("".join(json.dumps(step) + "\n" for step in steps))
    opened = StepLog(log, 2)
    opened.close()
    assert opened.skipped == {"a/1": "too long", "a/2": "torn"}
    opened = StepLog(log, 1)  # the second step is done again
    opened.close()
    assert opened.skipped == {"a/1": "too long"}
