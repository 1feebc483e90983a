"""Defects planted into sound tiny checkpoints, and the findings that each must give."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import tiny
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qatbench.quant.fields import pack_fields
from qatbench.quant.grid import Grid, quantize, search_scales
from qatbench.quant.packing import dequantize_awq, dequantize_gptq
from qatbench.quant.result import QuantizedLinear
from qatbench.stages.proof import RELOAD_BOUND

WEIGHTS = "model.safetensors"
Config = dict[str, Any]
Tensors = dict[str, Tensor]
Plant = Callable[[Path], None]

QWEN = "model.layers.{}"  # as published: Qwen2-VL and Qwen2.5-VL
QWEN3 = "model.language_model.layers.{}"
LLAVA = "language_model.model.layers.{}"
DOWN, QUERY = "mlp.down_proj", "self_attn.q_proj"


class Case(NamedTuple):
    """One planted defect."""

    name: str
    base: str  # family-format
    plant: Plant
    rules: set[str]  # defects, all of them
    alike: Plant | None = None  # what the repaired copy must answer like; None: the sound one
    repairable: bool = True
    within: float = 1e-5  # of the logits' spread


# --- planting -----------------------------------------------------------------------------------


def config(change: Callable[[Config], object]) -> Plant:
    def plant(folder: Path) -> None:
        path = folder / "config.json"
        value = json.loads(path.read_text())
        change(value)
        path.write_text(json.dumps(value))

    return plant


def says(**entries: object) -> Plant:
    """Entries of quantization_config."""
    return config(lambda c: c["quantization_config"].update(entries))


def silent_on(*keys: str) -> Plant:
    return config(lambda c: [c["quantization_config"].pop(key) for key in keys])


def tensors(change: Callable[[Tensors], object]) -> Plant:
    def plant(folder: Path) -> None:
        held = load_file(folder / WEIGHTS)
        change(held)
        save_file({k: v.contiguous() for k, v in held.items()}, folder / WEIGHTS, {"format": "pt"})

    return plant


def without(suffix: str) -> Plant:
    return tensors(lambda t: [t.pop(key) for key in list(t) if key.endswith(suffix)])


def each(suffix: str, change: Callable[[Tensor], Tensor]) -> Plant:
    return tensors(lambda t: t.update({k: change(v) for k, v in t.items() if k.endswith(suffix)}))


def renamed(old: str, new: str) -> Plant:
    def change(held: Tensors) -> None:
        for key in [key for key in held if key.startswith(old)]:
            held[new + key.removeprefix(old)] = held.pop(key)

    return tensors(change)


def both(*plants: Plant) -> Plant:
    def plant(folder: Path) -> None:
        for one in plants:
            one(folder)

    return plant


def gone(*names: str) -> Plant:
    return lambda folder: [(folder / name).unlink() for name in names] and None


def unpacked(name: str) -> Plant:
    """A packed linear as the 16-bit weights that it stands for."""

    def change(held: Tensors) -> None:
        found = ("qweight", "qzeros", "scales", "g_idx")
        parts = {p: held.pop(f"{name}.{p}") for p in found if f"{name}.{p}" in held}
        held[f"{name}.weight"] = (
            dequantize_gptq(parts, 4, tiny.GROUP)
            if "g_idx" in parts
            else dequantize_awq(*parts.values(), group_size=tiny.GROUP)
        ).to(torch.bfloat16)

    return tensors(change)


def on_grid(weight: Tensor, group_size: int = tiny.GROUP, bits: int = 4) -> QuantizedLinear:
    grid = Grid(bits, group_size)
    scales = search_scales(weight.float(), grid)
    return QuantizedLinear.from_codes(quantize(weight.float(), scales, grid), scales, grid)


def packed(suffix: str, layout: str = "gptq") -> Plant:
    """16-bit linears packed, rounded to nearest."""

    def change(held: Tensors) -> None:
        for key in [key for key in held if key.endswith(f"{suffix}.weight")]:
            linear = on_grid(held.pop(key))
            for part, value in linear.packed(layout, key).items():
                held[f"{key.removesuffix('.weight')}.{part}"] = value

    return tensors(change)


def whole_rows(held: Tensors) -> None:
    """Every packed linear with one scale a row."""
    for key in [key for key in held if key.endswith(".qweight")]:
        name = key.removesuffix(".qweight")
        parts = {p: held.pop(f"{name}.{p}") for p in ("qweight", "qzeros", "scales", "g_idx")}
        linear = on_grid(dequantize_gptq(parts, 4, tiny.GROUP), -1)
        held |= {f"{name}.{part}": value for part, value in linear.packed("gptq", name).items()}


def five_bits(held: Tensors) -> None:
    for key in held:
        if key.endswith("qweight"):
            held[key] = torch.zeros(held[key].shape[0] * 5 // 4, held[key].shape[1]).int()
        if key.endswith("qzeros"):
            held[key] = torch.zeros(held[key].shape[0], held[key].shape[1] * 5 // 4).int()


def awq_at(bits: int) -> Plant:
    """AWQ as gptqmodel packs it at other widths than 4: the words of GPTQ v2, by rows of inputs."""

    def change(held: Tensors) -> None:
        for key in [key for key in held if key.endswith(".qweight")]:
            name = key.removesuffix(".qweight")
            parts = [held.pop(f"{name}.{part}") for part in ("qweight", "qzeros", "scales")]
            linear = on_grid(dequantize_awq(*parts, group_size=tiny.GROUP), bits=bits)
            held[f"{name}.qweight"] = pack_fields(linear.fields, bits).T
            held[f"{name}.qzeros"] = pack_fields(linear.zeros, bits).T
            held[f"{name}.scales"] = linear.scales.half().T

    return both(says(bits=bits), tensors(change))


def rounded(suffix: str) -> Plant:
    """The same linears with the values that packing gives them, in 16 bits."""
    return each(f"{suffix}.weight", lambda w: on_grid(w).dense().to(torch.bfloat16))


def shards(change: Callable[[Path, dict[str, Any]], object], *, named: bool = True) -> Plant:
    """The weights in two files; `change` gets folder and index."""

    def plant(folder: Path) -> None:
        held = load_file(folder / WEIGHTS)
        (folder / WEIGHTS).unlink()
        keys, places = sorted(held), {}
        for number, some in enumerate((keys[::2], keys[1::2]), start=1):
            name = f"model-0000{number}-of-00002.safetensors"
            save_file({key: held[key] for key in some}, folder / name, {"format": "pt"})
            places |= dict.fromkeys(some, name)
        index = {"metadata": {"total_size": 0}, "weight_map": places}
        change(folder, index)
        if named:
            (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    return plant


def forget_the_second(folder: Path, index: dict[str, Any]) -> None:
    places = index["weight_map"]
    index["weight_map"] = {k: v for k, v in places.items() if "00001-of" in v}


def settings_beside(folder: Path) -> None:
    """AutoGPTQ's way: the settings are in a file of their own, which does not say gptq."""
    path = folder / "config.json"
    value = json.loads(path.read_text())
    settings = value.pop("quantization_config")
    settings.pop("quant_method")
    path.write_text(json.dumps(value))
    (folder / "quantize_config.json").write_text(json.dumps(settings))


