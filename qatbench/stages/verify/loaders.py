"""Which linears each loader takes for packed: its matching rules as functions of names.

transformers 5.23 with optimum 2.3 matches names in memory; vLLM 0.33 matches its own names, and
does so for q, k, v (gate, up) one by one before it joins them. Lists of a config are renamed by
vLLM's prefixes first. Sources: `should_convert_module` and `GPTQQuantizer.convert_model`; vLLM's
`auto_awq`, `auto_gptq`, `gptq_utils` and `compressed_tensors/utils`. Written from what they do.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from qatbench.vlm.layout import FUSED, Architecture

Linears = Iterable[str]


# --- transformers -------------------------------------------------------------------------------


def transformers_awq(names: Linears, skip: Sequence[str]) -> set[str]:
    """Linears that become AWQ: an entry exempts as a prefix or regex up to a dot, or as a suffix.

    The output head is always exempt.
    """
    return {name for name in names if not any(_exempt(name, key) for key in (*skip, "lm_head"))}


def _exempt(name: str, key: str) -> bool:
    try:
        # (?<=\.)|(?=\.|$): the match must end after a dot, before one, or at the end
        regex = re.match(rf"(?:{key})(?:(?<=\.)|(?=\.|$))", name)
    except re.error:
        regex = None
    return regex is not None or name.endswith(key)


def transformers_gptq(names: Linears, block: str, listed: Sequence[str] | None) -> set[str]:
    """Linears that become GPTQ: all whose name begins with the block's and ends as one listed."""
    return {
        name
        for name in names
        if name.startswith(block) and (listed is None or name.endswith(tuple(listed)))
    }


def transformers_ct(names: Linears, targets: Sequence[str], ignore: Sequence[str]) -> set[str]:
    """Linears that compressed-tensors takes: an entry is a class, a whole name or `re:`."""

    def told(name: str, entries: Sequence[str]) -> bool:
        return any(key == "Linear" or _equal_or_regex(name, key) for key in entries)

    return {name for name in names if told(name, targets) and not told(name, ignore)}


def _equal_or_regex(name: str, key: str) -> bool:
    if not key.startswith("re:"):
        return name == key
    try:
        return re.match(key.removeprefix("re:"), name) is not None
    except re.error:
        return False


# --- vLLM ---------------------------------------------------------------------------------------


def vllm_prefix(arch: Architecture, name: str) -> str:
    """Name of a linear in vLLM, before q, k and v are joined."""
    return arch.vllm_name(arch.file_key(f"{name}.weight")).removesuffix(".weight")


def vllm_awq(arch: Architecture, names: Linears, skip: Sequence[str], *, head: bool) -> set[str]:
    """Linears that vLLM takes for AWQ: an entry exempts wherever it occurs in the name.

    `head`: the config's lm_head; without it the head is never packed.
    """
    entries = [arch.vllm_name(key) for key in skip]
    return {
        name
        for name in names
        if (head or name != "lm_head")
        and not any(entry in vllm_prefix(arch, name) for entry in entries)
    }


def vllm_gptq(arch: Architecture, names: Linears, listed: Sequence[str], *, head: bool) -> set[str]:
    """Linears that vLLM takes for GPTQ: an entry counts wherever it occurs in the name."""
    entries = [arch.vllm_name(key) for key in listed]
    return {
        name
        for name in names
        if (head or name != "lm_head")
        and any(entry in vllm_prefix(arch, name) for entry in entries)
    }


def vllm_ct(
    arch: Architecture, names: Linears, targets: Sequence[str], ignore: Sequence[str]
) -> set[str]:
    """Linears that vLLM takes for compressed-tensors; the head never is."""

    def told(name: str, entries: Sequence[str]) -> bool:
        renamed = (key if key.startswith("re:") else arch.vllm_name(key) for key in entries)
        prefix = vllm_prefix(arch, name)
        return any(key == "Linear" or _equal_or_regex(prefix, key) for key in renamed)

    body = (name for name in names if name != "lm_head")
    return {name for name in body if told(name, targets) and not told(name, ignore)}


def vllm_left_out(arch: Architecture, names: Linears, dynamic: Mapping[str, Any]) -> list[str]:
    """Linears that a `-:` rule of `dynamic` takes out: a regex on vLLM's joined name."""
    rules = [key.removeprefix("-:") for key in dynamic if key.startswith("-:")]
    joined = {part: whole for whole, parts in FUSED.items() for part in parts}
    out = []
    for name in names:
        stem, _, last = vllm_prefix(arch, name).rpartition(".")
        if any(re.match(rule, f"{stem}.{joined.get(last, last)}") for rule in rules):
            out.append(name)
    return out


def fused_groups(names: Linears) -> list[list[str]]:
    """Linears that vLLM joins, group by group."""
    known = set(names)
    groups: list[list[str]] = []
    for parts in FUSED.values():
        for name in sorted(known):
            stem, _, last = name.rpartition(".")
            if last == parts[0]:
                groups.append([f"{stem}.{part}" for part in parts if f"{stem}.{part}" in known])
    return groups


def flat(listed: object) -> list[str]:
    """A list of names, or of lists of names, as one list; anything else is an empty one."""
    if not isinstance(listed, list):
        return []
    parts = [item if isinstance(item, list) else [item] for item in listed]
    return [str(name) for part in parts for name in part]
