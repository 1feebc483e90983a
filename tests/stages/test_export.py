"""The packed checkpoint: what plain transformers makes of it, and that the proof bites."""

from __future__ import annotations

import dataclasses
import io
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file
from tiny import Make, settings
from torch import Tensor

from qatbench.errors import ArtifactError, NumericsError, PrerequisiteError, QatbenchError
from qatbench.quant import rtn
from qatbench.quant.fields import AWQ_ORDER
from qatbench.quant.grid import Grid
from qatbench.quant.result import Quantized, QuantizedLinear
from qatbench.stages import export, proof
from qatbench.stages import quantize as stage
from qatbench.stages.common import silent
from qatbench.stages.proof import elsewhere
from qatbench.vlm import layout
from qatbench.vlm.batch import Encoder
from qatbench.vlm.load import Loaded, ModelFolder, find, load

EVERY = [
    ("text", "rtn", 4),
    ("text", "gptq", 4),
    ("text", "awq", 4),
    ("llava", "rtn", 4),
    ("llava", "rtn", 3),
    ("llava", "rtn", 2),
    ("llava", "gptq", 4),
    ("llava", "gptq", 3),
    ("llava", "awq", 4),
    ("llava", "awq", 3),
]
LAYOUTS = [("llava", "gptq", 4), ("llava", "awq", 4), ("llava", "awq", 3)]


@torch.inference_mode()
def logits(loaded: Loaded, *, image: bool) -> Tensor:
    picture = io.BytesIO()
    Image.new("RGB", (40, 40), (200, 30, 30)).save(picture, "PNG")
    prompt = Encoder(loaded).prompt("What color is it?", picture.getvalue() if image else None)
    out: Tensor = loaded.model(input_ids=torch.tensor([prompt.ids]), **prompt.pixels).logits
    return out.float()


def off(got: Tensor, wanted: Tensor) -> float:
    return ((got - wanted).abs().max() / wanted.std()).item()


# --- a good checkpoint --------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "method", "bits"), EVERY)
def test_plain_transformers_loads_it_with_no_key_missing_or_left_over(
    family: str, method: str, bits: int, make: Make
) -> None:
    made = make(family, method, bits)
    auto = {
        "text": transformers.AutoModelForCausalLM,
        "llava": transformers.AutoModelForImageTextToText,
    }[family]
    model, info = auto.from_pretrained(
        made.path, dtype=torch.float32, device_map="cpu", output_loading_info=True
    )
    assert {kind: list(keys) for kind, keys in info.items() if keys} == {}
    kinds = {type(m).__name__ for n, m in model.named_modules() if n.endswith("_proj")}
    assert not any("Torch" in type(m).__name__ for n, m in model.named_modules() if "vision" in n)
    packed = [n for n, m in model.named_modules() if hasattr(m, "qweight")]
    assert set(packed) == set(layout.linear_shapes(find(str(made.path)).config)), kinds


@pytest.mark.parametrize(("family", "method", "bits"), EVERY)
def test_the_proof_is_far_from_its_bound(family: str, method: str, bits: int, make: Make) -> None:
    proof = make(family, method, bits).record["figures"]["reload"]
    kinds = ["text", "image"] if family == "llava" else ["text"]
    assert [kind for kind in ("text", "image") if kind in proof] == kinds
    # The kernels hold scale * code in fp16, 2^-11 a weight: RELOAD_BOUND's comment states this.
    assert max(proof[kind] for kind in kinds) < 0.01 < proof["bound"]


@pytest.mark.parametrize(("family", "method", "bits"), EVERY)
def test_own_unpacking_and_the_library_agree(
    family: str, method: str, bits: int, make: Make
) -> None:
    folder = find(str(make(family, method, bits).path))
    both = [load(folder, device="cpu", dtype=torch.float32, kernel=k) for k in ("library", "dense")]
    assert [one.kernel for one in both] == ["library", "dense"]
    for image in (False, True)[: 1 + (family == "llava")]:
        library, dense = (logits(one, image=image) for one in both)
        assert off(library, dense) < 0.01


