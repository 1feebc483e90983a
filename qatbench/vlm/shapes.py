"""Sizes of the public models that are asked for most, as their config.json has them: no download.

Only what decides shapes is kept. A model that is not here is read from its own config.json.
"""

from __future__ import annotations

from typing import Any

Sizes = dict[str, Any]


def _text(
    hidden: int, inner: int, layers: int, heads: int, kv_heads: int, vocabulary: int
) -> Sizes:
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
    }


def _llama(*sizes: int) -> Sizes:
    return _text(*sizes) | {"model_type": "llama", "tie_word_embeddings": True}


def _llava(*sizes: int) -> Sizes:
    """A Llama behind CLIP ViT-L/14 at 336 pixels."""
    clip = {
        "model_type": "clip_vision_model",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 336,
        "patch_size": 14,
        "projection_dim": 768,
    }
    return {
        "model_type": "llava",
        "text_config": _text(*sizes) | {"model_type": "llama"},
        "vision_config": clip,
        "image_token_index": 32000,
        "tie_word_embeddings": False,
    }


def _qwen(kind: str, *sizes: int, tied: bool, vision: Sizes) -> Sizes:
    """A Qwen of two dimensions of patches, merged by fours; flat as published before Qwen3-VL."""
    text = _text(*sizes)
    patches = {"num_heads": 16, "in_channels": 3, "spatial_merge_size": 2, "temporal_patch_size": 2}
    if kind == "qwen3_vl":
        text = {"text_config": text | {"model_type": "qwen3_vl_text", "head_dim": 128}}
    return text | {
        "model_type": kind,
        "vision_config": patches | vision,
        "image_token_id": 151655,
        "tie_word_embeddings": tied,
    }


def _qwen2_vl(*sizes: int, tied: bool) -> Sizes:
    tower = {"depth": 32, "embed_dim": 1280, "mlp_ratio": 4, "patch_size": 14}
    return _qwen("qwen2_vl", *sizes, tied=tied, vision=tower | {"hidden_size": sizes[0]})


def _qwen2_5_vl(*sizes: int, tied: bool) -> Sizes:
    tower = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "patch_size": 14}
    return _qwen("qwen2_5_vl", *sizes, tied=tied, vision=tower | {"out_hidden_size": sizes[0]})


def _qwen3_vl(*sizes: int, tied: bool, tower: tuple[int, int, int], deep: list[int]) -> Sizes:
    depth, width, inner = tower
    vision = {
        "depth": depth,
        "hidden_size": width,
        "intermediate_size": inner,
        "out_hidden_size": sizes[0],
        "patch_size": 16,
        "num_position_embeddings": 2304,
        "deepstack_visual_indexes": deep,
    }
    return _qwen("qwen3_vl", *sizes, tied=tied, vision=vision)


_SMALL, _LARGE = (24, 1024, 4096), (27, 1152, 4304)  # towers of Qwen3-VL
# hidden, inner, layers, heads, key-value heads, vocabulary
SHAPES: dict[str, Sizes] = {
    "llava-hf/llava-1.5-7b-hf": _llava(4096, 11008, 32, 32, 32, 32064),
    "llava-hf/llava-1.5-13b-hf": _llava(5120, 13824, 40, 40, 40, 32064),
    "Qwen/Qwen2-VL-2B-Instruct": _qwen2_vl(1536, 8960, 28, 12, 2, 151936, tied=True),
    "Qwen/Qwen2-VL-7B-Instruct": _qwen2_vl(3584, 18944, 28, 28, 4, 152064, tied=False),
    "Qwen/Qwen2.5-VL-3B-Instruct": _qwen2_5_vl(2048, 11008, 36, 16, 2, 151936, tied=True),
    "Qwen/Qwen2.5-VL-7B-Instruct": _qwen2_5_vl(3584, 18944, 28, 28, 4, 152064, tied=False),
    "Qwen/Qwen3-VL-2B-Instruct": _qwen3_vl(
        2048, 6144, 28, 16, 8, 151936, tied=True, tower=_SMALL, deep=[5, 11, 17]
    ),
    "Qwen/Qwen3-VL-4B-Instruct": _qwen3_vl(
        2560, 9728, 36, 32, 8, 151936, tied=True, tower=_SMALL, deep=[5, 11, 17]
    ),
    "Qwen/Qwen3-VL-8B-Instruct": _qwen3_vl(
        4096, 12288, 36, 32, 8, 151936, tied=False, tower=_LARGE, deep=[8, 16, 24]
    ),
    "HuggingFaceTB/SmolLM2-135M-Instruct": _llama(576, 1536, 30, 9, 3, 49152),
    "HuggingFaceTB/SmolLM2-360M-Instruct": _llama(960, 2560, 32, 15, 5, 49152),
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": _llama(2048, 8192, 24, 32, 32, 49152),
}


def known(name: str) -> Sizes | None:
    """Sizes of a public model by its hub id or short name (`LLaVA-1.5-7B`), else None."""
    return next((sizes for hub, sizes in SHAPES.items() if _short(hub) == _short(name)), None)


def _short(name: str) -> str:
    return name.rsplit("/", 1)[-1].lower().removesuffix("-hf").removesuffix("-instruct")
