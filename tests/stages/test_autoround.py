"""AutoRound: what the library is shown of each architecture, what comes of it, what is refused."""

from __future__ import annotations

import dataclasses
import importlib
import json
import logging
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from tiny import Source
from torch import Tensor

from qatbench.errors import NumericsError, PrerequisiteError, UsageError
from qatbench.quant import autoround, backends, layer_tuning
from qatbench.quant.grid import Grid
from qatbench.quant.layer_inputs import capture
from qatbench.quant.result import Quantized, QuantizedLinear
from qatbench.stages import quantize as stage
from qatbench.stages.common import silent
from qatbench.stages.student import packed_scales
from qatbench.vlm import layout
from qatbench.vlm.load import Loaded, ModelFolder, find, load

GRID = Grid(4, tiny.GROUP)
Batches = list[dict[str, Tensor]]


def settings(family: str, iters: int, **other: Any) -> stage.QuantizeSettings:
    part = "llava" if family in ("llava", *tiny.QWEN_VLMS) else "text"  # with images, or without
    return dataclasses.replace(tiny.settings(part, "autoround"), iters=iters, **other)


def opened(folder: ModelFolder, family: str, data: dict[str, str]) -> tuple[Loaded, Batches]:
    """The model and its calibration samples."""
    model = load(folder, device="cpu", dtype=torch.float32)
    questions = stage.calibration_questions(settings(family, 1), data)
    return model, stage.calibration_batches(model, questions, "qatbench")


def solved(
    model: Loaded, batches: Batches, iters: int, grid: Grid = GRID, **other: Any
) -> Quantized:
    given = {"device": "cpu", "progress": lambda done, total: None} | other
    names = list(layout.linear_shapes(model.folder.config))
    return autoround.solve(model.model, names, grid, batches, iterations=iters, **given)


# --- what the layers are shown --------------------------------------------------------------------


@pytest.mark.parametrize("family", list(tiny.SAVE))
@torch.no_grad()
def test_layers_one_after_another_compute_what_the_model_does(
    family: str, source: Source, data: dict[str, str]
) -> None:
    model, batches = opened(source(family), family, data)
    layers: Any = model.model.get_submodule(model.arch.layers)
    wanted: list[Tensor] = []
    handle = layers[-1].register_forward_hook(lambda module, args, out: wanted.append(out))
    for batch in batches:
        model.model(**batch, use_cache=False)
    handle.remove()
    own = list(layers)
    got = capture(model.model, layers, batches, torch.float32, "cpu")
    assert list(layers) == own

    states = got.first
    for index, layer in enumerate(layers):
        entered, keywords = got.entering(index, states), got.keywords(index)
        states = [
            layer(state, **{key: values[sample] for key, values in keywords.items()})
            for sample, state in enumerate(entered)
        ]
    assert len(states) == len(wanted) == len(batches)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(states, wanted, strict=True))
    assert [state.shape[:2] for state in states] == [b["input_ids"].shape for b in batches]
    assert len({state.shape[1] for state in states}) > 1  # unlike lengths, unpadded
    pictured = ["pixel_values" in batch for batch in batches]
    assert any(pictured) == model.arch.is_vlm
    added = [[more is not None for more in row] for row in got.added]
    deep = [pictured if family == "qwen3_vl" else [False] * len(batches)]  # DeepStack's features
    assert added == [[False] * len(batches), *deep]


def test_other_pictures_give_other_integers(source: Source, data: dict[str, str]) -> None:
    model, batches = opened(source("llava"), "llava", data)
    found = solved(model, batches, 16)
    dark = [
        batch | {"pixel_values": batch["pixel_values"] * 0} if "pixel_values" in batch else batch
        for batch in batches
    ]
    other = solved(model, dark, 16)
    same = [(a.fields == other.linears[n].fields).float().mean() for n, a in found.linears.items()]
    assert max(same) < 0.95


# --- what comes of it -----------------------------------------------------------------------------


@pytest.mark.parity
def test_the_integers_are_those_of_a_whole_run_of_the_library(
    source: Source, data: dict[str, str]
) -> None:
    """Which draws samples in an order of its own: here all of them are in every step."""
    model, batches = opened(source("text"), "text", data)
    ours = solved(model, batches, 12)
    start = solved(model, batches, 1)  # where the tuning starts: its first step is the best
    library = layer_tuning.load()
    with backends.quiet():
        session = library.AutoRound(
            load(source("text"), device="cpu", dtype=torch.float32).model,
            tokenizer=model.tokenizer, bits=GRID.bits, group_size=GRID.group_size, sym=True,
            iters=12, scale_dtype="fp32", dataset=[dict(batch) for batch in batches],
            nsamples=len(batches), seqlen=1, batch_size=1, gradient_accumulate_steps=8,
            device_map="cpu", enable_torch_compile=False, amp=False,
        )  # fmt: skip
        tuned, _ = session.quantize()
    for name, linear in ours.linears.items():
        theirs = tuned.get_submodule(name)
        whole = autoround.take(theirs.weight, theirs.scale, GRID, name)
        # Sums over samples come in another order: a sign of a gradient of nearly 0 may differ.
        assert (linear.fields == whole.fields).float().mean() > 0.99, name
        assert (linear.fields == start.linears[name].fields).float().mean() < 0.95, name


