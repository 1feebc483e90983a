"""GPTQ: the label of its zero points, the order of its inputs, and which linears are meant."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache

import torch

from qatbench.errors import ShapeError
from qatbench.quant import checks
from qatbench.stages.verify import loaders
from qatbench.stages.verify.finding import Finding, entry, few, found
from qatbench.stages.verify.rules_packed import (
    head_packed,
    language_dense,
    language_packed,
    listed_modules,
    odd_shapes,
    stored_bits,
    stored_group_size,
    told_grid,
)
from qatbench.stages.verify.subject import Subject

LABELS = ("gptq", "gptq_v2")
BOOLEANS = ("desc_act", "sym")
VLLM_GROUPS = (-1, 32, 64, 128)


def config_keys(subject: Subject) -> Iterator[Finding]:
    """Entries without which a loader stops; transformers has defaults for the last two."""
    settings = subject.settings
    real = {
        "bits": stored_bits(subject) is not None,
        "group_size": stored_group_size(subject) is not None,
        "desc_act": input_order(subject) == "in order",
        "sym": stored_label(subject) is not None,
    }
    gone = [key for key in real if settings.get(key) is None]
    odd = [key for key in BOOLEANS if settings.get(key, True) not in (True, False)]
    strict = {"bits", *odd} | ({"group_size"} if stored_group_size(subject) != 128 else set())
    wrong = list(dict.fromkeys((*gone, *odd)))
    if wrong:
        yield found(
            "config-keys", entry(wrong[0]), ", ".join(wrong),
            repairable=all(real[key] for key in wrong),
            transformers="error" if strict & set(wrong) else "",
        )  # fmt: skip


# --- zero points --------------------------------------------------------------------------------


def label(subject: Subject) -> str:
    """The config's checkpoint_format; without one both loaders go by gptq."""
    named = (subject.settings.get(key) for key in ("checkpoint_format", "format"))
    return str(next((name for name in named if name is not None), "gptq")).lower()


@lru_cache(maxsize=4)
def stored_label(subject: Subject) -> str | None:
    """The label under which all zero points are the middle of the grid; None for none."""
    bits, keys = stored_bits(subject), list(subject.parts("qzeros").values())
    if bits is None or not keys:
        return None
    try:
        fields = {checks.only_field(v, bits) for _, v in subject.checkpoint.tensors(keys)}
    except ShapeError:
        return None
    middle = 1 << (bits - 1)
    labels = {frozenset({middle - 1}): "gptq", frozenset({middle}): "gptq_v2"}
    return labels.get(frozenset(field or 0 for field in fields))


def zero_points(subject: Subject) -> Iterator[Finding]:
    """checkpoint_format and sym against what is stored."""
    said, real = label(subject), stored_label(subject)
    where = entry("checkpoint_format")
    if said not in LABELS:
        yield found(
            "gptq-label", where, f"{said}: transformers knows gptq and gptq_v2",
            repairable=real is not None, transformers="error",
        )  # fmt: skip
    elif real is not None and said != real:
        yield found("gptq-label", where, f"{said}, stored as {real}", repairable=True)
    whole = len(subject.parts("qzeros")) == len(subject.packed)
    if not whole or odd_shapes(subject) or stored_bits(subject) is None:
        return  # nothing can be said of them
    if subject.settings.get("sym") == 0:  # 0 passes for false in every loader
        yield found("gptq-sym", entry("sym"), repairable=real is not None)
    elif real is None:
        yield found("gptq-zeros", few(list(subject.parts("qzeros").values())))


# --- groups -------------------------------------------------------------------------------------


