"""How many weights a model has and what its checkpoint weighs, from its config alone. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from qatbench.errors import UsageError
from qatbench.vlm import layout


@dataclass(frozen=True)
class Counts:
    """Numbers of weights; `linears` are those that are quantized, the rest of `language` not."""

    linears: int
    language: int
    tower: int  # of the vision part, frozen
    projector: int  # of the vision part, trained

    @property
    def total(self) -> int:
        """All weights."""
        return self.language + self.tower + self.projector

    @property
    def trained(self) -> int:
        """What sft, kd, qat and grace update."""
        return self.language + self.projector


def count(config: Mapping[str, Any]) -> Counts:
    """Count the weights of a model of `config`.

    Raises: UsageError for an architecture that is not supported or a config without its sizes.
    """
    arch, text = layout.architecture(config), layout.text_sizes(config)
    shapes = layout.linear_shapes(config)
    linears = sum(map(prod, shapes.values()))
    hidden, layers = int(text["hidden_size"]), int(text["num_hidden_layers"])
    first = [shapes[f"{arch.layers}.0.{name}"] for name in layout.ATTENTION]
    rest = 2 * hidden * layers + hidden  # norms
    if arch.model_type in ("qwen2", "qwen2_vl", "qwen2_5_vl"):
        rest += layers * sum(out for out, _ in first[:3])
    elif text.get("attention_bias"):
        rest += layers * sum(out for out, _ in first)
    if arch.model_type in ("qwen3", "qwen3_vl"):  # norms of queries and keys
        rest += layers * 2 * int(text["head_dim"])
    try:
        words = int(text["vocab_size"]) * hidden * (1 if _tied(config, text) else 2)
        tower, projector = _VISION[arch.model_type](config, hidden) if arch.is_vlm else (0, 0)
    except KeyError as error:
        raise UsageError(f"config.json of a {arch.model_type} model lacks {error}") from error
    return Counts(linears, linears + rest + words, tower, projector)


def _tied(config: Mapping[str, Any], text: Mapping[str, Any]) -> bool:
    """Whether the head is the embedding."""
    return bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings", False)))


def _dense(width: int, out: int) -> int:
    return width * out + out


def _clip(config: Mapping[str, Any], hidden: int) -> tuple[int, int]:
    v = config["vision_config"]
    width, inner, patch = v["hidden_size"], v["intermediate_size"], v["patch_size"]
    places = (v["image_size"] // patch) ** 2 + 1
    layer = 4 * _dense(width, width) + _dense(width, inner) + _dense(inner, width) + 4 * width
    tower = v["num_hidden_layers"] * layer + width * (1 + 3 * patch**2 + places + 4)
    return tower, _dense(width, hidden) + _dense(hidden, hidden)


def _qwen2_tower(config: Mapping[str, Any], hidden: int) -> tuple[int, int]:
    v = config["vision_config"]
    width = v["embed_dim"]
    inner = int(width * v["mlp_ratio"])
    layer = 4 * _dense(width, width) + _dense(width, inner) + _dense(inner, width) + 4 * width
    merged = v["spatial_merge_size"] ** 2 * width
    merger = 2 * width + _dense(merged, merged) + _dense(merged, v["hidden_size"])
    return v["depth"] * layer + _patches(v) * width, merger


def _qwen2_5_tower(config: Mapping[str, Any], hidden: int) -> tuple[int, int]:
    v = config["vision_config"]
    width, inner = v["hidden_size"], v["intermediate_size"]
    mlp = 2 * _dense(width, inner) + _dense(inner, width)
    layer = 4 * _dense(width, width) + mlp + 2 * width
    merged = v["spatial_merge_size"] ** 2 * width
    merger = width + _dense(merged, merged) + _dense(merged, v["out_hidden_size"])
    return v["depth"] * layer + _patches(v) * width, merger


def _qwen3_tower(config: Mapping[str, Any], hidden: int) -> tuple[int, int]:
    v = config["vision_config"]
    width, inner = v["hidden_size"], v["intermediate_size"]
    layer = 4 * _dense(width, width) + _dense(width, inner) + _dense(inner, width) + 4 * width
    tower = v["depth"] * layer + (_patches(v) + 1 + v["num_position_embeddings"]) * width
    merged = v["spatial_merge_size"] ** 2 * width
    merger = _dense(merged, merged) + _dense(merged, v["out_hidden_size"])
    deep = len(v["deepstack_visual_indexes"]) * (merger + 2 * merged)
    return tower, merger + 2 * width + deep


def _patches(vision: Mapping[str, Any]) -> int:
    """Numbers in a patch of pixels."""
    channels = int(vision.get("in_channels", vision.get("in_chans", 3)))
    return channels * int(vision["temporal_patch_size"]) * int(vision["patch_size"]) ** 2


_VISION = {
    "llava": _clip,
    "qwen2_vl": _qwen2_tower,
    "qwen2_5_vl": _qwen2_5_tower,
    "qwen3_vl": _qwen3_tower,
}


def bits_per_weight(bits: int, group_size: int, width: int) -> float:
    """Stored bits a weight of a packed linear of `width` inputs: codes, 16-bit scales, zeros."""
    return bits + (16 + bits) / (width if group_size == -1 else group_size)


def stored(config: Mapping[str, Any], bits: int = 16, group_size: int = 128) -> float:
    """Bytes of a checkpoint: 16 bits a weight, below that the quantized linears packed."""
    plain = 2.0 * count(config).total
    if bits == 16:
        return plain
    return plain + sum(
        out * width * (bits_per_weight(bits, group_size, width) - 16) / 8
        for out, width in layout.linear_shapes(config).values()
    )


def decode_bytes(
    config: Mapping[str, Any], itemsize: int, batch: int, length: float, head: int | None = None
) -> float | None:
    """Bytes that one decoding step must move: language model once, cache of all rows once.

    Quantized linears count as they are stored, everything else at `itemsize` bytes a number; an
    embedding that is not the head as well is looked up and hardly moves, the vision part rests.

    Args:
        config: of the model, with its quantization_config.
        itemsize: bytes of an activation, of the cache and of what is not quantized.
        batch: rows.
        length: tokens of a row that lie in the cache.
        head: bytes of it that are read, if it is not all of them.

    Returns: None where the checkpoint's format does not say its bits.
    Raises: UsageError as `count`.
    """
    counts, text = count(config), layout.text_sizes(config)
    settings = config.get("quantization_config")
    rest = counts.language - counts.linears
    embedding = int(text["vocab_size"]) * int(text["hidden_size"])
    if not _tied(config, text):
        rest -= embedding
    shapes = layout.linear_shapes(config)
    linears = float(itemsize * counts.linears)
    if settings is not None:
        if "bits" not in settings or "group_size" not in settings:
            return None
        bits, group = int(settings["bits"]), int(settings["group_size"])
        stored_bits = (n * w * bits_per_weight(bits, group, w) for n, w in shapes.values())
        linears = sum(stored_bits) / 8
    if head is not None:
        linears, rest = linears + head, rest - embedding
    return linears + itemsize * rest + batch * length * cached_bytes(config, itemsize)


def cached_bytes(config: Mapping[str, Any], itemsize: int) -> int:
    """Bytes of the keys and values of one token, all layers, at `itemsize` bytes a number.

    Raises: UsageError for an architecture that is not supported or a config without its sizes.
    """
    name = f"{layout.architecture(config).layers}.0.self_attn.k_proj"
    layers = int(layout.text_sizes(config)["num_hidden_layers"])
    return 2 * itemsize * layout.linear_shapes(config)[name][0] * layers
