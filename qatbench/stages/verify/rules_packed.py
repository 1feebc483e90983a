"""Packed tensors of every format: are all there, and do shapes say what the config says?"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache

from qatbench.quant import checks
from qatbench.stages.verify.finding import Finding, entry, few, found
from qatbench.stages.verify.loaders import flat, fused_groups
from qatbench.stages.verify.rules import ERROR, WRONG
from qatbench.stages.verify.subject import HEAD, Subject

# Parts that a loader cannot do without and that nothing else tells; the others have own rules.
NEEDED = {
    "gptq": ("qweight", "scales"),
    "awq": ("qweight", "qzeros", "scales"),
    "compressed-tensors": ("weight_packed", "weight_scale", "weight_shape"),
}


def settings_there(subject: Subject) -> Iterator[Finding]:
    """Packed weights need a quantization_config."""
    if subject.packed and not subject.settings:
        aside = subject.checkpoint.has("quantize_config.json", "quant_config.json")
        names = few(list(subject.packed))
        yield found("no-quantization-config", "config.json", names, repairable=aside)


def complete(subject: Subject) -> Iterator[Finding]:
    """Every packed linear has its words, scales and what else cannot be made up."""
    needed = NEEDED[str(subject.method)]
    gone = [
        f"{name}.{part}"
        for name, parts in subject.packed.items()
        for part in needed
        if part not in parts
    ]
    if gone:
        yield found("packed-incomplete", few(gone), f"{len(gone)} tensors")


def widths(subject: Subject) -> Iterator[Finding]:
    """Bits and group size of the config, and shapes that fit neither."""
    bits, size = subject.grid
    real_bits, real_size = stored_bits(subject), stored_group_size(subject)
    method = str(subject.method)
    where = "weights." if method == "compressed-tensors" else ""
    if real_bits is not None and bits != real_bits and bits is not None:
        yield found("bits-differ", entry(f"{where}bits"), f"{bits!r}, stored {real_bits}")
    if real_size is not None and size != real_size and size is not None:
        yield found("group-differs", entry(f"{where}group_size"), f"{size!r}, stored {real_size}")
    told = real_bits if real_bits is not None else bits
    if method == "gptq" and isinstance(told, int) and told not in checks.GPTQ_BITS:
        yield found("bits-unsupported", entry("bits"), f"{told} bits")
    elif isinstance(told, int) and told not in checks.VLLM_BITS[method]:
        yield found("plain-only", entry(f"{where}bits"), f"{told} bits, {method}")
    odd = odd_shapes(subject)
    if odd and not _by_rule(subject):
        yield found("packed-shape", few(odd, 1), f"{len(odd)} tensors")


def _by_rule(subject: Subject) -> bool:
    """Whether `dynamic` may have given layers a grid of their own, which has its own rule."""
    dynamic = subject.settings.get("dynamic")
    return isinstance(dynamic, dict) and any(not key.startswith("-:") for key in dynamic)


def odd_shapes(subject: Subject) -> list[str]:
    """Tensors that do not have the shape that the others' bits and group size give them."""
    bits, size = told_grid(subject)
    odd = []
    for name, parts in subject.packed.items():
        wanted = checks.part_shapes(
            str(subject.method), *subject.skeleton.linears[name], bits, size
        )
        for part, key in parts.items():
            shape = subject.checkpoint.entries[key].shape
            if wanted is None or (part in wanted and shape != wanted[part]):
                odd.append(f"{key} {shape}, expected {wanted and wanted[part]}")
    return odd


def types(subject: Subject) -> Iterator[Finding]:
    """Words and g_idx are int32; scales are fp16 (compressed-tensors: any 16-bit float)."""
    entries = subject.checkpoint.entries
    halves = ("F16", "BF16") if subject.method == "compressed-tensors" else ("F16",)
    wrong: list[str] = []
    wide: list[str] = []
    for parts in subject.packed.values():
        for part, key in parts.items():
            kind = entries[key].dtype
            scales = part in ("scales", "weight_scale")
            if part == "weight_shape" or kind in (halves if scales else ("I32",)):
                continue
            cast = kind in ("F32", "F64", "BF16", "F16") if scales else kind == "I64"
            (wide if cast else wrong).append(f"{key} {kind}")
    if wrong:
        lossless = all(text.endswith(" U32") for text in wrong)
        effect = ERROR if lossless else WRONG
        yield found("packed-dtype", few(wrong), repairable=lossless, transformers=effect)
    if wide:
        yield found("packed-wide", few(wide))


