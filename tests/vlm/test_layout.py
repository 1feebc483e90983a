"""The architecture table against real models."""

from __future__ import annotations

import pytest
import tiny
import torch
from safetensors.torch import load_file

from qatbench.errors import UsageError
from qatbench.vlm import layout
from qatbench.vlm.load import Loaded


def test_shapes_from_the_config_are_those_of_the_model(any_model: Loaded) -> None:
    shapes = layout.linear_shapes(any_model.folder.config)
    inside = {
        name: tuple(module.weight.shape)
        for name, module in any_model.model.named_modules()
        if isinstance(module, torch.nn.Linear) and name.startswith(any_model.arch.layers)
    }
    assert shapes == inside
    assert len(shapes) == 14


@pytest.mark.parametrize("family", ["llava", *tiny.QWEN_VLMS])
def test_names_of_vision_parts_cover_everything_else(
    family: str, every_model: dict[str, Loaded]
) -> None:
    arch, names = every_model[family].arch, list(every_model[family].model.state_dict())
    parts = (*arch.vision, *arch.projector, "model.language_model.", "lm_head.")
    assert all(name.startswith(parts) for name in names)
    assert all(any(n.startswith(p) for n in names) for p in parts)
    trained = [n for n in names if not arch.frozen(n)]
    assert {n for n in names if n.startswith(arch.projector)} <= set(trained)
    assert any(arch.frozen(n) for n in names)
    assert not any(arch.frozen(n) for n in names if n.startswith(parts[-2:]))


def test_the_awq_skip_list_has_both_spellings(llava: Loaded) -> None:
    assert set(llava.arch.never_quantized) == {
        "vision_tower",
        "model.vision_tower",
        "multi_modal_projector",
        "model.multi_modal_projector",
        "lm_head",
    }


@pytest.mark.parametrize("family", tiny.QWEN_VLMS)
def test_the_merger_is_not_listed_beside_its_tower(family: str) -> None:
    # LOADING: "visual" alone is NaN in transformers, "model.visual" alone breaks vLLM
    arch = layout.architecture({"model_type": family})
    assert arch.never_quantized == ["visual", "model.visual", "lm_head"]


@pytest.mark.parametrize("family", tiny.QWEN_VLMS)
def test_a_merger_inside_the_tower_is_trained(family: str) -> None:
    arch = layout.architecture({"model_type": family})
    assert arch.frozen("model.visual.blocks.0.attn.qkv.weight")
    assert arch.frozen("model.visual.patch_embed.proj.weight")
    assert not arch.frozen("model.visual.merger.mlp.0.weight")
    deep = arch.frozen("model.visual.deepstack_merger_list.0.linear_fc1.weight")
    assert deep == (family != "qwen3_vl")  # the others have no such part
    assert not arch.frozen("model.language_model.layers.0.self_attn.q_proj.weight")


@pytest.mark.parametrize("family", [*tiny.QWEN_TEXT, *tiny.QWEN_VLMS])
def test_qwen_file_keys_are_those_that_the_library_writes(
    family: str, every_model: dict[str, Loaded]
) -> None:
    loaded = every_model[family]
    written = load_file(loaded.folder.path / "model.safetensors").keys()
    assert {loaded.arch.file_key(name) for name in loaded.model.state_dict()} == written
    # As in the model.safetensors.index.json of Qwen2-VL-2B, Qwen2.5-VL-3B and Qwen3-VL-2B.
    deeper = "model.language_model" if family == "qwen3_vl" else "model"
    assert f"{deeper}.layers.0.self_attn.q_proj.weight" in written
    assert f"{deeper}.embed_tokens.weight" in written
    if loaded.arch.is_vlm:
        tower = "model.visual" if family == "qwen3_vl" else "visual"
        assert f"{tower}.patch_embed.proj.weight" in written
        assert {n for n in written if "visual" in n} == {n for n in written if n.startswith(tower)}


# Sizes of published config.json files; Qwen2-VL and Qwen2.5-VL have them at the top.
QWEN2_VL_2B = {
    "model_type": "qwen2_vl",
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_attention_heads": 12,
    "num_hidden_layers": 28,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "image_token_id": 151655,
    "vision_config": {"depth": 32, "embed_dim": 1280, "hidden_size": 1536, "num_heads": 16},
}
QWEN3_VL_2B = {
    "model_type": "qwen3_vl",
    "text_config": {
        "model_type": "qwen3_vl_text",
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_attention_heads": 16,
        "num_hidden_layers": 28,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
    },
    "image_token_id": 151655,
}


