"""Keys, shapes and values of the tensors against the model that the config describes."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from qatbench.stages.verify.finding import Finding, few, found
from qatbench.stages.verify.subject import HEAD, Subject
from qatbench.vlm.layout import under

HEAD_WEIGHT = f"{HEAD}.weight"
FLOATS = ("F64", "F32", "F16", "BF16")


def keys(subject: Subject) -> Iterator[Finding]:
    """Keys without a place, and places without a key."""
    missing, unknown = subject.missing(), subject.unknown
    if subject.misspelt:
        yield found("keys-spelling", few(sorted(subject.misspelt)), f"{len(subject.misspelt)} keys")
    if unknown:
        yield found("keys-unknown", few(unknown), f"{len(unknown)} keys", repairable=not missing)
    yield from _missing(subject, missing)
    yield from _vllm_spelling(subject)


def _missing(subject: Subject, missing: list[str]) -> Iterator[Finding]:
    sees = (*subject.arch.vision, *subject.arch.projector)
    vision = [name for name in missing if under(name, sees)]
    rest = [name for name in missing if name not in vision and name != HEAD_WEIGHT]
    if HEAD_WEIGHT in missing:
        yield found("head-missing", "config.json: tie_word_embeddings")
    if vision:
        yield found("vision-missing", few(vision), f"{len(vision)} tensors")
    if rest:
        yield found("weights-missing", few(rest), f"{len(rest)} tensors")


def _vllm_spelling(subject: Subject) -> Iterator[Finding]:
    arch = subject.arch
    odd = sorted(
        key for name, key in all_keys(subject).items()
        if key not in subject.misspelt
        and arch.vllm_name(key) != arch.vllm_name(arch.file_key(name))
    )  # fmt: skip
    if odd:
        yield found("vllm-spelling", few(odd), f"{len(odd)} keys")


def all_keys(subject: Subject) -> dict[str, str]:
    """Name in memory, packed parts included -> key."""
    packed = {
        f"{name}.{part}": key
        for name, parts in subject.packed.items()
        for part, key in parts.items()
    }
    return dict(subject.dense) | packed


def tied_head(subject: Subject) -> Iterator[Finding]:
    """An lm_head beside the embeddings that it is tied to."""
    source = subject.skeleton.tied.get(HEAD_WEIGHT)
    key, other = subject.dense.get(HEAD_WEIGHT), subject.dense.get(source or "")
    if key is None or other is None:
        return
    head, embeddings = (subject.checkpoint.tensor(one) for one in (key, other))
    same = head.shape == embeddings.shape and torch.equal(head, embeddings)
    yield found("tied-head-twice" if same else "tied-head-differs", key)


def shapes(subject: Subject) -> Iterator[Finding]:
    """Shapes and types of what is stored as it is; all of it is floats in these families."""
    entries = subject.checkpoint.entries
    wrong = [
        f"{key} {entries[key].shape} for {subject.skeleton.shapes[name]}"
        for name, key in subject.dense.items()
        if entries[key].shape != subject.skeleton.shapes[name]
    ]
    if wrong:
        yield found("weights-shape", few(wrong, 1))
    kinds = {key: entries[key].dtype for key in subject.dense.values()}
    odd = [f"{key} {kind}" for key, kind in kinds.items() if kind not in FLOATS]
    if odd:
        yield found("weights-dtype", few(odd))


def values(subject: Subject) -> Iterator[Finding]:
    """Every float is looked at, scales included."""
    entries = subject.checkpoint.entries
    scales = set(subject.parts("scales").values()) | set(subject.parts("weight_scale").values())
    looked = [key for key in all_keys(subject).values() if entries[key].dtype in FLOATS]
    broken, zero = [], []
    for key, value in subject.checkpoint.tensors(looked):
        if not torch.isfinite(value).all():
            broken.append(key)
        elif key in scales and (value == 0).any():
            zero.append(key)
    if broken:
        yield found("not-finite", few(broken))
    if zero:
        yield found("zero-scales", few(zero))