@pytest.mark.parametrize(("family", "method", "bits"), LAYOUTS)
def test_what_is_not_quantized_is_kept_bit_for_bit(
    family: str, method: str, bits: int, make: Make, models: dict[str, ModelFolder]
) -> None:
    source = load(models[family], device="cpu", dtype=torch.bfloat16).model.state_dict()
    folder = find(str(make(family, method, bits).path))
    again = load(folder, device="cpu", dtype=torch.bfloat16, kernel="dense").model.state_dict()
    kept = [n for n in source if not n.startswith(folder.arch.layers)]
    assert sum(n.startswith("model.vision_tower.") for n in kept) > 30
    for name in kept:
        assert torch.equal(again[name], source[name]), name
    norms = [n for n in source if n.startswith(folder.arch.layers) and "norm" in n]
    changed = [n for n in norms if not torch.equal(again[n], source[n])]
    assert bool(changed) == (method == "awq")


def test_half_precision_sources_keep_their_type(
    models: dict[str, ModelFolder], tmp_path: Path
) -> None:
    """The published LLaVA weights are fp16; in bf16 they would lose three bits."""
    source = tmp_path / "half"
    loaded = load(models["llava"], device="cpu", dtype=torch.float16)
    loaded.model.save_pretrained(source)
    loaded.processor.save_pretrained(source)  # type: ignore[union-attr]
    folder, out = find(str(source)), tmp_path / "out"
    stage.quantize(folder, settings("llava", "rtn"), {}, out, resume=False, progress=silent)
    stored = load_file(out / "model.safetensors")
    assert {v.dtype for k, v in stored.items() if v.is_floating_point()} == {torch.float16}
    assert find(str(out)).config["dtype"] == "float16"


def test_file_keys_are_spelled_as_published(make: Make) -> None:
    names = set(load_file(make("llava", "gptq", 4).path / "model.safetensors"))
    assert "language_model.model.layers.1.mlp.down_proj.qweight" in names
    assert "vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight" in names
    assert not any(name.startswith("model.") for name in names)


@pytest.mark.parametrize("linked", ["gptq", "awq"])
def test_the_config_says_what_both_loaders_need(linked: str, make: Make) -> None:
    said = find(str(make("llava", linked, 4).path)).config["quantization_config"]
    common = {"quant_method": linked, "bits": 4, "group_size": tiny.GROUP}
    assert common.items() <= said.items()
    assert "modules_in_block_to_quantize" not in said
    if linked == "gptq":
        wanted = {"desc_act": False, "sym": True, "checkpoint_format": "gptq", "lm_head": False}
        assert wanted.items() <= said.items()
        assert said["block_name_to_quantize"] == "model.language_model.layers"
        assert "modules_to_not_convert" not in said
    else:
        assert (said["zero_point"], said["version"]) == (True, "gemm")
        assert set(said["modules_to_not_convert"]) == {
            "vision_tower",
            "model.vision_tower",
            "multi_modal_projector",
            "model.multi_modal_projector",
            "lm_head",
        }


def test_three_bit_awq_is_labelled_as_what_it_is(make: Make) -> None:
    made = make("llava", "awq", 3)
    said = find(str(made.path)).config["quantization_config"]
    assert (said["quant_method"], said["checkpoint_format"]) == ("gptq", "gptq_v2")
    assert (said["sym"], said["meta"]["algorithm"]) == (False, "awq")
    assert made.record["figures"]["layout"] == "gptq_v2"


def test_bits_per_weight_count_scales_and_zero_points(make: Make) -> None:
    for bits in (4, 3, 2):  # 16 bits a scale and `bits` a zero point in each group
        told = make("llava", "rtn", bits).record["figures"]["bits_per_weight"]
        assert told == pytest.approx(bits + (16 + bits) / tiny.GROUP, abs=1e-4)