@pytest.mark.parametrize(("bits", "group_size"), [(2, 32), (3, -1), (4, 32), (8, 16)])
def test_a_checkpoint_holds_the_tuned_weights_up_to_its_scales_rounding(
    bits: int,
    group_size: int,
    source: Source,
    data: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tuned: dict[str, Tensor] = {}
    original = autoround.take

    def watch(weight: Tensor, scale: Tensor, grid: Grid, name: str) -> QuantizedLinear:
        tuned[name] = weight.detach().clone()
        return original(weight, scale, grid, name)

    monkeypatch.setattr(autoround, "take", watch)
    chosen = settings("text", 3, bits=bits, group_size=group_size)
    out = tmp_path / "out"
    stage.quantize(source("text"), chosen, data, out, resume=False, progress=silent)

    packed = load(find(str(out)), device="cpu", dtype=torch.float32, kernel="dense").model
    assert set(tuned) == set(layout.linear_shapes(source("text").config))
    for name, weight in tuned.items():
        # 2^-11: half a unit in the last place of an fp16 scale
        torch.testing.assert_close(
            packed.get_submodule(name).weight.detach(), weight, rtol=2**-11, atol=0
        )


@pytest.mark.parametrize("family", list(tiny.SAVE))
def test_every_family_ends_in_a_proven_checkpoint_and_nothing_else_is_touched(
    family: str, source: Source, data: dict[str, str], tmp_path: Path
) -> None:
    folder = source(family)
    record = stage.quantize(
        folder, settings(family, 16), data, tmp_path, resume=False, progress=silent
    )

    figures = record["figures"]
    kinds = ["text", "image"] if folder.arch.is_vlm else ["text"]
    assert all(figures["reload"][kind] < 0.01 for kind in kinds), figures["reload"]
    layers = figures["layers"]
    assert len(layers["method"]) == tiny.LAYERS
    # The first layer: its inputs are those that it is judged on.
    assert layers["method"][0] < 0.7 * layers["rtn"][0]
    names = list(layout.linear_shapes(folder.config))
    made = find(str(tmp_path))
    before, after = (
        load(one, device="cpu", dtype=torch.bfloat16, kernel="dense").model.state_dict()
        for one in (folder, made)
    )
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert changed == {f"{name}.weight" for name in names}
    if family == "text":  # scales of both signs: training from here searches for its own
        dense = load(made, device="cpu", dtype=torch.float32, kernel="dense")
        assert packed_scales(made, dense, names, GRID) == {}


def test_tuning_in_bfloat16_ends_near_where_float32_does(
    source: Source, data: dict[str, str]
) -> None:
    model, batches = opened(source("text"), "text", data)
    try:
        half = solved(model, batches, 16, dtype=torch.bfloat16)
    except UsageError as error:
        pytest.skip(error.message)  # a CPU without it
    full = solved(model, batches, 16)
    weights = model.model.state_dict()
    for name, linear in full.linears.items():
        weight = weights[f"{name}.weight"]
        errors = [(one.dense() - weight).norm() for one in (half.linears[name], linear)]
        assert errors[0] < 1.2 * errors[1], name


def test_it_is_quiet_repeatable_and_leaves_model_and_generators_as_they_were(
    source: Source,
    data: dict[str, str],
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, batches = opened(source("text"), "text", data)
    before = {name: value.clone() for name, value in model.model.state_dict().items()}
    states = random.getstate(), torch.get_rng_state()
    told: list[tuple[int, int]] = []
    layer_tuning.load()
    log = logging.getLogger("autoround")
    monkeypatch.setattr(log, "handlers", [logging.StreamHandler(sys.stderr)])  # as in a process
    capfd.readouterr()

    def keep(done: int, total: int) -> None:
        told.append((done, total))

    found = [solved(model, batches, 2, samples_a_step=3, progress=keep) for _ in range(2)]

    assert told == 2 * [(1, tiny.LAYERS), (2, tiny.LAYERS)]
    assert capfd.readouterr() == ("", "")
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])
    after = model.model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    for name, linear in found[0].linears.items():
        assert torch.equal(linear.fields, found[1].linears[name].fields)
        assert torch.equal(linear.scales, found[1].linears[name].scales)


def test_the_command_prints_one_json_object_and_nothing_else(
    source: Source, data: dict[str, str], tmp_path: Path
) -> None:
    """In a process of its own: the library logs when it is imported."""
    command = [
        *("quantize", str(source("llava").path)),
        *("--method", "autoround", "--iters", "2", "--group-size", str(tiny.GROUP)),
        *("--calib", "scienceqa:train", "--samples", "3", "--data", data["scienceqa"]),
        *("--out", str(tmp_path / "out"), "--device", "cpu", "--json"),
    ]
    told, noise = tiny.one_json_object(*command)
    assert told["method"] == "autoround"
    made = json.loads((tmp_path / "out" / "provenance.json").read_text())
    assert made["spec"]["iters"] == 2
    assert made["versions"]["auto-round"].startswith(layer_tuning.VERSION)
    for word in ("autoround.py", "INFO", "WARN", "Warning", "loss iter", "Traceback"):
        assert word not in noise