def compressed(folder: Path) -> None:
    """A GPTQ checkpoint in llm-compressor's format: the same words and scales, turned."""
    held = load_file(folder / WEIGHTS)
    for key in [key for key in held if key.endswith(".qweight")]:
        name, words = key.removesuffix(".qweight"), held.pop(key)
        held.pop(f"{name}.qzeros")
        held.pop(f"{name}.g_idx")
        held[f"{name}.weight_packed"] = words.T.contiguous()
        held[f"{name}.weight_scale"] = held.pop(f"{name}.scales").T.contiguous()
        held[f"{name}.weight_shape"] = torch.tensor([words.shape[1], words.shape[0] * 8])
    save_file(held, folder / WEIGHTS, {"format": "pt"})
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group",
               "group_size": tiny.GROUP, "dynamic": False, "actorder": None}  # fmt: skip
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None}
    parts = ("lm_head", "visual", "vision_tower", "multi_modal_projector")
    config(
        lambda c: c.update(
            quantization_config={
                "quant_method": "compressed-tensors",
                "format": "pack-quantized",
                "quantization_status": "compressed",
                "ignore": [f"re:.*{part}.*" for part in parts],
                "config_groups": {"group_0": group},
            }
        )
    )(folder)


def ct_weights(**entries: object) -> Plant:
    def change(held: Config) -> None:
        held["quantization_config"]["config_groups"]["group_0"]["weights"].update(entries)

    return both(compressed, config(change))