def test_a_finished_folder_holds_a_model_and_its_processor(make: Make) -> None:
    made = make("llava", "rtn", 4)
    assert {file.name for file in made.path.iterdir()} == {
        *("config.json", "generation_config.json", "model.safetensors", "provenance.json"),
        *("tokenizer.json", "tokenizer_config.json", "processor_config.json"),
        *("chat_template.jinja", "README.md"),
    }
    assert transformers.AutoProcessor.from_pretrained(made.path).chat_template == tiny.TEMPLATE


def quantized(model: Loaded) -> Quantized:
    names = list(layout.linear_shapes(model.folder.config))
    return rtn.round_to_nearest(model.model, names, Grid(4, tiny.GROUP), lambda done, total: None)


def test_the_dense_loader_holds_exactly_the_intended_weights(
    models: dict[str, ModelFolder], tmp_path: Path
) -> None:
    model = load(models["llava"], device="cpu", dtype=torch.float32)
    wanted = quantized(model)
    original = {name: value.clone() for name, value in model.model.state_dict().items()}
    export.write_packed(models["llava"], model, wanted, tmp_path)
    again = load(find(str(tmp_path)), device="cpu", dtype=torch.float32, kernel="dense")
    state = again.model.state_dict()
    assert set(state) == set(original)
    for name, value in (original | wanted.weights()).items():
        assert torch.equal(state[name], value), name


def test_shards_load_like_one_file(
    models: dict[str, ModelFolder], make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "SHARD_BYTES", 50_000)
    model = load(models["llava"], device="cpu", dtype=torch.float32)
    export.write_packed(models["llava"], model, quantized(model), tmp_path)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 3
    both = [
        load(find(str(path)), device="cpu", dtype=torch.float32)
        for path in (tmp_path, make("llava", "rtn", 4).path)
    ]
    assert torch.equal(*(logits(one, image=True) for one in both))


def test_a_dense_checkpoint_is_proved_too(models: dict[str, ModelFolder], tmp_path: Path) -> None:
    model = load(models["llava"], device="cpu", dtype=torch.float32)
    with torch.no_grad():
        model.model.lm_head.weight.mul_(1.5)
    figures = export.write_dense(models["llava"], model, tmp_path)
    assert figures["bits_per_weight"] == 16
    assert max(figures["reload"]["text"], figures["reload"]["image"]) < 1e-5
    again = load(find(str(tmp_path)), device="cpu", dtype=torch.float32)
    assert torch.equal(again.model.lm_head.weight, model.model.lm_head.weight)


# --- the proof bites ----------------------------------------------------------------------------


def spoil_tensors(monkeypatch: pytest.MonkeyPatch, change: Any) -> None:
    original = QuantizedLinear.packed

    def packed(self: QuantizedLinear, layout: str, name: str) -> dict[str, Tensor]:
        tensors = original(self, layout, name)
        return change(tensors) if name.endswith("layers.0.mlp.down_proj") else tensors

    monkeypatch.setattr(QuantizedLinear, "packed", packed)


def spoil_file(monkeypatch: pytest.MonkeyPatch, change: Any) -> None:
    original = export._save

    def save(tensors: dict[str, Tensor], folder: Path) -> None:
        change(tensors)
        original(tensors, folder)

    monkeypatch.setattr(export, "_save", save)