# --- settings -------------------------------------------------------------------------------------


def test_iterations_decide_an_autoround_checkpoint_and_no_other(data: dict[str, str]) -> None:
    """Committed results of the other methods keep their fingerprints."""
    questions = stage.calibration_questions(settings("text", 1), data)
    shared = {"model", "method", "bits", "group_size"}
    calibrated = shared | {"calibration", "protocol", "samples", "batch_size", "dtype"}
    known = {"rtn": shared, "gptq": calibrated, "awq": calibrated}
    for method, keys in (known | {"autoround": calibrated | {"iters"}}).items():
        specs = [
            dataclasses.replace(tiny.settings("text", method), iters=iters).spec("m", questions)
            for iters in (1, 200)
        ]
        assert specs[0].keys() == keys
        assert (specs[0] == specs[1]) == (method != "autoround")


def test_settings_reach_the_tuning(
    source: Source, data: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}

    def record(*args: Any, **kwargs: Any) -> None:
        seen.update(kwargs)
        raise NumericsError("seen enough")

    monkeypatch.setattr(autoround, "solve", record)
    chosen = settings("text", 7, batch_size=3, dtype="bfloat16")
    with pytest.raises(NumericsError, match="seen enough"):
        stage.quantize(source("text"), chosen, data, tmp_path, resume=False, progress=silent)
    assert (seen["iterations"], seen["samples_a_step"], seen["device"]) == (7, 3, "cpu")
    assert seen["dtype"] is torch.bfloat16


# --- refusals -------------------------------------------------------------------------------------


def refuse(
    kind: type[Exception], match: str, folder: ModelFolder, data: dict[str, str], out: Path,
    **other: Any,
) -> Any:  # fmt: skip
    chosen = settings("text", 1, **other)
    with pytest.raises(kind, match=match) as caught:
        stage.quantize(folder, chosen, data, out, resume=False, progress=silent)
    assert not out.exists()  # nothing was begun
    return caught.value


def test_a_missing_or_other_library_is_told_with_the_command_that_installs_it(
    source: Source, data: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = source("text"), data, tmp_path / "out"
    monkeypatch.setattr(layer_tuning.load(), "__version__", "0.15.1")
    error = refuse(PrerequisiteError, "auto-round 0.15.1 is here, 0.16 is needed", *asked)
    assert "pip install" in error.hint
    monkeypatch.setitem(sys.modules, "auto_round", None)
    error = refuse(PrerequisiteError, "auto-round cannot be imported", *asked)
    assert "pip install" in error.hint
    assert "auto-round==0.16" in error.hint


def test_a_dtype_that_it_does_not_tune_in_is_refused(
    source: Source, data: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse(UsageError, "float16", source("text"), data, tmp_path / "out", dtype="float16")
    cpu = importlib.import_module("auto_round.utils.device_manager").CpuARDevice
    monkeypatch.setattr(cpu, "supports_bf16", lambda self: False)
    model, batches = opened(source("text"), "text", data)
    with pytest.raises(UsageError, match=r"does not tune in torch.bfloat16 on cpu"):
        solved(model, batches, 1, dtype=torch.bfloat16)


def test_what_fails_inside_the_library_is_an_error_of_ours(
    source: Source, data: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batches = opened(source("text"), "text", data)
    from auto_round.algorithms.composer import AlgorithmComposer

    for raised, kind, match in (
        (ZeroDivisionError("on purpose"), NumericsError, "ZeroDivisionError: on purpose"),
        (torch.OutOfMemoryError("CUDA"), PrerequisiteError, "out of memory"),
    ):

        def fail(*args: Any, what: Exception = raised, **kwargs: Any) -> None:
            raise what

        monkeypatch.setattr(AlgorithmComposer, "compress_block", fail)
        with pytest.raises(kind, match=match):
            solved(model, batches, 1)
    with pytest.raises(PrerequisiteError, match="no calibration samples"):
        solved(model, [], 1)


def test_a_layer_without_a_finite_loss_is_not_rounded_in_silence(
    source: Source, data: dict[str, str]
) -> None:
    """Left to itself the library takes the nearest integers then, and goes on."""
    model, batches = opened(source("text"), "text", data)
    norm = model.model.get_submodule(f"{model.arch.layers}.1.post_attention_layernorm")
    with torch.no_grad():
        norm.get_parameter("weight")[0] = torch.nan
    with pytest.raises(NumericsError, match="no step of decoder layer 1 had a finite loss"):
        solved(model, batches, 2)


def test_a_linear_that_the_library_leaves_out_is_named(
    source: Source, data: dict[str, str]
) -> None:
    model, batches = opened(source("text"), "text", data)
    names = [*layout.linear_shapes(model.folder.config), "model.layers.0.mlp.extra"]
    with pytest.raises(NumericsError, match=r"left out 1 linears.*mlp\.extra"):
        autoround.solve(
            model.model, names, GRID, batches,
            iterations=1, device="cpu", progress=lambda done, total: None,
        )  # fmt: skip
