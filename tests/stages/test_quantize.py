"""quantize: every method and width on both families, from data to a finished folder."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from tiny import SAMPLES, Make, settings
from transformers.models.llama.modeling_llama import LlamaModel
from transformers.models.llava.modeling_llava import LlavaModel

from qatbench import store
from qatbench.errors import ArtifactError, NumericsError, PrerequisiteError, UsageError
from qatbench.quant import awq, backends
from qatbench.quant.grid import Grid
from qatbench.quant.result import Quantized, QuantizedLinear
from qatbench.quant.rtn import round_to_nearest
from qatbench.stages.common import silent
from qatbench.stages.layer_error import compare_layers
from qatbench.stages.quantize import (
    calibration_batches,
    calibration_questions,
    quantize,
    together,
)
from qatbench.tasks import selector
from qatbench.vlm import layout
from qatbench.vlm.load import Loaded, ModelFolder, find, load

GRID = Grid(4, tiny.GROUP)


def loaded(folder: ModelFolder) -> Loaded:
    return load(folder, device="cpu", dtype=torch.float32)


def batches_for(family: str, model: Loaded, data: dict[str, str]) -> list[dict[str, Any]]:
    questions = calibration_questions(settings(family, "gptq"), data)
    return calibration_batches(model, questions, "qatbench")


def solved(method: str, family: str, folder: ModelFolder, data: dict[str, str]) -> Quantized:
    model = loaded(folder)
    return backends.solve(
        method,
        folder.path,
        list(layout.linear_shapes(folder.config)),
        GRID,
        batches_for(family, model, data),
        device="cpu",
        progress=lambda done, total: None,
    )


# --- the calibration data reach the model -------------------------------------------------------


def test_calibration_samples_are_the_evaluation_prompt_with_its_right_answer(
    models: dict[str, ModelFolder], data: dict[str, str]
) -> None:
    model = loaded(models["llava"])
    questions = calibration_questions(settings("llava", "gptq"), data)
    assert len(questions) == SAMPLES
    assert {q.has_image for q in questions} == {True, False}
    for question, inputs in zip(
        questions, calibration_batches(model, questions, "qatbench"), strict=True
    ):
        assert ("pixel_values" in inputs) == question.has_image
        assert inputs["input_ids"].shape == inputs["attention_mask"].shape
        assert inputs["attention_mask"].all()
        text = model.tokenizer.decode(inputs["input_ids"][0])
        assert text.endswith(
            f"{question.text}\nAnswer: ASSISTANT: {question.options[question.gold or '']}"
        )


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_every_sample_and_image_reaches_the_library_unpadded(
    method: str,
    models: dict[str, ModelFolder],
    data: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lengths: list[tuple[int, ...]] = []
    pictures: list[torch.Tensor] = []
    language, vision = LlamaModel.forward, LlavaModel.get_image_features

    def listen(self: Any, *args: Any, **kwargs: Any) -> Any:
        lengths.append(tuple(kwargs["inputs_embeds"].shape[:2]))
        return language(self, *args, **kwargs)

    def look(self: Any, *args: Any, **kwargs: Any) -> Any:
        pictures.append(kwargs["pixel_values"] if "pixel_values" in kwargs else args[0])
        return vision(self, *args, **kwargs)

    wanted = batches_for("llava", loaded(models["llava"]), data)
    monkeypatch.setattr(LlamaModel, "forward", listen)
    monkeypatch.setattr(LlavaModel, "get_image_features", look)
    solved(method, "llava", models["llava"], data)

    assert lengths == [tuple(batch["input_ids"].shape) for batch in wanted]
    shown = [batch["pixel_values"] for batch in wanted if "pixel_values" in batch]
    assert len(pictures) == len(shown) > 1
    for got, sent in zip(pictures, shown, strict=True):
        torch.testing.assert_close(got.float().cpu(), sent, rtol=0, atol=0)


# --- what the solvers make ----------------------------------------------------------------------


@pytest.mark.parametrize("family", ["text", "llava"])
@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_every_linear_is_quantized_and_only_awq_changes_norms(
    method: str, family: str, models: dict[str, ModelFolder], data: dict[str, str]
) -> None:
    folder = models[family]
    found = solved(method, family, folder, data)
    assert set(found.linears) == set(layout.linear_shapes(folder.config))
    inside = folder.arch.layers + "."
    assert all(name.startswith(inside) and "norm" in name for name in found.changed)
    assert len(found.changed) == (0 if method == "gptq" else 2 * tiny.LAYERS)
    weights = loaded(folder).model.state_dict()
    for name, linear in found.linears.items():
        assert linear.symmetric == (method == "gptq")
        if method == "gptq":  # AWQ also scales the columns
            step = linear.scales.amax().item()
            assert (linear.dense() - weights[f"{name}.weight"]).abs().mean() < step


@torch.inference_mode()
def layer_output(model: Loaded, index: int, inputs: dict[str, Any]) -> tuple[Any, Any]:
    """Input and output of one decoder layer in a forward of the whole model."""
    caught: dict[str, torch.Tensor] = {}

    def hook(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        caught["in"] = args[0] if args else kwargs["hidden_states"]
        caught["out"] = output[0] if isinstance(output, tuple) else output

    layer = model.model.get_submodule(f"{model.arch.layers}.{index}")
    handle = layer.register_forward_hook(hook, with_kwargs=True)
    model.model(**inputs, use_cache=False)
    handle.remove()
    return caught["in"], caught["out"]


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_layer_errors_equal_those_of_a_model_with_one_layer_replaced(
    method: str, models: dict[str, ModelFolder], data: dict[str, str]
) -> None:
    folder = models["llava"]
    found, plain = solved(method, "llava", folder, data), loaded(folder)
    batches = batches_for("llava", plain, data)
    names = list(found.linears)
    report = compare_layers(plain, found, GRID, batches, "cpu")
    rtn = round_to_nearest(plain.model, names, GRID, lambda done, total: None)

    for kind, variant in (("method", found), ("rtn", rtn)):
        for index in range(tiny.LAYERS):
            other = loaded(folder)
            own = f"{folder.arch.layers}.{index}."
            state = {n: w for n, w in variant.weights().items() if n.startswith(own)}
            assert len(state) >= 7
            other.model.load_state_dict(state, strict=False)
            error = size = 0.0
            for inputs in batches:
                entered, wanted = layer_output(plain, index, inputs)
                _, got = layer_output(other, index, inputs)
                error += (got - wanted).double().square().sum().item()
                size += (wanted - entered).double().square().sum().item()
            assert report[kind][index] == pytest.approx(error / size, rel=1e-3)  # 4 digits kept
    assert report["samples"] == SAMPLES
    pairs = zip(report["method"], report["rtn"], strict=True)
    assert report["above_rtn"] == [i for i, (m, r) in enumerate(pairs) if m >= r]


@pytest.mark.parametrize("family", ["text", "llava"])
def test_gptq_beats_rtn_on_its_calibration_data(family: str, make: Make) -> None:
    layers = make(family, "gptq", 4).record["figures"]["layers"]
    assert layers["above_rtn"] == []
    assert all(m < 0.8 * r for m, r in zip(layers["method"], layers["rtn"], strict=True))


def test_a_model_may_be_named_relative_to_the_current_folder(
    models: dict[str, ModelFolder], data: dict[str, str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """As arms of a recipe are, which quantize what another arm trained: `of:`."""
    shutil.copytree(models["text"].path, tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    chosen = settings("text", "gptq")
    record = quantize(find("model"), chosen, data, Path("out"), resume=False, progress=silent)
    assert record["figures"]["reload"]["text"] < 0.01


def test_fewer_bits_lose_more(make: Make) -> None:
    errors = [make("llava", "gptq", bits).record["figures"]["layers"]["method"] for bits in (4, 3)]
    assert sum(errors[1]) > 2 * sum(errors[0])


# --- refusals -----------------------------------------------------------------------------------


def test_what_cannot_work_is_refused_before_a_folder_is_begun(
    models: dict[str, ModelFolder], data: dict[str, str], make: Make, tmp_path: Path
) -> None:
    out = tmp_path / "out"

    def refuse(folder: ModelFolder, chosen: Any, kind: type[Exception], match: str) -> None:
        with pytest.raises(kind, match=match):
            quantize(folder, chosen, data, out, resume=False, progress=silent)
        assert not out.exists()

    plain = settings("text", "gptq")
    every = dataclasses.replace(plain, calibration=selector.parse("scienceqa:train"))
    refuse(models["text"], every, UsageError, "text model")
    refuse(models["text"], dataclasses.replace(plain, group_size=48), UsageError, "does not divide")
    refuse(models["text"], dataclasses.replace(plain, samples=99), UsageError, "99 are asked for")
    without = dataclasses.replace(plain, calibration=None)
    refuse(models["text"], without, PrerequisiteError, "calibration")
    packed = find(str(make("text", "rtn", 4).path))
    refuse(packed, plain, UsageError, "quantized already")


def test_a_missing_calibration_image_is_refused_before_a_folder_is_begun(
    models: dict[str, ModelFolder], tmp_path: Path
) -> None:
    gone = tuple(f"train-i{i}" for i in range(6))
    data = {"scienceqa": str(tiny.save_questions(tmp_path / "holed", missing=gone))}
    with pytest.raises(PrerequisiteError, match="missing image"):
        quantize(
            models["llava"], settings("llava", "gptq"), data, tmp_path / "out",
            resume=False, progress=silent,
        )  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_a_failure_on_a_thread_of_the_library_is_an_error_of_ours(
    models: dict[str, ModelFolder], data: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without care the library ends this very process here, with exit code 1."""

    def fail(*args: Any) -> None:
        raise ZeroDivisionError("on purpose")

    model = loaded(models["text"])
    with pytest.raises(NumericsError, match="ZeroDivisionError: on purpose"):
        backends.solve(
            "gptq", models["text"].path, list(layout.linear_shapes(models["text"].config)), GRID,
            batches_for("text", model, data), device="cpu", progress=fail,
        )  # fmt: skip
    monkeypatch.undo()
    assert len(solved("gptq", "text", models["text"], data).linears) == 14