def outside(subject: Subject) -> Iterator[Finding]:
    """Only linears of the language model may be packed."""
    for seen in ("vision", "projector", "head"):
        names = [name for name in subject.packed if subject.seen(name) == seen]
        if names:
            yield found(
                f"{seen}-quantized", few(names), f"{len(names)} linears",
                repairable=_readable(subject),
            )  # fmt: skip


def _readable(subject: Subject) -> bool:
    """Whether this project unpacks the words: gptq, and awq at 4 bits."""
    known = subject.method == "gptq" or (subject.method == "awq" and stored_bits(subject) == 4)
    return known and not odd_shapes(subject)


def fused(subject: Subject) -> Iterator[Finding]:
    """Linears that vLLM joins are all packed or all not."""
    mixed = [
        group
        for group in fused_groups(subject.skeleton.linears)
        if 0 < sum(name in subject.packed for name in group) < len(group)
    ]
    if mixed:
        dense = [name for name in mixed[0] if name not in subject.packed]
        yield found("fused-mixed", few(dense), f"{len(mixed)} groups")


def language_packed(subject: Subject) -> set[str]:
    """Packed linears of the language model."""
    return {name for name in subject.packed if subject.seen(name) == "language"}


def language_dense(subject: Subject) -> set[str]:
    """Linears of the decoder layers that are stored in 16 bits."""
    return subject.sixteen & subject.language.keys()


# --- what the tensors say -----------------------------------------------------------------------


@lru_cache(maxsize=4)
def stored_bits(subject: Subject) -> int | None:
    """Bits of all packed linears; None where they differ or cannot be told."""
    return _agreed(subject, checks.WEIGHTS, checks.implied_bits)


def told_grid(subject: Subject) -> tuple[int, int]:
    """(bits, group size) of the tensors, else of the config, else as transformers assumes."""
    bits, size = subject.grid
    return (
        stored_bits(subject) or (bits if isinstance(bits, int) else 4),
        stored_group_size(subject) or (size if isinstance(size, int) else 128),
    )


@lru_cache(maxsize=4)
def stored_group_size(subject: Subject) -> int | None:
    """Group size of all scales, -1 for whole rows; None where they differ or cannot be told."""
    linears = subject.skeleton.linears
    groups = _each(subject, checks.SCALES, checks.implied_groups)
    if not groups or None in groups.values():
        return None
    sizes = {linears[name][1] // int(n or 1) for name, n in groups.items()}
    if set(groups.values()) == {1} and (len(sizes) > 1 or subject.grid[1] not in sizes):
        return -1
    return sizes.pop() if len(sizes) == 1 else None


Reading = Callable[[str, checks.Shape, int, int], int | None]


def _each(subject: Subject, part_of: Mapping[str, str], reading: Reading) -> dict[str, int | None]:
    method = str(subject.method)
    entries = subject.checkpoint.entries
    return {
        name: reading(method, entries[key].shape, *subject.skeleton.linears[name])
        for name, key in subject.parts(part_of[method]).items()
    }


def _agreed(subject: Subject, part_of: Mapping[str, str], reading: Reading) -> int | None:
    found_in = set(_each(subject, part_of, reading).values())
    return found_in.pop() if len(found_in) == 1 else None


def head_packed(subject: Subject) -> bool:
    """Whether the config tells vLLM that lm_head is packed."""
    return subject.settings.get("lm_head") is True and HEAD in subject.skeleton.linears


def listed_modules(subject: Subject) -> list[str] | None:
    """modules_in_block_to_quantize, flat; None when there is none."""
    value = subject.settings.get("modules_in_block_to_quantize")
    return flat(value) if value else None