@lru_cache(maxsize=4)
def input_order(subject: Subject) -> str:
    """How g_idx groups the inputs: in order, out of order, out of range, or missing."""
    keys = subject.parts("g_idx")
    if len(keys) < len(subject.packed):
        return "missing"
    size = told_grid(subject)[1]
    names = {key: name for name, key in keys.items()}
    worst = "in order"
    for key, g_idx in subject.checkpoint.tensors(keys.values()):
        width = subject.skeleton.linears[names[key]][1]
        groups = 1 if size == -1 else max(1, width // size)
        if g_idx.shape != (width,) or g_idx.dtype not in (torch.int32, torch.int64):
            continue  # a wrong shape or type is another finding
        if g_idx.min() < 0 or g_idx.max() >= groups:
            return "out of range"
        if not checks.in_order(g_idx, groups):
            worst = "out of order"
    return worst


def order(subject: Subject) -> Iterator[Finding]:
    """g_idx and desc_act."""
    settings, found_order = subject.settings, input_order(subject)
    acts = settings.get("desc_act") == 1 and subject.grid[1] != -1
    without = [name for name in subject.packed if "g_idx" not in subject.packed[name]]
    if without:
        yield found(
            "gptq-no-g-idx", few([f"{name}.g_idx" for name in without]),
            f"{len(without)} tensors", repairable=not acts,
        )  # fmt: skip
    if found_order == "out of range":
        yield found("gptq-g-idx-range", few(list(subject.parts("g_idx").values())))
    if found_order == "out of order" and not acts:
        yield found("gptq-order", few(list(subject.parts("g_idx").values())))
    if acts:
        yield found("gptq-desc-act", entry("desc_act"), repairable=found_order == "in order")
    size = stored_group_size(subject)
    if size is not None and size not in VLLM_GROUPS:
        yield found("gptq-group-size", entry("group_size"), str(size))


def zeros_there(subject: Subject) -> Iterator[Finding]:
    """Every packed linear has zero points."""
    gone = [name for name in subject.packed if "qzeros" not in subject.packed[name]]
    if gone:
        yield found(
            "gptq-no-qzeros", few([f"{name}.qzeros" for name in gone]), f"{len(gone)} tensors",
            repairable=subject.settings.get("sym") != 0 and not odd_shapes(subject),
        )  # fmt: skip


# --- which linears ------------------------------------------------------------------------------


def blocks(subject: Subject) -> Iterator[Finding]:
    """What transformers replaces, by block and by list, against what is packed."""
    arch, names = subject.arch, list(subject.skeleton.linears)
    block = subject.settings.get("block_name_to_quantize")
    if block is None and arch.is_vlm:
        yield found("block-absent", entry("block_name_to_quantize"))
    inside = subject.language.keys()
    if block is not None and loaders.transformers_gptq(names, str(block), None) != inside:
        yield found("block-wrong", entry("block_name_to_quantize"), f"{block}, not {arch.layers}")
    listed = listed_modules(subject)
    packed, dense = language_packed(subject), language_dense(subject)
    taken = loaders.transformers_gptq(names, arch.layers, listed)
    nested = all(
        isinstance(x, list) for x in subject.settings.get("modules_in_block_to_quantize") or []
    )
    if not nested:
        yield found(
            "modules-list", entry("modules_in_block_to_quantize"),
            "transformers wants lists of names in a list", transformers="error",
            repairable=not dense,
        )  # fmt: skip
    elif packed - taken:
        left_out = f"it leaves out {few(sorted(packed - taken))}"
        yield found(
            "modules-list", entry("modules_in_block_to_quantize"), left_out, repairable=not dense
        )
    if dense & taken:
        yield found("linear-not-packed", few(sorted(dense & taken)))


def vllm_modules(subject: Subject) -> Iterator[Finding]:
    """What vLLM takes for packed when the config lists modules."""
    listed = listed_modules(subject)
    if listed is None:
        return  # it reads the types of the tensors
    names, head = list(subject.skeleton.linears), head_packed(subject)
    taken = loaders.vllm_gptq(subject.arch, names, listed, head=head)
    wrong = sorted((taken & subject.sixteen) | (language_packed(subject) - taken))
    if wrong:
        yield found(
            "short-modules", entry("modules_in_block_to_quantize"), few(wrong),
            repairable=not language_dense(subject),
        )  # fmt: skip


def dynamic(subject: Subject) -> Iterator[Finding]:
    """`dynamic`: rules that vLLM follows and plain transformers does not."""
    rules = subject.settings.get("dynamic")
    if not isinstance(rules, dict) or not rules:
        return
    try:
        left_out = loaders.vllm_left_out(subject.arch, subject.packed, rules)
    except re.error as error:
        yield found("gptq-dynamic", entry("dynamic"), f"no regex: {error}", transformers="")
        return
    alike = not odd_shapes(subject)
    changing = [key for key in rules if not key.startswith("-:")]
    if left_out:
        yield found(
            "gptq-dynamic", entry("dynamic"), f"it exempts {few(left_out)}, which are packed",
            transformers="", repairable=alike,
        )  # fmt: skip
    elif changing:
        yield found(
            "gptq-dynamic", entry("dynamic"), few(changing), repairable=alike,
            transformers="" if alike else "error", vllm="error" if alike else "",
        )  # fmt: skip
