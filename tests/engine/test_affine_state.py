"""Packed checkpoints read without being multiplied out: the same values, and no memory for them."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from engine_types import Packs
from safetensors.torch import load_file, save_file
from torch import Tensor

from qatbench.engine.plain import held_bytes
from qatbench.errors import ArtifactError, UsageError
from qatbench.quant.packing import Affine
from qatbench.vlm import load as models
from qatbench.vlm.hollow import load_around
from qatbench.vlm.load import ModelFolder
from qatbench.vlm.packed import affine_state, dequantized_state

WEIGHTS = "model.safetensors"
LINEARS = 7 * tiny.LAYERS
Change = Callable[[dict[str, Tensor]], Mapping[str, Tensor]]
Copy = Callable[[ModelFolder, Change], Path]


@pytest.fixture
def changed(tmp_path: Path) -> Copy:
    """A copy of a checkpoint, other tensors in its file."""

    def one(folder: ModelFolder, change: Change) -> Path:
        path = Path(shutil.copytree(folder.path, tmp_path / "changed"))
        tensors = dict(change(load_file(path / WEIGHTS)))
        save_file(tensors, path / WEIGHTS, metadata={"format": "pt"})
        return path

    return one


def settings(folder: ModelFolder, **more: Any) -> dict[str, Any]:
    assert folder.quantization
    return folder.quantization | more


def any_zeros(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Zero points of all kinds, v1's carries among them."""
    generator = torch.Generator().manual_seed(0)
    for name, value in tensors.items():
        if name.endswith(".qzeros"):
            bits = torch.randint(-(2**31), 2**31, value.shape, generator=generator)
            tensors[name] = bits.to(torch.int32)
    return tensors


def multiplied(a: Affine) -> Tensor:
    groups = a.fields.reshape(*a.zeros.shape, -1).float()
    return ((groups - a.zeros.float()[..., None]) * a.scales.float()[..., None]).flatten(1)


@pytest.mark.parametrize("family", ["text", "llava"])
@pytest.mark.parametrize("kind", ["gptq v1", "gptq v2", "awq"])
@pytest.mark.parametrize("change", [dict, any_zeros], ids=["as made", "any zeros"])
def test_values_are_those_of_the_dense_state_bit_for_bit(
    family: str, kind: str, change: Change, pack: Packs, changed: Copy
) -> None:
    method, _, version = kind.partition(" ")
    folder = pack(family, method)
    told = settings(folder, checkpoint_format=f"gptq_{version}") if version else settings(folder)
    path = changed(folder, change)
    dense = dequantized_state(path, told)
    rest, packed = affine_state(path, told, folder.arch, "cpu")
    assert rest.keys() == dense.keys()
    assert len(packed) == LINEARS
    zeros = torch.cat([affine.zeros.flatten() for affine in packed.values()])
    made = {"gptq": {1}, "awq": set(range(2, 17))}[method]  # this project's AWQ is asymmetric
    assert len(zeros.unique()) in (made if change is dict else {16})
    in_files = {name: key for key in rest for name in folder.arch.spellings(key)}
    model = models.load(folder, device="cpu", dtype=torch.float32, kernel="dense").model
    for name, affine in packed.items():
        key = in_files[f"{name}.weight"]
        weight = dense.pop(key)
        assert torch.equal(multiplied(affine), weight)
        assert model.get_submodule(name).weight.shape == weight.shape == rest[key].shape
        assert rest[key].untyped_storage().nbytes() == 2  # one number for all of them
    for key, value in dense.items():  # what is not packed
        assert torch.equal(rest[key], value), key


def test_a_model_around_empty_linears_has_all_else(pack: Packs) -> None:
    folder = pack("llava", "gptq")
    whole = models.load(folder, device="cpu", dtype=torch.float32, kernel="dense").model
    state, packed = affine_state(folder.path, settings(folder), folder.arch, "cpu")
    around = load_around(folder, state, packed, "cpu", torch.float32)
    assert around.kernel == "packed"
    weights = {f"{name}.weight" for name in packed}
    found = dict(around.model.named_parameters())
    for name, value in whole.named_parameters():
        if name in weights:
            assert found.pop(name).numel() == 0
        else:
            assert torch.equal(found.pop(name), value), name
    assert not found
    dense = sum(affine.fields.numel() * 4 for affine in packed.values())
    assert held_bytes(around.model) == held_bytes(whole) - dense


def test_inputs_that_are_not_grouped_in_order_are_refused(pack: Packs, changed: Copy) -> None:
    folder = pack("text", "gptq")

    def reorder(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        name = "model.layers.1.mlp.down_proj.g_idx"
        return tensors | {name: tensors[name].flip(0).contiguous()}

    path = changed(folder, reorder)
    assert dequantized_state(path, settings(folder))  # readable, but not by the kernels
    with pytest.raises(UsageError, match=r"layers\.1\.mlp\.down_proj: g_idx .* \(desc_act\)") as e:
        affine_state(path, settings(folder), folder.arch, "cpu")
    assert e.value.hint == "--engine transformers"


@pytest.mark.parametrize("family", ["text", "llava"])
def test_a_packed_linear_outside_the_layers_is_refused(
    family: str, pack: Packs, changed: Copy
) -> None:
    folder = pack(family, "gptq")
    layers = folder.arch.layers

    def add(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        one = next(key for key in tensors if key.endswith("0.mlp.down_proj.qweight"))
        parts = ("qweight", "qzeros", "scales", "g_idx")
        old = one.removesuffix("qweight")
        return tensors | {f"lm_head.{part}": tensors[old + part].clone() for part in parts}

    path = changed(folder, add)
    with pytest.raises(ArtifactError, match=f"lm_head is packed and is no linear of {layers}"):
        affine_state(path, settings(folder), folder.arch, "cpu")


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"quant_method": "bitsandbytes"}, "cannot unpack 4-bit bitsandbytes"),
        ({"quant_method": "awq"}, "cannot unpack 4-bit awq"),  # AWQ has no g_idx
        ({"quant_method": "awq", "bits": 3}, "cannot unpack 3-bit awq"),
    ],
)
def test_formats_that_nobody_here_writes_are_refused(
    wrong: dict[str, Any], told: str, pack: Packs
) -> None:
    folder = pack("text", "gptq")
    with pytest.raises(ArtifactError, match=told):
        affine_state(folder.path, settings(folder, **wrong), folder.arch, "cpu")


def test_torn_weights_are_told(pack: Packs, changed: Copy) -> None:
    folder = pack("text", "gptq")
    path = changed(folder, dict)
    (path / WEIGHTS).write_bytes((path / WEIGHTS).read_bytes()[:1000])
    with pytest.raises(ArtifactError, match="damaged weights"):
        affine_state(path, settings(folder), folder.arch, "cpu")
