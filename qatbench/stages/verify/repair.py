"""Repairs, one a rule: each changes a draft where the tensors say what belongs there."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qatbench.errors import ArtifactError, UsageError
from qatbench.quant import checks
from qatbench.quant.packing import dequantize_awq, dequantize_gptq
from qatbench.stages.common import Progress, silent
from qatbench.stages.verify import Verdict, inspect, rules_awq, rules_ct, verdict, verify
from qatbench.stages.verify.draft import Draft
from qatbench.stages.verify.rules_files import HALVES, named_dtype, tokenizer_mark
from qatbench.stages.verify.rules_gptq import label, stored_label
from qatbench.stages.verify.rules_keys import all_keys
from qatbench.stages.verify.rules_packed import (
    language_dense,
    stored_bits,
    stored_group_size,
)
from qatbench.stages.verify.subject import HEAD, Subject, ct_weights, subject

Repair = Callable[[Draft], None]
ROUNDS = 4  # a repair may uncover what could not be seen before it


def repair(
    folder: Path, out: Path, *, load: bool = True, progress: Progress = silent
) -> tuple[list[str], Verdict]:
    """Write a repaired copy to `out`, and verify it.

    Returns: the rules that were repaired, and the copy's verdict; the copy is there only if no
    defect was beyond repair, else the verdict is that of the last draft.
    Raises: UsageError when `out` exists; as `verify`.
    """
    check_out(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    done: list[str] = []
    scratch = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    try:
        current = subject(folder)
        found = verdict(current, inspect(current))
        for number in range(ROUNDS):
            if not found.repairable:
                break
            progress("Writing a repaired copy", number, 0)
            target = scratch / str(number)
            target.mkdir()
            draft = Draft.of(current)
            for rule in dict.fromkeys(finding.rule for finding in found.defects):
                REPAIRS[rule](draft)
                done.append(rule)
            draft.write(target)
            if number:
                shutil.rmtree(scratch / str(number - 1))
            current = subject(target)
            found = verdict(current, inspect(current))
        if not found.sound or not done:
            return done, found
        current.checkpoint.path.rename(out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return done, verify(out, load=load, progress=progress)


def check_out(out: Path) -> None:
    """Raises: UsageError when there is something at `out`."""
    if out.exists():
        raise UsageError(f"{out} exists already", hint="choose another folder for the copy")


# --- files and keys -----------------------------------------------------------------------------


def files_anew(draft: Draft) -> None:
    """The weight files that were read, under the names that loaders look for."""
    draft.files_anew = True


def published_keys(draft: Draft) -> None:
    """Every key as the family's published files spell it."""
    names = {name: key for name, key in all_keys(draft.subject).items() if key not in draft.drop}
    draft.rename |= {key: draft.key(name) for name, key in names.items()}


def drop_unknown(draft: Draft) -> None:
    """Keys that belong to nothing are left out."""
    draft.drop |= set(draft.subject.unknown)


# --- config -------------------------------------------------------------------------------------


def image_token(draft: Draft) -> None:
    """The tokenizer's id, under the key that is there or the family's first."""
    keys = draft.subject.arch.image_token_keys
    there = [key for key in keys if draft.config.get(key) is not None] or [keys[0]]
    draft.config |= dict.fromkeys(there, tokenizer_mark(draft.subject)[1])


def dtype(draft: Draft) -> None:
    """The 16-bit type in which most of what is not packed is stored."""
    entries = draft.subject.checkpoint.entries
    stored = [entries[key].dtype for key in draft.subject.dense.values()]
    name = max(HALVES, key=lambda half: stored.count(HALVES[half]))
    nested = [draft.config[k] for k in ("text_config", "vision_config") if k in draft.config]
    for config in (draft.config, *nested):
        if named_dtype(config) is not None:
            config.pop("torch_dtype", None)
            config["dtype"] = name
    draft.config["dtype"] = name


def settings_from_beside(draft: Draft) -> None:
    """quantization_config from the file in which AutoGPTQ and AutoAWQ keep it."""
    checkpoint = draft.subject.checkpoint
    told = checkpoint.json("quantize_config.json") or checkpoint.json("quant_config.json")
    names = {"w_bit": "bits", "q_group_size": "group_size"}
    settings: dict[str, Any] = {names.get(key, key): value for key, value in told.items()}
    grouped = any("g_idx" in parts for parts in draft.subject.packed.values())
    settings.setdefault("quant_method", "gptq" if grouped else "awq")
    draft.settings.update(settings)


def missing_entries(draft: Draft) -> None:
    """What the tensors say of the entries that are not there."""
    subject, settings = draft.subject, draft.settings
    real: dict[str, Any] = {"bits": stored_bits(subject), "group_size": stored_group_size(subject)}
    flags = {"zero_point": True} if subject.method == "awq" else {"desc_act": False, "sym": True}
    settings |= {key: value for key, value in real.items() if settings.get(key) is None}
    settings |= {k: value for k, value in flags.items() if not isinstance(settings.get(k), bool)}


def bits(draft: Draft) -> None:
    """The tensors' width."""
    value = stored_bits(draft.subject)
    if draft.subject.method == "compressed-tensors":
        ct_weights(draft.settings)["num_bits"] = value
    else:
        draft.settings["bits"] = value


def group_size(draft: Draft) -> None:
    """The scales' group size."""
    value = stored_group_size(draft.subject)
    if draft.subject.method == "compressed-tensors":
        whole = {"strategy": "channel", "group_size": None}
        told = whole if value == -1 else {"strategy": "group", "group_size": value}
        ct_weights(draft.settings).update(told)
    else:
        draft.settings["group_size"] = value