def test_flat_and_nested_configs_give_the_same_shapes() -> None:
    flat = layout.linear_shapes(QWEN2_VL_2B)
    nested = {key: QWEN2_VL_2B[key] for key in ("model_type", "vision_config", "image_token_id")}
    rest = {k: v for k, v in QWEN2_VL_2B.items() if k not in nested}
    nested["text_config"] = rest | {"model_type": "qwen2_vl_text"}
    assert flat == layout.linear_shapes(nested)
    assert flat["model.language_model.layers.27.self_attn.k_proj"] == (256, 1536)
    assert flat["model.language_model.layers.0.mlp.down_proj"] == (1536, 8960)
    assert layout.text_sizes(QWEN2_VL_2B)["vocab_size"] == 151936
    assert layout.text_sizes(nested)["vocab_size"] == 151936
    assert layout.image_token(QWEN2_VL_2B) == 151655


@pytest.mark.parametrize("config", [QWEN2_VL_2B, QWEN3_VL_2B])
def test_published_sizes_take_groups_of_128(config: dict[str, object]) -> None:
    for bits in (2, 3, 4, 8):
        assert layout.grid_problems(config, bits, 128) == []


def test_heads_of_qwen3_have_the_width_of_their_class_where_it_is_left_out() -> None:
    # transformers' Qwen3Config and Qwen3VLTextConfig: head_dim=128, whatever hidden_size / heads
    text = {k: v for k, v in QWEN3_VL_2B["text_config"].items() if k != "head_dim"}  # type: ignore[attr-defined]
    text |= {"hidden_size": 1024}  # 64 a head, were it not for the class
    for config in (
        QWEN3_VL_2B | {"text_config": text},
        QWEN3_VL_2B | {"text_config": {k: v for k, v in text.items() if k != "model_type"}},
        text | {"model_type": "qwen3"},
    ):
        shapes = layout.linear_shapes(config)
        assert {s for n, s in shapes.items() if n.endswith("q_proj")} == {(2048, 1024)}
    with pytest.raises(UsageError, match="num_attention_heads"):
        layout.linear_shapes({"model_type": "qwen3", "hidden_size": 64, "intermediate_size": 64})


def test_a_vlm_whose_config_names_no_image_token_is_refused() -> None:
    assert layout.image_token({"model_type": "qwen2"}) is None
    assert layout.image_token({"model_type": "llava", "image_token_index": 0}) == 0
    with pytest.raises(UsageError, match="image_token_id"):
        layout.image_token({"model_type": "qwen3_vl"})


def test_file_keys_are_those_of_published_checkpoints(llava: Loaded) -> None:
    # Names as in llava-hf/llava-1.5-7b-hf, model.safetensors.index.json.
    keys = {llava.arch.file_key(name) for name in llava.model.state_dict()}
    assert len(keys) == len(llava.model.state_dict())
    assert {
        "language_model.lm_head.weight",
        "language_model.model.embed_tokens.weight",
        "language_model.model.layers.0.self_attn.q_proj.weight",
        "language_model.model.norm.weight",
        "multi_modal_projector.linear_1.bias",
        "vision_tower.vision_model.embeddings.class_embedding",
        "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.weight",
        "vision_tower.vision_model.pre_layrnorm.weight",
    } <= keys


def test_grids_that_do_not_fit_are_named() -> None:
    config = {
        "model_type": "llama",
        "hidden_size": 96,
        "intermediate_size": 128,
        "num_attention_heads": 3,
        "num_hidden_layers": 1,
    }
    assert layout.grid_problems(config, 4, 32) == []
    (problem,) = {text.split(" ")[0:2].__repr__() for text in layout.grid_problems(config, 4, 64)}
    assert "group_size" in problem
    assert layout.grid_problems(config | {"intermediate_size": 100}, 3, -1)


def test_unknown_architectures_and_missing_sizes_are_usage_errors() -> None:
    with pytest.raises(UsageError, match="not supported"):
        layout.architecture({"model_type": "mamba"})
    with pytest.raises(UsageError, match="hidden_size"):
        layout.linear_shapes({"model_type": "llama"})
