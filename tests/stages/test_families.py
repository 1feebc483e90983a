"""Every architecture through every stage: packed export, training, and the numbers in between."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from safetensors.torch import load_file
from tiny import Source

from qatbench.stages import quantize as stage
from qatbench.stages.common import silent
from qatbench.stages.objective import look
from qatbench.stages.train import TrainRequest, train
from qatbench.stages.train_settings import TrainSettings
from qatbench.tasks import selector
from qatbench.vlm import layout
from qatbench.vlm.load import ModelFolder, find, load
from qatbench.vlm.training import TrainingData

CPU = torch.device("cpu")
FAMILIES = list(tiny.SAVE)
VLMS = ["llava", *tiny.QWEN_VLMS]
NEW = [*tiny.QWEN_TEXT, *tiny.QWEN_VLMS]
WIDER = 2 * tiny.HIDDEN


def plainly(path: Path) -> Any:
    """The checkpoint as any user loads it; no key may be missing or left over."""
    auto = getattr(transformers, find(str(path)).arch.auto_class)
    model, info = auto.from_pretrained(
        path, dtype=torch.float32, device_map="cpu", output_loading_info=True
    )
    assert {kind: list(keys) for kind, keys in info.items() if keys} == {}
    return model


def export(folder: ModelFolder, out: Path) -> dict[str, Any]:
    """Round to nearest at 4 bits."""
    chosen = tiny.settings("text", "rtn")  # RTN reads no calibration data
    return stage.quantize(folder, chosen, {}, out, resume=False, progress=silent)


# --- packed export ------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", NEW)
def test_a_packed_checkpoint_loads_with_the_very_same_vision_weights_and_biases(
    family: str, tied: bool, source: Source, tmp_path: Path
) -> None:
    folder = source(family, tied=tied)
    record = export(folder, tmp_path)
    proof = record["figures"]["reload"]
    kinds = ["text", "image"] if folder.arch.is_vlm else ["text"]
    # RELOAD_BOUND's comment says where this comes from.
    assert all(proof[kind] < 0.01 for kind in kinds), proof
    model = plainly(tmp_path)
    packed = {n for n, m in model.named_modules() if hasattr(m, "qweight")}
    assert packed == set(layout.linear_shapes(folder.config))
    old, new = (load_file(one / "model.safetensors") for one in (folder.path, tmp_path))
    kept = {key for key in old if key in new}
    assert ("lm_head.weight" in new) != tied
    gone = {key.removesuffix(".weight") for key in old.keys() - kept}
    assert gone == {folder.arch.file_key(name) for name in packed}  # nothing else is renamed
    for key in kept:
        assert torch.equal(old[key], new[key]), key
    biases = {key for key in kept if key.endswith("_proj.bias") and "visual" not in key}
    assert len(biases) == (0 if family.startswith("qwen3") else 3 * tiny.LAYERS)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
def test_a_flat_config_as_published_is_exported_and_reloaded(
    family: str, source: Source, tmp_path: Path
) -> None:
    """The hub's Qwen2-VL and Qwen2.5-VL files have the language model's sizes at the top."""
    folder = source(family, tied=True)
    published = tmp_path / "published"
    published.mkdir()
    for file in folder.path.iterdir():
        (published / file.name).symlink_to(file)
    text = {k: v for k, v in folder.config["text_config"].items() if k != "model_type"}
    rope = text.pop("rope_parameters")
    flat = {k: v for k, v in folder.config.items() if k not in ("text_config", "dtype")} | text
    flat |= {
        "rope_theta": rope["rope_theta"],
        "rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]},
        "torch_dtype": "bfloat16",
    }
    flat["vision_config"] = flat["vision_config"] | {"model_type": family}
    (published / "config.json").unlink()
    (published / "config.json").write_text(json.dumps(flat))

    record = export(find(str(published)), tmp_path / "out")

    assert max(record["figures"]["reload"][kind] for kind in ("text", "image")) < 0.01
    assert "text_config" not in find(str(tmp_path / "out")).config
    again, usual = plainly(tmp_path / "out"), plainly(folder.path)
    known = usual.config.text_config.rope_parameters
    assert known.items() <= again.config.text_config.rope_parameters.items()
    assert again.lm_head.weight is again.model.language_model.embed_tokens.weight


CALIBRATED = [(family, method) for family in NEW for method in ("gptq", "awq")]


@pytest.mark.parametrize(("family", "method"), CALIBRATED)
def test_the_library_calibrates_with_text_and_images_of_several_sizes(
    family: str, method: str, source: Source, data: dict[str, str], tmp_path: Path
) -> None:
    folder = source(family)
    part = "text" if family in tiny.QWEN_TEXT else "llava"  # all training questions, or text only
    record = stage.quantize(
        folder, tiny.settings(part, method), data, tmp_path, resume=False, progress=silent
    )
    proof = record["figures"]["reload"]
    kinds = ["text", "image"] if folder.arch.is_vlm else ["text"]
    assert all(proof[kind] < 0.01 for kind in kinds), proof
    layers = record["figures"]["layers"]
    assert layers["above_rtn"] == []  # the point of calibrating: a lower output error
    assert len(layers["rtn"]) == tiny.LAYERS


# --- training -----------------------------------------------------------------------------------

SETTINGS: dict[str, Any] = {
    "steps": 2,
    "group_size": tiny.GROUP,
    "batch_size": 4,
    "micro_batch_size": 2,
    "lr": 1e-3,
    "scale_lr": 1e-2,
    "formats": ("qatbench",),
    "omega_warmup": 1,
}


def questions(family: str, data: dict[str, str]) -> list[Any]:
    subset = "all" if family in VLMS else "text"
    return selector.load(selector.parse(f"scienceqa:train:{subset}"), data)


@pytest.mark.parametrize("method", ["sft", "kd", "qat", "grace"])
@pytest.mark.parametrize("family", FAMILIES)
def test_training_ends_in_a_proven_checkpoint(
    family: str, method: Any, source: Source, data: dict[str, str], tmp_path: Path
) -> None:
    taught, packs = method in ("kd", "grace"), method in ("qat", "grace")
    wider = {"width": WIDER} if family in NEW else {}
    folder = source(family, **({"tied": method == "qat"} if family in NEW else {}))
    asked = TrainRequest(
        TrainSettings(method=method, **SETTINGS),
        folder,
        source(family, seed=1, **wider) if taught else None,
        questions(family, data),
        "cpu",
    )
    record = train(asked, tmp_path, resume=False, progress=silent)

    proof = record["figures"]["reload"]
    assert max(proof.get(kind, 0.0) for kind in ("text", "image")) < 0.01
    model = plainly(tmp_path)
    packed = {n for n, m in model.named_modules() if hasattr(m, "qweight")}
    assert packed == (set(layout.linear_shapes(folder.config)) if packs else set())
    lines = [json.loads(x) for x in (tmp_path / "train.jsonl").read_text().splitlines()]
    assert all((line["kd"] is not None) == taught for line in lines)
    related = method == "grace" and folder.arch.is_vlm
    assert any(line["rcka"] is not None for line in lines) == related
    _only_the_projector_moved(folder, tmp_path)


def _only_the_projector_moved(folder: ModelFolder, trained: Path) -> None:
    """Of what sees images: the tower is kept bit for bit, the projector is trained."""
    old, new = (
        load(one, device="cpu", dtype=torch.bfloat16, kernel="dense").model.state_dict()
        for one in (folder, find(str(trained)))
    )
    inside = (f"{folder.arch.layers.rpartition('.')[0]}.", "lm_head.")
    seen = {name for name in old if folder.arch.is_vlm and not name.startswith(inside)}
    frozen = {name for name in seen if folder.arch.frozen(name)}
    assert bool(frozen) == bool(seen - frozen) == folder.arch.is_vlm
    assert all(torch.equal(old[name], new[name]) for name in frozen)
    moved = {name for name in seen - frozen if not torch.equal(old[name], new[name])}
    assert bool(moved) == folder.arch.is_vlm


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_training_rows_compute_what_plain_forwards_do(
    family: str, source: Source, data: dict[str, str]
) -> None:
    loaded = load(source(family), device="cpu", dtype=torch.float32)
    stream = TrainingData(loaded, questions(family, data), ("qatbench", "choices"), seed=0)
    rows = sorted(stream.step(0, 6), key=len, reverse=True)
    assert any(row.prompt.pixels for row in rows) == loaded.arch.is_vlm
    with torch.no_grad():
        packed = look(loaded.model, stream.collate(rows, CPU, torch.float32), images=False)
        alone = []
        for row in rows:
            out = loaded.model(**row.prompt.inputs(row.target)).logits[0]
            alone.append(out[len(row.prompt) - 1 : len(row) - 1])
    # fp32 sums in another order; logits are of order 1
    torch.testing.assert_close(packed.logits, torch.cat(alone), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", tiny.QWEN_VLMS)
def test_each_image_is_related_over_all_of_its_visual_tokens(
    family: str, source: Source, data: dict[str, str]
) -> None:
    loaded = load(source(family), device="cpu", dtype=torch.float32)
    stream = TrainingData(loaded, questions(family, data), ("qatbench",), seed=0)
    rows = [row for row in stream.step(0, 12) if row.prompt.pixels]
    batch = stream.collate(rows, CPU, torch.float32)
    counts = [int(row.prompt.pixels["image_grid_thw"].prod()) // tiny.MERGE**2 for row in rows]
    assert set(counts) == {9, 12}  # two sizes of pictures
    assert sorted(map(len, batch.images)) == sorted(counts)
    tokens = batch.inputs["input_ids"].reshape(-1).tolist()
    mark = layout.image_token(loaded.folder.config)
    found = sorted(place for where in batch.images for place in where.tolist())
    assert found == [place for place, token in enumerate(tokens) if token == mark]
    assert len(found) * tiny.MERGE**2 == len(batch.inputs["pixel_values"])
