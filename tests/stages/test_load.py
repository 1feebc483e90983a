"""Finding and loading model folders, damaged ones above all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import Make

from qatbench import store
from qatbench.errors import ArtifactError, PrerequisiteError, QatbenchError, UsageError
from qatbench.vlm.load import ModelFolder, find, load, pick_device, pick_dtype

WEIGHTS = "model.safetensors"


@pytest.fixture
def text(models: dict[str, ModelFolder], tmp_path: Path) -> Path:
    return Path(shutil.copytree(models["text"].path, tmp_path / "text"))


@pytest.fixture
def packed(make: Make, tmp_path: Path) -> Path:
    return Path(shutil.copytree(make("llava", "rtn", 4).path, tmp_path / "packed"))


def opened(path: Path, kernel: str) -> None:
    load(find(str(path)), device="cpu", dtype=torch.float32, kernel=kernel)


@pytest.mark.parametrize(
    ("gone", "words"),
    [
        ("config.json", "no config.json"),
        (WEIGHTS, "no safetensors"),
        ("tokenizer.json", "no tokenizer"),
    ],
)
def test_a_folder_without_a_part_is_refused(text: Path, gone: str, words: str) -> None:
    (text / gone).unlink()
    with pytest.raises(PrerequisiteError, match=words):
        find(str(text))


def test_a_vlm_without_its_processor_or_template_is_refused(packed: Path) -> None:
    (packed / "processor_config.json").unlink()
    with pytest.raises(PrerequisiteError, match="no processor"):
        find(str(packed))


def test_pickled_weights_are_never_loaded(text: Path) -> None:
    torch.save({}, text / "pytorch_model.bin")
    (text / WEIGHTS).unlink()
    with pytest.raises(PrerequisiteError, match="safetensors"):
        find(str(text))


def test_names_that_are_nothing_and_odd_architectures(text: Path) -> None:
    with pytest.raises(PrerequisiteError, match="no model at"):
        find("./nowhere")
    (text / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(UsageError, match="not supported"):
        find(str(text))
    (text / "config.json").write_text("{")
    with pytest.raises(ArtifactError, match="cannot read"):
        find(str(text))


def test_weights_missing_left_over_or_torn(text: Path) -> None:
    whole = load_file(text / WEIGHTS)
    less = {key: value for key, value in whole.items() if key != "model.norm.weight"}
    more = whole | {"model.layers.0.extra.weight": torch.ones(2)}
    for tensors, words in ((less, "missing keys"), (more, "unexpected keys")):
        save_file(tensors, text / WEIGHTS, metadata={"format": "pt"})
        with pytest.raises(ArtifactError, match=words):
            opened(text, "dense")
    save_file(whole, text / WEIGHTS, metadata={"format": "pt"})
    data = (text / WEIGHTS).read_bytes()
    (text / WEIGHTS).write_bytes(data[: len(data) // 2])
    with pytest.raises(ArtifactError, match="cannot load"):
        opened(text, "dense")


DOWN = "language_model.model.layers.0.mlp.down_proj"


@pytest.mark.parametrize("kernel", ["library", "dense"])
@pytest.mark.parametrize(
    "key",
    [
        f"{DOWN}.qzeros",
        f"{DOWN}.scales",
        "vision_tower.vision_model.pre_layrnorm.weight",
        "language_model.lm_head.weight",
    ],
)
def test_a_packed_checkpoint_with_a_tensor_missing_does_not_load(
    packed: Path, key: str, kernel: str
) -> None:
    tensors = load_file(packed / WEIGHTS)
    del tensors[key]
    save_file(tensors, packed / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ArtifactError):
        opened(packed, kernel)


@pytest.mark.parametrize("kernel", ["library", "dense"])
def test_packed_tensors_of_another_shape_do_not_load(packed: Path, kernel: str) -> None:
    tensors = load_file(packed / WEIGHTS)
    tensors[f"{DOWN}.scales"] = tensors[f"{DOWN}.scales"][:1].clone()
    save_file(tensors, packed / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(QatbenchError) as caught:
        opened(packed, kernel)
    assert caught.value.exit_code in (4, 5)


def test_dense_loading_refuses_formats_it_does_not_know(packed: Path) -> None:
    config = store.read_json(packed / "config.json")
    config["quantization_config"]["quant_method"] = "bitsandbytes"
    store.write_json(packed / "config.json", config)
    with pytest.raises(ArtifactError, match="cannot unpack 4-bit bitsandbytes"):
        opened(packed, "dense")


def test_a_fingerprint_follows_the_bytes_or_the_provenance(text: Path, packed: Path) -> None:
    before = find(str(text)).fingerprint()
    assert before == find(str(text)).fingerprint()
    weights = load_file(text / WEIGHTS)
    weights["model.norm.weight"][0] += 1
    save_file(weights, text / WEIGHTS, metadata={"format": "pt"})
    assert find(str(text)).fingerprint() != before
    made = store.read_json(packed / store.PROVENANCE)["fingerprint"]
    assert find(str(packed)).fingerprint() == made


def test_dtypes_and_devices_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert pick_dtype(None, "cpu") == torch.float32
    assert pick_dtype(None, "cuda") == torch.bfloat16
    assert pick_dtype("float16", "cpu") == torch.float16
    for name in ("int8", "nonsense", "Tensor"):
        with pytest.raises(UsageError, match=name):
            pick_dtype(name, "cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device(None) == "cpu"
    with pytest.raises(PrerequisiteError, match="CUDA"):
        pick_device("cuda:0")


def test_a_kernel_that_cannot_be_downloaded_is_no_damage(
    text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(*args: object) -> None:
        raise URLError("no name resolution")

    monkeypatch.setattr("qatbench.vlm.load._load_plain", offline)
    with pytest.raises(PrerequisiteError, match="cannot be downloaded: no name resolution") as told:
        load(find(str(text)), device="cpu", dtype=torch.float32)
    assert "--kernel dense" in str(told.value.hint)
