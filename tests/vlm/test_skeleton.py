"""The model that a config describes, against the real one."""

from __future__ import annotations

import pytest
import tiny
import torch
from safetensors.torch import load_file

from qatbench.errors import ArtifactError, UsageError
from qatbench.vlm.load import Loaded
from qatbench.vlm.skeleton import skeleton


def test_names_and_shapes_are_those_of_the_model(any_model: Loaded) -> None:
    built = skeleton(any_model.folder.config)
    state = any_model.model.state_dict()
    assert built.shapes == {name: tuple(value.shape) for name, value in state.items()}
    inside = {n for n, m in any_model.model.named_modules() if isinstance(m, torch.nn.Linear)}
    assert built.linears.keys() == inside
    assert all(built.shapes[f"{name}.weight"] == size for name, size in built.linears.items())
    assert built.tied == {}


@pytest.mark.parametrize("family", list(tiny.SAVE))
def test_every_published_key_is_found_in_memory_and_by_vllm(
    family: str, every_model: dict[str, Loaded]
) -> None:
    loaded = every_model[family]
    arch, built = loaded.arch, skeleton(loaded.folder.config)
    for name in built.shapes:
        key = arch.file_key(name)
        found = [spelt for spelt in arch.spellings(key) if spelt in built.shapes]
        assert set(found) == {name}
        inside = arch.vllm_name(key).split(".", 1)[0]
        parts = {"visual", "vision_tower", "multi_modal_projector", "language_model"}
        assert not arch.is_vlm or inside in parts, key
    written = load_file(loaded.folder.path / "model.safetensors")
    assert all(any(s in built.shapes for s in arch.spellings(key)) for key in written)


def test_a_tied_head_is_told() -> None:
    config = {"model_type": "qwen2", "hidden_size": 64, "num_attention_heads": 2,
              "num_key_value_heads": 2, "num_hidden_layers": 1, "intermediate_size": 64,
              "vocab_size": 10, "tie_word_embeddings": True}  # fmt: skip
    assert skeleton(config).tied == {"lm_head.weight": "model.embed_tokens.weight"}
    assert skeleton(config | {"tie_word_embeddings": False}).tied == {}


def test_what_a_config_asks_for_beside_its_sizes_is_left_out() -> None:
    plain = {"model_type": "llava", "text_config": {"model_type": "llama"},
             "vision_config": {"model_type": "clip_vision_model"}}  # fmt: skip
    asking = {"auto_map": {"AutoConfig": "evil.Evil"}, "dtype": "none", "quantization_config": 3,
              "attn_implementation": "somebody/kernel"}  # fmt: skip
    assert skeleton(plain | asking) == skeleton(plain)
    assert skeleton(plain).image_token == 32000  # the class's own


def test_configs_that_describe_nothing() -> None:
    with pytest.raises(UsageError, match="not supported"):
        skeleton({"model_type": "bert"})
    with pytest.raises(ArtifactError, match="describes no qwen2 model"):
        skeleton({"model_type": "qwen2", "hidden_size": "wide"})
