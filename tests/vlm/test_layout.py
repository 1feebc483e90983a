"""The architecture table against real models."""

from __future__ import annotations

import pytest
import torch

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


def test_names_of_vision_parts_cover_everything_else(llava: Loaded) -> None:
    arch = llava.arch
    parts = (*arch.vision, *arch.projector, "model.language_model.", "lm_head.")
    assert all(name.startswith(parts) for name in llava.model.state_dict())
    assert all(any(n.startswith(p) for n in llava.model.state_dict()) for p in parts)


def test_the_awq_skip_list_has_both_spellings(llava: Loaded) -> None:
    assert set(llava.arch.never_quantized) == {
        "vision_tower",
        "model.vision_tower",
        "multi_modal_projector",
        "model.multi_modal_projector",
        "lm_head",
    }


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