def test_a_weight_off_the_grid_is_refused() -> None:
    scales, zeros = torch.full((2, 1), 0.5), torch.full((2, 1), 8.0)
    weight = torch.tensor([[0.5, -1.0] * 16, [3.5, -4.0] * 16])
    linear = QuantizedLinear.from_affine(weight, scales, zeros, GRID, "x")
    torch.testing.assert_close(linear.dense(), weight, rtol=0, atol=0)
    for bad in (weight + 0.1, weight * 9):  # between two codes; beyond the last one
        with pytest.raises(NumericsError, match="x: "):
            QuantizedLinear.from_affine(bad, scales, zeros, GRID, "x")


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_calibrating_in_bfloat16_finds_the_codes_or_says_that_it_cannot(
    method: str, models: dict[str, ModelFolder], data: dict[str, str], tmp_path: Path
) -> None:
    coarse = dataclasses.replace(settings("llava", method), dtype="bfloat16")
    record = quantize(models["llava"], coarse, data, tmp_path / "4", resume=False, progress=silent)
    assert record["figures"]["reload"]["image"] < 0.012
    wider = dataclasses.replace(coarse, bits=8)
    with pytest.raises(NumericsError, match="too coarse"):
        quantize(models["llava"], wider, data, tmp_path / "8", resume=False, progress=silent)


