"""Architecture facts as data: where the language model, its linears and the vision parts are.

No torch here: a recipe is checked against config.json alone. A new architecture is a row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from qatbench.errors import UsageError

ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""Linears that vLLM joins into one, which must therefore be quantized alike."""


@dataclass(frozen=True)
class Architecture:
    """One model family; module names are those in memory (transformers 5)."""

    model_type: str
    auto_class: str
    model_class: str
    layers: str  # dotted name of the decoder layers' ModuleList
    text_config: str | None = None  # key of the language model's sizes in config.json
    vision: tuple[str, ...] = ()  # frozen but for what of it is projector, never quantized
    projector: tuple[str, ...] = ()  # trained, never quantized; may lie inside `vision`
    image_token_keys: tuple[str, ...] = ()  # config keys that hold the visual token's id
    image_mark: str | None = None  # that token in the tokenizer
    mrope: bool = False  # positions are (time, height, width): arXiv:2409.12191, Sec. 2.1
    linears: tuple[str, ...] = ATTENTION + MLP
    published: tuple[tuple[str, str], ...] = ()  # prefix in memory -> in published weight files
    vllm: tuple[tuple[str, str], ...] = ()  # prefix in files or configs -> in vLLM 0.33

    @property
    def is_vlm(self) -> bool:
        """Whether the model sees images."""
        return bool(self.vision)

    @property
    def never_quantized(self) -> list[str]:
        """Skip list for the AWQ format, each prefix in transformers' and in vLLM's spelling."""
        parts = [*self.vision, *(p for p in self.projector if not under(p, self.vision))]
        both = [name for part in parts for name in (part.removeprefix("model."), part)]
        return [*both, "lm_head"]

    def frozen(self, name: str) -> bool:
        """Whether training leaves a parameter as it is: the vision tower without its projector."""
        return under(name, self.vision) and not under(name, self.projector)

    def file_key(self, name: str) -> str:
        """A tensor's name in weight files, spelled as the family's published checkpoints do.

        transformers, old and new, and vLLM read that spelling; vLLM does not read the names in
        memory of a CLIP tower (its own have a `vision_model` part).
        """
        return _renamed(name, self.published)

    def vllm_name(self, key: str) -> str:
        """What vLLM makes of a name in a weight file or in a list of its config."""
        return _renamed(key, self.vllm)

    def spellings(self, key: str) -> list[str]:
        """Names in memory that transformers looks for when a weight file says `key`."""
        inside = [a + key.removeprefix(b) for a, b in self.published if key.startswith(b)]
        plain = key.replace(".vision_model.", ".")
        return [key, *inside, plain, f"model.{plain}", plain.removeprefix("model.")]


def _renamed(name: str, pairs: Sequence[tuple[str, str]]) -> str:
    for old, new in pairs:
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def under(name: str, parts: Sequence[str]) -> bool:
    """Whether a dotted name is that of one of the modules, or of something inside one."""
    return any(name == part or name.startswith(f"{part}.") for part in parts)


# Sizes that config.json may leave out because they equal the class defaults of the language model,
# by architecture, for language models of that type. Published LLaVA configs have hardly any.
TEXT_DEFAULTS: dict[str, tuple[str, dict[str, int]]] = {
    "llava": (
        "llama",
        {
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_attention_heads": 32,
            "num_hidden_layers": 32,
        },
    ),
    "qwen3": ("qwen3", {"head_dim": 128}),
    "qwen3_vl": ("qwen3_vl_text", {"head_dim": 128}),
}

_QWEN2_VL = Architecture(
    "qwen2_vl",
    "AutoModelForImageTextToText",
    "Qwen2VLForConditionalGeneration",
    "model.language_model.layers",
    text_config="text_config",
    vision=("model.visual",),
    projector=("model.visual.merger",),
    image_token_keys=("image_token_id",),
    image_mark="<|image_pad|>",
    mrope=True,
    published=(("model.language_model.", "model."), ("model.visual.", "visual.")),
    vllm=(
        ("model.language_model.", "language_model.model."),
        ("model.visual.", "visual."),
        ("lm_head.", "language_model.lm_head."),
        ("model.", "language_model.model."),
    ),
)
_ROWS = (
    Architecture("llama", "AutoModelForCausalLM", "LlamaForCausalLM", "model.layers"),
    Architecture("qwen2", "AutoModelForCausalLM", "Qwen2ForCausalLM", "model.layers"),
    Architecture("qwen3", "AutoModelForCausalLM", "Qwen3ForCausalLM", "model.layers"),
    Architecture(
        "llava",
        "AutoModelForImageTextToText",
        "LlavaForConditionalGeneration",
        "model.language_model.layers",
        text_config="text_config",
        vision=("model.vision_tower",),
        projector=("model.multi_modal_projector",),
        image_token_keys=("image_token_id", "image_token_index"),
        image_mark="<image>",
        published=(
            ("model.language_model.", "language_model.model."),
            ("lm_head.", "language_model.lm_head."),
            ("model.vision_tower.", "vision_tower.vision_model."),
            ("model.multi_modal_projector.", "multi_modal_projector."),
        ),
        vllm=(
            ("model.language_model.", "language_model.model."),
            ("model.vision_tower.", "vision_tower."),
            ("model.multi_modal_projector.", "multi_modal_projector."),
            ("lm_head.", "language_model.lm_head."),
        ),
    ),
    _QWEN2_VL,
    replace(_QWEN2_VL, model_type="qwen2_5_vl", model_class="Qwen2_5_VLForConditionalGeneration"),
    replace(
        _QWEN2_VL,
        model_type="qwen3_vl",
        model_class="Qwen3VLForConditionalGeneration",
        projector=("model.visual.merger", "model.visual.deepstack_merger_list"),
        published=(),  # in the files as in memory
    ),
)
ARCHITECTURES = {row.model_type: row for row in _ROWS}


def architecture(config: Mapping[str, Any]) -> Architecture:
    """The row for a config.json.

    Raises: UsageError for an architecture that is not in the table.
    """
    name = config.get("model_type")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise UsageError(
            f"model type {name!r} is not supported",
            hint=f"supported: {', '.join(sorted(ARCHITECTURES))}",
        )
    return ARCHITECTURES[name]


def text_sizes(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a config.json with the language model's sizes, the class's defaults filled in.

    transformers 5 nests it in a VLM's config; published Qwen2-VL and Qwen2.5-VL files are flat.

    Raises: UsageError for an architecture that is not in the table.
    """
    arch = architecture(config)
    nested = config.get(arch.text_config) if arch.text_config else None
    text = dict(config if nested is None else nested)
    kind, defaults = TEXT_DEFAULTS.get(arch.model_type, ("", {}))
    return defaults | text if text.get("model_type", kind) == kind else text


def most_positions(config: Mapping[str, Any]) -> int | None:
    """Tokens that the language model has positions for; None where its config does not say."""
    most = text_sizes(config).get("max_position_embeddings")
    return None if most is None else int(most)


def linear_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """(out, in) features of every linear that is quantized, by its name in memory.

    Raises: UsageError when the config lacks a size.
    """
    arch, text = architecture(config), text_sizes(config)
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


def image_token(config: Mapping[str, Any]) -> int | None:
    """Id of the token that stands for a piece of an image, None for a text model.

    Raises: UsageError when the config of a VLM does not say it.
    """
    keys = architecture(config).image_token_keys
    named = [config[key] for key in keys if config.get(key) is not None]
    if keys and not named:
        raise UsageError(f"config.json names no image token: {' or '.join(keys)} is missing")
    return int(named[0]) if named else None


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