def first(key: str, value: float) -> Plant:
    def change(held: Tensors) -> None:
        held[key].view(-1)[0] = value

    return tensors(change)


def one_more(held: Tensors) -> None:
    """Zero points as gptq_v2 stores them."""
    for key in held:
        if key.endswith("qzeros"):
            held[key] += 0x11111111


def shuffled(held: Tensors) -> None:
    for key in held:
        if key.endswith("g_idx"):
            held[key] = held[key].flip(0)


SHORT = [
    ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    ["self_attn.o_proj"],
    ["mlp.gate_proj", "mlp.up_proj"],
    ["mlp.down_proj"],
]
NOT = "modules_to_not_convert"
IMAGES, VLLM = "awq-skip-transformers", "awq-skip-vllm"

AWQ = [
    Case("no skip list", "qwen2_vl-awq", silent_on(NOT), {IMAGES}),
    Case("no skip list, LLaVA", "llava-awq", silent_on(NOT), {IMAGES}),
    Case("vLLM's spelling", "qwen2_5_vl-awq", says(**{NOT: ["visual"]}), {IMAGES}),
    Case("vLLM's spelling with a dot", "qwen3_vl-awq", says(**{NOT: ["visual."]}), {IMAGES}),
    Case("transformers' spelling", "qwen3_vl-awq", says(**{NOT: ["model.visual"]}), {VLLM}),
    Case("a regex", "qwen2_vl-awq", says(**{NOT: [".*visual.*"]}), {VLLM}),
    Case("another part", "qwen2_vl-awq", says(**{NOT: ["lm_head"]}), {IMAGES, VLLM}),
    Case(
        "vLLM's spelling, LLaVA", "llava-awq",
        says(**{NOT: ["vision_tower", "multi_modal_projector"]}), {IMAGES},
    ),
    Case(
        "transformers' spelling, LLaVA", "llava-awq",
        says(**{NOT: ["model.vision_tower", "model.multi_modal_projector"]}), {VLLM},
    ),
    Case(
        "projector forgotten", "llava-awq",
        says(**{NOT: ["vision_tower", "model.vision_tower"]}), {IMAGES, VLLM},
    ),
    Case(
        "exempts packed ones", "qwen2_vl-awq",
        says(**{NOT: ["visual", "model.visual", DOWN]}), {"awq-skip-too-broad"},
    ),
    Case("another layout", "qwen2_vl-awq", says(version="gemv"), {"awq-version"}),
    Case("no zero_point", "qwen2_5_vl-awq", silent_on("zero_point"), {"config-keys"}),
    Case("bits of awq", "llava-awq", says(bits=8), {"bits-differ"}),
    Case(
        "no zeros", "qwen2_vl-awq", without("qzeros"), {"packed-incomplete"}, repairable=False
    ),
    Case(
        "a 16-bit linear", "qwen2_vl-awq", unpacked(f"{QWEN.format(0)}.{DOWN}"),
        {"linear-not-packed"}, within=RELOAD_BOUND,  # bf16 holds scale times code to 2^-9
    ),
    Case(
        "a 16-bit shard that is exempt", "qwen2_vl-awq",
        both(
            unpacked(f"{QWEN.format(0)}.{QUERY}"),
            says(**{NOT: ["visual", "model.visual", "layers.0.self_attn.q_proj"]}),
        ),
        {"fused-mixed"}, repairable=False,
    ),
]  # fmt: skip