# --- the folder ---------------------------------------------------------------------------------


def files(out: Path) -> dict[str, str]:
    return {f.name: store.file_digest(f) for f in out.iterdir() if f.name != "provenance.json"}


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_a_killed_run_starts_again_and_ends_with_the_same_checkpoint(
    method: str, models: dict[str, ModelFolder], data: dict[str, str], make: Make, tmp_path: Path
) -> None:
    straight, out = make("text", method, 4), tmp_path / "out"
    record = straight.record
    out.mkdir()
    # What a kill leaves behind: the note of what is being made, half a scratch folder, some files.
    store.write_json(
        out / store.UNFINISHED, {key: record[key] for key in ("stage", "fingerprint", "spec")}
    )
    (out / "scratch").mkdir()
    (out / "scratch" / "model.safetensors").write_bytes(b"half")
    (out / "model.safetensors").write_bytes(b"older")

    def again(*, resume: bool) -> None:
        quantize(
            models["text"], settings("text", method), data, out, resume=resume, progress=silent
        )

    with pytest.raises(PrerequisiteError):
        find(str(out))
    with pytest.raises(UsageError, match="unfinished"):
        again(resume=False)
    again(resume=True)
    assert files(out) == files(straight.path)
    assert store.read_json(out / store.PROVENANCE)["fingerprint"] == record["fingerprint"]
    other = settings("text", method, 3)
    with pytest.raises(ArtifactError, match="bits"):
        quantize(models["text"], other, data, out, resume=True, progress=silent)


