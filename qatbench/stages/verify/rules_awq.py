"""AWQ: which linears each loader converts, and the entries that say how they are stored."""

from __future__ import annotations

from collections.abc import Iterator

from qatbench.stages.verify import loaders
from qatbench.stages.verify.finding import Finding, entry, few, found
from qatbench.stages.verify.rules_packed import (
    head_packed,
    language_dense,
    language_packed,
    odd_shapes,
    stored_bits,
    stored_group_size,
)
from qatbench.stages.verify.subject import Subject

SKIP = "modules_to_not_convert"
VERSIONS = ("gemm", "gemv", "gemv_fast", "llm-awq")


def config_keys(subject: Subject) -> Iterator[Finding]:
    """Entries that vLLM asks for; transformers has 4 bits, groups of 128 and zero points."""
    real = {
        "bits": stored_bits(subject) is not None,
        "group_size": stored_group_size(subject) is not None,
        "zero_point": True,
    }
    gone = [key for key in real if subject.settings.get(key) is None]
    if subject.settings.get("zero_point", True) not in (True, False):
        gone = list(dict.fromkeys((*gone, "zero_point")))
    if gone:
        absent = not subject.settings.keys() & set(gone)  # a null is no absence
        real_grid = {"bits": stored_bits(subject), "group_size": stored_group_size(subject)}
        default = {"bits": 4, "group_size": 128}
        assumed = absent and all(real_grid[k] == v for k, v in default.items() if k in gone)
        yield found(
            "config-keys", entry(gone[0]), ", ".join(gone),
            repairable=all(real[key] for key in gone), transformers="" if assumed else "error",
        )  # fmt: skip


def skip_list(subject: Subject) -> Iterator[Finding]:
    """modules_to_not_convert as each loader matches it, against what is stored."""
    skip = loaders.flat(subject.settings.get(SKIP))
    names, packed = list(subject.skeleton.linears), language_packed(subject)
    plain = loaders.transformers_awq(names, skip)
    head = head_packed(subject)
    vllm = loaders.vllm_awq(subject.arch, names, skip, head=head) if skip else set(subject.packed)
    parts = subject.sixteen - subject.language.keys()  # vision, projector, head
    said = f"{skip}" if skip else "it is absent"
    if parts & plain:
        yield found(
            "awq-skip-transformers", entry(SKIP), f"{said}; {few(sorted(parts & plain))} converted"
        )
    if parts & vllm:
        missed = few(sorted(parts & vllm))
        yield found("awq-skip-vllm", entry(SKIP), f"{said}; {missed} taken for packed")
    if packed - plain or packed - vllm:
        yield found(
            "awq-skip-too-broad", entry(SKIP), few(sorted((packed - plain) | (packed - vllm))),
            transformers=None if packed - plain else "", vllm=None if packed - vllm else "",
        )  # fmt: skip
    dense = language_dense(subject)
    if dense & (plain | vllm):
        yield found(
            "linear-not-packed", few(sorted(dense & (plain | vllm))), repairable=True,
            transformers=None if dense & plain else "", vllm="error" if dense & vllm else "",
        )  # fmt: skip
    elif any(key.endswith(".") for key in skip) and not parts & (plain | vllm):
        yield found("awq-skip-dots", entry(SKIP), few([k for k in skip if k.endswith(".")]))


def fields(subject: Subject) -> Iterator[Finding]:
    """Version and zero_point."""
    version = subject.settings.get("version") or subject.settings.get("format") or "gemm"
    if str(version).lower() != "gemm":
        # the shapes of the gemm layout are what odd_shapes expects
        yield found(
            "awq-version", entry("version"), str(version), repairable=not odd_shapes(subject)
        )
    if subject.settings.get("zero_point") == 0:
        yield found("awq-zero-point", entry("zero_point"))