def setting(name: str, value: object) -> Repair:
    """Set one entry of quantization_config."""
    return lambda draft: draft.settings.update({name: value})


def without(name: str) -> Repair:
    """Delete one entry of quantization_config."""

    def repair_one(draft: Draft) -> None:
        draft.settings.pop(name, None)

    return repair_one


def gptq_label(draft: Draft) -> None:
    """The label of the zero points as they are stored."""
    draft.settings.pop("format", None)
    draft.settings["checkpoint_format"] = stored_label(draft.subject)


def block(draft: Draft) -> None:
    """The decoder layers' name in memory."""
    draft.settings["block_name_to_quantize"] = draft.subject.arch.layers


def skip_list(draft: Draft) -> None:
    """Both spellings of every part, and of single linears that are stored in 16 bits."""
    arch = draft.subject.arch
    single = sorted(language_dense(draft.subject))
    vllm = [arch.vllm_name(arch.file_key(name)) for name in single]
    draft.settings[rules_awq.SKIP] = [*arch.never_quantized, *dict.fromkeys([*single, *vllm])]


def ignore(draft: Draft) -> None:
    """Every linear but those of regexes for every part beside the decoder layers."""
    draft.settings["ignore"] = rules_ct.repaired_ignore(draft.subject)
    next(iter(draft.settings["config_groups"].values()))["targets"] = ["Linear"]


# --- tensors ------------------------------------------------------------------------------------


def add_groups(draft: Draft) -> None:
    """g_idx of inputs that are grouped in order."""
    for name, parts in draft.subject.packed.items():
        if "g_idx" not in parts:
            width = draft.subject.skeleton.linears[name][1]
            scales = draft.subject.checkpoint.entries[parts["scales"]].shape
            make = partial(_ordered, width, width // scales[0])
            draft.put[draft.key(f"{name}.g_idx")] = (parts["qweight"], make)


def _ordered(width: int, span: int) -> Tensor:
    return torch.arange(width, dtype=torch.int32) // span


def add_zeros(draft: Draft) -> None:
    """Symmetric zero points under the config's label."""
    subject = draft.subject
    width = int(stored_bits(subject) or 0)
    field = (1 << (width - 1)) - ((stored_label(subject) or label(subject)) == "gptq")
    for name, parts in subject.packed.items():
        if "qzeros" not in parts:
            groups, out = subject.checkpoint.entries[parts["scales"]].shape
            make = partial(checks.constant_zeros, groups, out, width, field)
            draft.put[draft.key(f"{name}.qzeros")] = (parts["qweight"], make)


def as_words(draft: Draft) -> None:
    """Words in int32, bit for bit."""
    subject = draft.subject
    for parts in subject.packed.values():
        for part, key in parts.items():
            if subject.checkpoint.entries[key].dtype == "U32":
                draft.replace(key, partial(_words, subject, part, key))


def _words(subject: Subject, part: str, key: str) -> Tensor:
    words = checks.as_stored(part, subject.checkpoint.tensor(key))
    if words is None:
        raise ArtifactError(f"{key} does not fit into int32")
    return words


def sixteen_bits(draft: Draft) -> None:
    """Packed weights outside the decoder layers as the 16-bit weights that they stand for."""
    subject = draft.subject
    half = torch.float16 if named_dtype(subject.config) == "float16" else torch.bfloat16
    for name, parts in subject.packed.items():
        if subject.seen(name) != "language":
            draft.drop |= set(parts.values())
            make = partial(_dense, subject, name, half)
            draft.put[draft.key(f"{name}.weight")] = (parts["qweight"], make)
    if HEAD in subject.packed:
        draft.settings["lm_head"] = False


def _dense(subject: Subject, name: str, half: torch.dtype) -> Tensor:
    parts = {k: subject.checkpoint.tensor(key) for k, key in subject.packed[name].items()}
    width, size = int(stored_bits(subject) or 0), int(stored_group_size(subject) or 0)
    if subject.method == "awq":
        weight = dequantize_awq(parts["qweight"], parts["qzeros"], parts["scales"], size, name=name)
    else:
        v2 = (stored_label(subject) or label(subject)) == "gptq_v2"
        weight = dequantize_gptq(parts, width, size, v2=v2, name=name)
    return weight.to(half)


REPAIRS: Mapping[str, Repair] = {
    "weights-name": files_anew,
    "weights-twice": files_anew,
    "index-broken": files_anew,
    "image-token": image_token,
    "no-quantization-config": settings_from_beside,
    "config-keys": missing_entries,
    "dtype-unknown": dtype,
    "keys-spelling": published_keys,
    "vllm-spelling": published_keys,
    "keys-unknown": drop_unknown,
    "packed-dtype": as_words,
    "bits-differ": bits,
    "group-differs": group_size,
    "linear-not-packed": skip_list,
    "vision-quantized": sixteen_bits,
    "projector-quantized": sixteen_bits,
    "head-quantized": sixteen_bits,
    "gptq-label": gptq_label,
    "gptq-no-g-idx": add_groups,
    "gptq-no-qzeros": add_zeros,
    "gptq-desc-act": setting("desc_act", False),
    "gptq-sym": setting("sym", True),
    "gptq-dynamic": without("dynamic"),
    "block-wrong": block,
    "modules-list": without("modules_in_block_to_quantize"),
    "short-modules": without("modules_in_block_to_quantize"),
    "awq-skip-transformers": skip_list,
    "awq-skip-vllm": skip_list,
    "awq-skip-too-broad": skip_list,
    "awq-version": setting("version", "gemm"),
    "ct-ignore": ignore,
    "ct-ignore-vllm": ignore,
}