GPTQ = [
    Case("v1 as v2", "qwen2_vl-gptq", says(checkpoint_format="gptq_v2"), {"gptq-label"}),
    Case("v2 as v1", "qwen3_vl-gptq", tensors(one_more), {"gptq-label"}),
    Case(
        "v2 by the old key", "llava-gptq",
        both(silent_on("checkpoint_format"), says(format="gptq_v2")), {"gptq-label"},
    ),
    Case("unknown label", "qwen2_vl-gptq", says(checkpoint_format="marlin"), {"gptq-label"}),
    Case("no g_idx", "qwen2_5_vl-gptq", without("g_idx"), {"gptq-no-g-idx"}),
    Case("no qzeros", "llava-gptq", without("qzeros"), {"gptq-no-qzeros"}),
    Case(
        "no scales", "qwen2_vl-gptq", without(f"0.{DOWN}.scales"), {"packed-incomplete"},
        repairable=False,
    ),
    Case(
        "no qweight", "llava-gptq", without(f"1.{DOWN}.qweight"), {"packed-incomplete"},
        repairable=False,
    ),
    Case(
        "scales turned", "qwen3_vl-gptq", each(f"0.{DOWN}.scales", lambda s: s.T),
        {"packed-shape"}, repairable=False,
    ),
    Case(
        "unsigned words", "qwen2_vl-gptq", each("qweight", lambda w: w.view(torch.uint32)),
        {"packed-dtype"},
    ),
    Case(
        "words as floats", "qwen2_vl-gptq", each("qweight", lambda w: w.float()),
        {"packed-dtype"}, repairable=False,
    ),
    Case(
        "five bits", "llava-gptq", both(says(bits=5), tensors(five_bits)), {"bits-unsupported"},
        repairable=False,
    ),
    Case("bits", "qwen2_vl-gptq", says(bits=8), {"bits-differ"}),
    Case("bits as text", "qwen3_vl-gptq", says(bits="4"), {"bits-differ"}),
    Case("group size", "qwen2_5_vl-gptq", says(group_size=64), {"group-differs"}),
    Case("whole rows", "llava-gptq", says(group_size=-1), {"group-differs"}),
    Case(
        "no bits and group size", "qwen2_vl-gptq", silent_on("bits", "group_size"), {"config-keys"}
    ),
    Case("desc_act is no boolean", "qwen2_5_vl-gptq", says(desc_act="no"), {"config-keys"}),
    Case("no sym, no desc_act", "llava-gptq", silent_on("sym", "desc_act"), {"config-keys"}),
    Case(
        "short names, LLaVA", "llava-gptq", says(modules_in_block_to_quantize=SHORT),
        {"short-modules"},
    ),
    Case(
        "short names, Qwen2.5-VL", "qwen2_5_vl-gptq", says(modules_in_block_to_quantize=SHORT),
        {"short-modules"},
    ),
    Case(
        "a list of some", "qwen2_vl-gptq", says(modules_in_block_to_quantize=SHORT[:2]),
        {"modules-list", "short-modules"},
    ),
    Case(
        "a flat list", "qwen3_vl-gptq",
        says(modules_in_block_to_quantize=SHORT[0] + SHORT[1] + SHORT[2] + SHORT[3]),
        {"modules-list"},
    ),
    Case("act order in name only", "qwen2_vl-gptq", says(desc_act=True), {"gptq-desc-act"}),
    Case(
        "act order", "qwen2_vl-gptq", both(says(desc_act=True), tensors(shuffled)),
        {"gptq-desc-act"}, repairable=False,
    ),
    Case(
        "order without act order", "qwen3_vl-gptq", tensors(shuffled), {"gptq-order"},
        repairable=False,
    ),
    Case(
        "groups that are not there", "llava-gptq", first(f"{LLAVA.format(0)}.{DOWN}.g_idx", 99),
        {"gptq-g-idx-range"}, repairable=False,
    ),
    Case("asymmetric in name only", "qwen2_5_vl-gptq", says(sym=False), {"gptq-sym"}),
    Case(
        "asymmetric", "llava-gptq",
        both(says(sym=False), first(f"{LLAVA.format(0)}.{DOWN}.qzeros", 5)),
        {"gptq-sym"}, repairable=False,
    ),
    Case(
        "zeros off the middle", "llava-gptq", first(f"{LLAVA.format(0)}.{DOWN}.qzeros", 5),
        {"gptq-zeros"}, repairable=False,
    ),
    Case(
        "a 16-bit shard", "qwen2_vl-gptq", unpacked(f"{QWEN.format(1)}.{QUERY}"),
        {"fused-mixed", "linear-not-packed"}, repairable=False,
    ),
    Case("block elsewhere", "qwen2_vl-gptq", says(block_name_to_quantize="model.layers"),
         {"block-wrong"}),
    Case("block too wide", "llava-gptq", says(block_name_to_quantize="model"), {"block-wrong"}),
    Case("dynamic exempts", "qwen2_vl-gptq", says(dynamic={"-:.*down_proj": {}}),
         {"gptq-dynamic"}),
    Case("vision packed", "llava-gptq", packed("mlp.fc1"), {"vision-quantized"},
         rounded("mlp.fc1")),
    Case("projector packed", "llava-gptq", packed("projector.linear_2"),
         {"projector-quantized"}, rounded("projector.linear_2")),
    Case("merger packed", "qwen3_vl-awq", packed("visual.merger.linear_fc1", "awq"),
         {"projector-quantized"}, rounded("visual.merger.linear_fc1")),
    Case("head packed", "qwen2_vl-gptq", both(packed("lm_head"), says(lm_head=True)),
         {"head-quantized"}, rounded("lm_head")),
]  # fmt: skip