def test_a_finished_folder_is_not_made_again(
    models: dict[str, ModelFolder], data: dict[str, str], make: Make
) -> None:
    made = make("text", "rtn", 4)

    def fail(what: str, done: int, total: int) -> None:
        raise AssertionError(what)

    chosen = settings("text", "rtn")
    again = quantize(models["text"], chosen, data, made.path, resume=True, progress=fail)
    assert again == made.record


def test_the_command_prints_one_json_object_and_nothing_else(
    models: dict[str, ModelFolder], data: dict[str, str], tmp_path: Path
) -> None:
    """In a process of its own: the library prints a banner when it is imported."""
    command = [
        *("quantize", str(models["llava"].path)),
        *("--method", "gptq", "--group-size", str(tiny.GROUP), "--calib", "scienceqa:train"),
        *("--samples", "4", "--data", data["scienceqa"], "--out", str(tmp_path / "out")),
        *("--device", "cpu", "--json"),
    ]
    told, noise = tiny.one_json_object(*command)
    assert told["method"] == "gptq"
    assert told["reload"]["image"] <= told["reload"]["bound"]
    for word in ("GPTQModel", "WARN", "Warning", "Traceback"):
        assert word not in noise


# --- how samples are put together ---------------------------------------------------------------


def test_samples_of_like_length_go_together_and_the_middle_ones_come_last() -> None:
    lengths = [5, 9, 2, 7, 3, 8]
    batches = [
        {"input_ids": torch.full((1, n), n), "attention_mask": torch.ones(1, n, dtype=torch.long)}
        for n in lengths
    ]
    grouped = together(batches, 2, pad=0)
    assert [group["input_ids"].shape for group in grouped] == [(2, 3), (2, 9), (2, 7)]
    for group in grouped:
        assert torch.equal(group["input_ids"] != 0, group["attention_mask"].bool())
    rows = [row[row != 0].tolist() for group in grouped for row in group["input_ids"]]
    assert sorted(map(len, rows)) == sorted(lengths)


def test_samples_with_images_stay_alone() -> None:
    alone = {"input_ids": torch.ones(1, 3), "attention_mask": torch.ones(1, 3)}
    batches = [alone, alone | {"pixel_values": torch.zeros(1, 3, 8, 8)}]
    assert together(batches, 8, pad=0) == batches


def test_padding_changes_nothing_in_gptq(
    models: dict[str, ModelFolder], data: dict[str, str]
) -> None:
    model, folder = loaded(models["text"]), models["text"]
    batches = batches_for("text", model, data)
    found = [
        backends.solve(
            "gptq", folder.path, list(layout.linear_shapes(folder.config)), GRID, some,
            device="cpu", progress=lambda done, total: None,
        )
        for some in (batches, together(batches, 4, pad=0))
    ]  # fmt: skip
    for name, linear in found[0].linears.items():
        same = (linear.fields == found[1].linears[name].fields).float().mean()
        assert same > 0.98, f"{name}: {same:.3f} of the codes agree"


def test_awq_looks_at_every_sample_where_no_sequence_is_needed(
    models: dict[str, ModelFolder], data: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library alone would take the last sample for every search."""
    seen: dict[int, set[int]] = {}
    bounds = awq.clip_bounds

    def watch(self: Any, w: torch.Tensor, input_feat: torch.Tensor, **kwargs: Any) -> Any:
        seen.setdefault(w.shape[1], set()).add(input_feat.shape[-2])
        return bounds(self, w, input_feat, **kwargs)

    monkeypatch.setattr(awq, "clip_bounds", watch)
    folder = models["llava"]
    tokens = sum(
        batch["input_ids"].shape[1] for batch in batches_for("llava", loaded(folder), data)
    )
    solved("awq", "llava", folder, data)
    assert seen == {width: {tokens} for width in seen}
    assert set(seen) == {tiny.HIDDEN, tiny.INNER}
