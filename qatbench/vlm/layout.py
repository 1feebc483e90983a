"""Architecture facts as data: where the language model, its linears and the vision parts are.

No torch here: a recipe is checked against config.json alone. A new architecture is a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qatbench.errors import UsageError

ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


@dataclass(frozen=True)
class Architecture:
    """One model family; module names are those in memory (transformers 5)."""

    model_type: str
    auto_class: str
    model_class: str
    layers: str  # dotted name of the decoder layers' ModuleList
    text_config: str | None = None  # key of the language model's sizes in config.json
    vision: tuple[str, ...] = ()  # frozen, never quantized
    projector: tuple[str, ...] = ()  # trained, never quantized
    image_token_keys: tuple[str, ...] = ()  # config keys that hold the visual token's id
    linears: tuple[str, ...] = ATTENTION + MLP
    published: tuple[tuple[str, str], ...] = ()  # prefix in memory -> in published weight files

    @property
    def is_vlm(self) -> bool:
        """Whether the model sees images."""
        return bool(self.vision)

    @property
    def never_quantized(self) -> list[str]:
        """Skip list for the AWQ format, each prefix in transformers' and in vLLM's spelling."""
        parts = [*self.vision, *self.projector]
        both = [name for part in parts for name in (part.removeprefix("model."), part)]
        return [*both, "lm_head"]

    def file_key(self, name: str) -> str:
        """A tensor's name in weight files, spelled as the family's published checkpoints do.

        transformers, old and new, and vLLM read that spelling; vLLM does not read the names in
        memory of a CLIP tower (its own have a `vision_model` part).
        """
        for inside, outside in self.published:
            if name.startswith(inside):
                return outside + name.removeprefix(inside)
        return name


# Published LLaVA configs leave sizes out where they equal the language model's class defaults.
TEXT_DEFAULTS = {
    "llama": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
    }
}

_ROWS = (
    Architecture("llama", "AutoModelForCausalLM", "LlamaForCausalLM", "model.layers"),
    Architecture(
        "llava",
        "AutoModelForImageTextToText",
        "LlavaForConditionalGeneration",
        "model.language_model.layers",
        text_config="text_config",
        vision=("model.vision_tower",),
        projector=("model.multi_modal_projector",),
        image_token_keys=("image_token_id", "image_token_index"),
        published=(
            ("model.language_model.", "language_model.model."),
            ("lm_head.", "language_model.lm_head."),
            ("model.vision_tower.", "vision_tower.vision_model."),
            ("model.multi_modal_projector.", "multi_modal_projector."),
        ),
    ),
)
ARCHITECTURES = {row.model_type: row for row in _ROWS}


def architecture(config: Mapping[str, Any]) -> Architecture:
    """The row for a config.json.

    Raises: UsageError for an architecture that is not in the table.
    """
    name = config.get("model_type")
    if name not in ARCHITECTURES:
        raise UsageError(
            f"model type {name!r} is not supported",
            hint=f"supported: {', '.join(sorted(ARCHITECTURES))}",
        )
    return ARCHITECTURES[name]


def linear_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """(out, in) features of every linear that is quantized, by its name in memory.

    Raises: UsageError when the config lacks a size.
    """
    arch = architecture(config)
    text = config
    if arch.text_config:
        nested = config.get(arch.text_config) or {}
        text = TEXT_DEFAULTS.get(nested.get("model_type", "llama"), {}) | nested
    try:
        hidden, inner = int(text["hidden_size"]), int(text["intermediate_size"])
        heads, layers = int(text["num_attention_heads"]), int(text["num_hidden_layers"])
    except KeyError as error:
        raise UsageError(f"config.json of a {arch.model_type} model lacks {error}") from error
    kv = int(text.get("num_key_value_heads") or heads)
    head = int(text.get("head_dim") or hidden // heads)
    sizes = {
        "self_attn.q_proj": (heads * head, hidden),
        "self_attn.k_proj": (kv * head, hidden),
        "self_attn.v_proj": (kv * head, hidden),
        "self_attn.o_proj": (hidden, heads * head),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    names = [(f"{arch.layers}.{i}.{name}", name) for i in range(layers) for name in arch.linears]
    return {full: sizes[name] for full, name in names}


def grid_problems(config: Mapping[str, Any], bits: int, group_size: int) -> list[str]:
    """Why this grid cannot be used on this model: one line a kind of linear, [] when it can."""
    problems: dict[str, str] = {}
    for name, (out, width) in linear_shapes(config).items():
        kind = name.rsplit(".", 1)[-1]
        if group_size != -1 and width % group_size:
            problems.setdefault(
                kind, f"group_size {group_size} does not divide the {width} inputs of {name}"
            )
        elif (width * bits) % 32 or (out * bits) % 32:
            problems.setdefault(
                kind, f"{bits}-bit codes of {name} ({out} x {width}) do not fill 32-bit words"
            )
    return list(problems.values())