SHARED = [
    Case("no vision", "qwen2_vl-gptq", tensors(lambda t: [t.pop(k) for k in list(t) if "vis" in k]),
         {"vision-missing"}, repairable=False),
    Case("a vision weight missing", "llava-awq", without("encoder.layers.0.mlp.fc1.weight"),
         {"vision-missing"}, repairable=False),
    Case("a norm missing", "llava-gptq", without("model.norm.weight"), {"weights-missing"},
         repairable=False),
    Case("no head", "qwen3_vl-gptq", without("lm_head.weight"), {"head-missing"},
         repairable=False),
    Case("a head that nothing ties", "qwen2_vl-tied",
         config(lambda c: c.pop("tie_word_embeddings")), {"head-missing"}, repairable=False),
    Case("another head than the tied one", "qwen3_vl-tied",
         tensors(lambda t: t.update({"lm_head.weight":
                                     t["model.language_model.embed_tokens.weight"].flip(0)})),
         {"tied-head-differs"}, repairable=False),
    Case("a key of nothing", "qwen2_vl-gptq",
         tensors(lambda t: t.update({"model.layers.0.extra.weight": torch.ones(2)})),
         {"keys-unknown"}),
    Case("wrapped keys", "qwen2_vl-gptq", renamed("", "module."), {"keys-spelling"}),
    Case("vLLM's own keys", "qwen2_5_vl-awq",
         both(renamed("model.", "language_model.model."), renamed("lm_", "language_model.lm_")),
         {"keys-spelling"}),
    Case("another family's keys", "qwen3_vl-gptq",
         renamed("model.language_model.", "model."), {"keys-spelling"}),
    Case("CLIP as in memory", "llava-gptq", renamed("vision_tower.vision_model.", "vision_tower."),
         {"vllm-spelling"}),
    Case("the base model's keys", "qwen2_vl-gptq", renamed("model.", "language_model."),
         {"vllm-spelling"}),
    Case("other sizes", "llava-gptq", config(lambda c: c["vision_config"].update(image_size=40)),
         {"weights-shape"}, repairable=False),
    Case("bytes as weights", "llava-awq",
         each("layers.0.mlp.fc2.weight", lambda w: w.to(torch.uint8)), {"weights-dtype"},
         repairable=False),
    Case("a scale that is no number", "qwen2_vl-gptq",
         first(f"{QWEN.format(0)}.{DOWN}.scales", float("nan")), {"not-finite"}, repairable=False),
    Case("an infinite vision weight", "qwen3_vl-awq",
         first("model.visual.blocks.0.attn.qkv.weight", float("inf")), {"not-finite"},
         repairable=False),
    Case("scales of zero", "qwen2_5_vl-gptq", each(f"0.{DOWN}.scales", torch.zeros_like),
         {"zero-scales"}, repairable=False),
    Case("no tokenizer", "qwen2_vl-gptq", gone("tokenizer.json"), {"no-tokenizer"},
         repairable=False),
    Case("no processor", "llava-gptq", gone("processor_config.json"), {"no-processor"},
         repairable=False),
    Case("no image token", "llava-awq", config(lambda c: c.pop("image_token_index")),
         {"image-token"}),
    Case("another image token", "qwen2_vl-gptq", config(lambda c: c.update(image_token_id=7)),
         {"image-token"}),
    Case("no such dtype for the text", "llava-gptq",
         config(lambda c: c["text_config"].update(dtype="")), {"dtype-unknown"}),
    Case("no such dtype", "qwen2_vl-gptq", config(lambda c: c.update(dtype="bloat16")),
         {"dtype-unknown"}),
    Case("AutoGPTQ's file name", "qwen2_vl-gptq",
         lambda f: (f / WEIGHTS).rename(f / "gptq_model-4bit-32g.safetensors") and None,
         {"weights-name"}),
    Case("shards without an index", "llava-gptq", shards(lambda *_: None, named=False),
         {"weights-name"}),
    Case("two sets of weights", "qwen3_vl-gptq",
         lambda f: save_file({"x": torch.ones(1)}, f / "old.safetensors"), {"weights-twice"}),
    Case("a shard that the index forgot", "qwen2_5_vl-gptq", shards(forget_the_second),
         {"index-broken"}),
    Case("an index without metadata", "llava-awq", shards(lambda _, i: i.pop("metadata")),
         {"index-broken"}),
    Case("settings beside", "qwen2_vl-gptq", settings_beside, {"no-quantization-config"}),
    Case("no settings at all", "llava-awq", config(lambda c: c.pop("quantization_config")),
         {"no-quantization-config"}, repairable=False),
]  # fmt: skip