def one_zero_more(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return tensors | {"qzeros": tensors["qzeros"] + 0x11111111}


def plain_nibbles(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """AWQ words in GPTQ's order."""
    words = tensors["qweight"].long()
    fields = [(words >> (4 * k)) & 15 for k in range(8)]
    mixed = sum(fields[k] << (4 * AWQ_ORDER[k]) for k in range(8))
    signed = ((mixed & 0xFFFFFFFF) ^ 0x80000000) - 0x80000000
    return tensors | {"qweight": signed.to(torch.int32)}


def rolled_scales(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return tensors | {"scales": tensors["scales"].roll(1, 0)}


def drop(name: str) -> Any:
    return lambda tensors: tensors.pop(name)


def shift(name: str) -> Any:
    return lambda tensors: tensors[name].copy_(tensors[name].roll(1, 0))


DOWN = "language_model.model.layers.0.mlp.down_proj"
SPOILT = {
    "zero point": ("gptq", spoil_tensors, one_zero_more),
    "zero point of AWQ": ("awq", spoil_tensors, one_zero_more),
    "nibble order": ("awq", spoil_tensors, plain_nibbles),
    "scales": ("gptq", spoil_tensors, rolled_scales),
    "no zero points": ("gptq", spoil_file, drop(f"{DOWN}.qzeros")),
    "no groups": ("gptq", spoil_file, drop(f"{DOWN}.g_idx")),
    "no norm": ("gptq", spoil_file, drop("language_model.model.norm.weight")),
    "norm": ("gptq", spoil_file, shift("language_model.model.layers.0.input_layernorm.weight")),
    "vision": (
        "gptq",
        spoil_file,
        shift("vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight"),
    ),
}


@pytest.mark.parametrize("what", SPOILT)
def test_a_spoilt_checkpoint_is_not_published(
    what: str, models: dict[str, ModelFolder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    form, spoil, change = SPOILT[what]
    out = tmp_path / "out"

    def make(folder: Path, *, resume: bool) -> dict[str, Any]:
        chosen = dataclasses.replace(settings("llava", "rtn"), layout=form)
        return stage.quantize(models["llava"], chosen, {}, folder, resume=resume, progress=silent)

    with monkeypatch.context() as broken:
        spoil(broken, change)
        with pytest.raises((NumericsError, ArtifactError)) as caught:
            make(out, resume=False)
    if isinstance(caught.value, NumericsError):
        # The smallest of these moves a logit by ten bounds: RELOAD_BOUND's comment states this.
        worst = float(caught.value.message.split("differ by ")[1].split()[0])
        assert worst > 10 * proof.RELOAD_BOUND
    assert caught.value.exit_code in (4, 5)
    assert {file.name for file in out.iterdir()} == {"unfinished.json"}
    with pytest.raises(PrerequisiteError):
        find(str(out))
    assert make(out, resume=True)["figures"]["reload"]["image"] < 0.01  # once mended it goes on


def test_logits_that_are_not_numbers_fail_the_proof(
    models: dict[str, ModelFolder], tmp_path: Path
) -> None:
    model = load(models["text"], device="cpu", dtype=torch.float32)
    with torch.no_grad():
        model.model.model.norm.weight[0] = float("nan")
    with pytest.raises(QatbenchError) as caught:
        export.write_packed(models["text"], model, quantized(model), tmp_path)
    assert isinstance(caught.value, NumericsError)
    assert not list(tmp_path.iterdir())


# --- a process of its own -------------------------------------------------------------------------


def test_a_new_process_gives_the_same_answers(make: Make, tmp_path: Path) -> None:
    path = make("llava", "rtn", 4).path
    here, kernel = proof.answers(path)
    there, same = elsewhere(path)
    assert (kernel, set(here)) == (same, {"text", "image"})
    for kind, logits in here.items():
        torch.testing.assert_close(there[kind], logits, rtol=1e-5, atol=1e-5)
    broken = tmp_path / "broken"
    shutil.copytree(path, broken)
    (broken / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(ArtifactError, match="does not reload in a new process"):
        elsewhere(broken)


def test_autoround_is_proven_there_and_others_here(
    models: dict[str, ModelFolder], data: dict[str, str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    asked: list[str] = []

    def watched(folder: Path) -> Any:
        asked.append(folder.parent.name)
        return proof.answers(folder)

    monkeypatch.setattr(proof, "elsewhere", watched)
    for method in ("autoround", "gptq"):
        chosen = dataclasses.replace(settings("text", method), iters=2)
        out = tmp_path / method
        stage.quantize(models["text"], chosen, data, out, resume=False, progress=silent)
    assert asked == ["autoround"]