CT = [  # compressed-tensors is no dependency: read, not loaded
    Case("bare names", "qwen2_vl-gptq", both(compressed, says(ignore=["visual", "lm_head"])),
         {"ct-ignore", "ct-ignore-vllm"}),
    Case("nothing ignored", "llava-gptq", both(compressed, says(ignore=[])),
         {"ct-ignore", "ct-ignore-vllm"}),
    Case("order by group", "qwen3_vl-gptq", ct_weights(actorder="group"), {"ct-actorder"},
         repairable=False),
    Case("bits of compressed-tensors", "qwen2_5_vl-gptq", ct_weights(num_bits=8), {"bits-differ"}),
    Case("no targets", "qwen3_vl-gptq",
         both(compressed, config(lambda c: c["quantization_config"]["config_groups"]["group_0"]
                                 .pop("targets"))), {"ct-ignore", "ct-ignore-vllm"}),
    Case("its group size", "llava-gptq", ct_weights(group_size=64), {"group-differs"}),
    Case("its shapes missing", "llava-gptq", both(compressed, without("weight_shape")),
         {"packed-incomplete"}, repairable=False),
]  # fmt: skip

NOTES: list[tuple[str, str, Plant, set[str]]] = [
    ("dots", "llava-awq", says(**{NOT: ["model.vision_tower.", "model.multi_modal_projector."]}),
     {"awq-skip-dots"}),
    ("no zero points", "llava-awq", says(zero_point=False), {"awq-zero-point"}),
    ("no version", "llava-awq", silent_on("version"), set()),
    ("bf16", "qwen2_vl-awq", lambda _: None, {"awq-fp16"}),
    ("no block", "qwen2_vl-gptq", silent_on("block_name_to_quantize"), {"block-absent"}),
    ("short names that match nothing else", "qwen2_vl-gptq",
     says(modules_in_block_to_quantize=SHORT), set()),
    ("nested dtype", "llava-gptq", config(lambda c: c["vision_config"].update(dtype="float16")),
     {"dtype-nested"}),
    ("fp32 norms", "qwen3_vl-gptq", each("norm.weight", lambda w: w.float()), {"dtype-cast"}),
    ("wide words", "qwen2_vl-gptq", each("qweight", lambda w: w.long()), {"packed-wide"}),
    ("bf16 scales", "qwen2_vl-gptq", each("scales", lambda s: s.bfloat16()), {"packed-wide"}),
    ("the tied head once more", "qwen2_vl-tied",
     tensors(lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()})),
     {"tied-head-twice"}),
    ("tied in the text's config", "qwen2_vl-tied",
     config(lambda c: c["text_config"].update(tie_word_embeddings=c.pop("tie_word_embeddings"))),
     set()),
    ("code of its own", "qwen2_vl-gptq",
     config(lambda c: c.update(auto_map={"AutoConfig": "configuration_evil.Evil"})),
     {"remote-code"}),
    ("a key that the index invents", "qwen2_vl-gptq",
     shards(lambda _, i: i["weight_map"].update(x="model-00001-of-00002.safetensors")),
     {"index-stale"}),
    ("shards", "llava-gptq", shards(lambda *_: None), set()),
    ("old buffers", "llava-gptq",
     tensors(lambda t: t.update({f"{LLAVA.format(0)}.self_attn.rotary_emb.inv_freq":
                                 torch.ones(2)})), set()),
    ("names as in memory", "qwen2_5_vl-gptq",
     both(renamed("model.", "model.language_model."), renamed("visual.", "model.visual.")), set()),
    ("settings in the text's config", "qwen2_vl-gptq",
     config(lambda c: c["text_config"].update(quantization_config=c.pop("quantization_config"))),
     set()),
    ("dynamic that names only vision", "qwen2_vl-gptq", says(dynamic={"-:.*visual.*": {}}), set()),
]  # fmt: skip
