"""Files around the weights, and what config.json says beside the quantization."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from qatbench.stages.verify.finding import Finding, few, found
from qatbench.stages.verify.reader import INDEX, SINGLE
from qatbench.stages.verify.subject import Subject

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
PROCESSORS = ("processor_config.json", "preprocessor_config.json")
TEMPLATES = ("chat_template.jinja", "chat_template.json")
ASKING = ("config.json", "tokenizer_config.json", *PROCESSORS)
HALVES = {"float16": "F16", "bfloat16": "BF16"}


def weight_files(subject: Subject) -> Iterator[Finding]:
    """Which files the weights are in, and what the index says of them."""
    checkpoint = subject.checkpoint
    if checkpoint.strays:
        yield found("weights-twice", few(checkpoint.strays), f"transformers reads {SINGLE} alone")
    if checkpoint.index is None:
        if checkpoint.files != (SINGLE,):
            yield found("weights-name", few(checkpoint.files))
        return
    named = checkpoint.index["weight_map"]
    if checkpoint.unnamed:
        yield found("index-broken", INDEX, f"it does not name {few(checkpoint.unnamed)}")
    elif "metadata" not in checkpoint.index:
        yield found(
            "index-broken", INDEX, "it has no metadata, which transformers reads",
            transformers="error", vllm="",
        )  # fmt: skip
    wrong = sorted(
        key
        for key in {**named, **checkpoint.entries}
        if key not in checkpoint.entries or named.get(key) != checkpoint.entries[key].file
        if key not in checkpoint.entries or checkpoint.entries[key].file not in checkpoint.unnamed
    )
    if wrong:
        yield found("index-stale", INDEX, few(wrong))


def companions(subject: Subject) -> Iterator[Finding]:
    """Tokenizer, processor, chat template, and entries that ask for code."""
    checkpoint = subject.checkpoint
    where = str(checkpoint.path)
    if not checkpoint.has(*TOKENIZERS):
        yield found("no-tokenizer", where, f"none of {', '.join(TOKENIZERS)}")
    if subject.arch.is_vlm and not checkpoint.has(*PROCESSORS):
        yield found("no-processor", where, f"none of {', '.join(PROCESSORS)}")
    if subject.arch.is_vlm and not has_template(subject):
        yield found("no-chat-template", where)
    asking = [name for name in ASKING if "auto_map" in checkpoint.json(name)]
    if asking:
        yield found("remote-code", f"{', '.join(asking)}: auto_map")


def has_template(subject: Subject) -> bool:
    """Whether some file holds a chat template."""
    checkpoint = subject.checkpoint
    inside = ("tokenizer_config.json", *PROCESSORS)
    return checkpoint.has(*TEMPLATES) or any(
        checkpoint.json(name).get("chat_template") for name in inside
    )


def image_token(subject: Subject) -> Iterator[Finding]:
    """The visual token's id in the config against the tokenizer's."""
    if not subject.arch.is_vlm:
        return
    keys = subject.arch.image_token_keys
    named = next((subject.config[key] for key in keys if subject.config.get(key) is not None), None)
    mark, known = tokenizer_mark(subject)
    where = f"config.json: {' or '.join(keys)}"
    if named is None:
        default = subject.skeleton.image_token
        harmless = {} if known is None or known != default else {"transformers": "", "vllm": ""}
        yield found(
            "image-token", where, f"missing, so the class's {default} is taken; {mark} is {known}",
            repairable=known is not None, **harmless,
        )  # fmt: skip
    elif known is not None and named != known:
        yield found("image-token", where, f"{named}, but {mark} is {known}", repairable=True)


def tokenizer_mark(subject: Subject) -> tuple[str, int | None]:
    """The visual token and its id in the tokenizer's files; None where they do not say."""
    settings = subject.checkpoint.json("tokenizer_config.json")
    extra = settings.get("extra_special_tokens")
    named = [extra.get("image_token")] if isinstance(extra, dict) else []
    told = [text for text in (*named, settings.get("image_token")) if isinstance(text, str)]
    mark = told[0] if told else str(subject.arch.image_mark)
    listed = subject.checkpoint.json("tokenizer.json").get("added_tokens")
    rows = [(row.get("content"), row.get("id")) for row in _objects(listed)]
    decoder = settings.get("added_tokens_decoder")
    if isinstance(decoder, dict):
        numbers = {number: row for number, row in decoder.items() if number.isdigit()}
        rows += [
            (row.get("content"), int(number))
            for number, row in numbers.items()
            if isinstance(row, dict)
        ]
    rows += list(subject.checkpoint.json("added_tokens.json").items())
    known = [number for text, number in rows if text == mark and isinstance(number, int)]
    return mark, known[-1] if known else None


def _objects(listed: object) -> list[dict[str, Any]]:
    return [row for row in listed if isinstance(row, dict)] if isinstance(listed, list) else []


def dtypes(subject: Subject) -> Iterator[Finding]:
    """The config's dtype against itself and the tensors."""
    outer = named_dtype(subject.config)
    nested = {
        key: named_dtype(value)
        for key, value in subject.config.items()
        if key in ("text_config", "vision_config") and isinstance(value, dict)
    }
    named = [name for name in (outer, *nested.values()) if name is not None]
    unknown = [x for x in named if not isinstance(getattr(torch, x, None), torch.dtype)]
    if unknown:
        yield found("dtype-unknown", "config.json: dtype", repr(unknown[0]))
        return
    other = [f"{key} {name}" for key, name in nested.items() if name not in (None, outer)]
    if other:
        yield found("dtype-nested", "config.json: dtype", f"{outer}, but {', '.join(other)}")
    wanted = HALVES.get(outer or "")
    entries = [subject.checkpoint.entries[key] for key in subject.dense.values()]
    kinds = sorted({e.dtype for e in entries if e.dtype in ("F64", "F32", "F16", "BF16")})
    if wanted and kinds and kinds != [wanted]:
        yield found("dtype-cast", "config.json: dtype", f"{outer}, stored {', '.join(kinds)}")
    if subject.method == "awq" and outer == "bfloat16" and "qwen2" in subject.arch.model_type:
        yield found("awq-fp16", "config.json: dtype")


def named_dtype(config: Mapping[str, Any]) -> str | None:
    """The dtype that a config names, by its new or its old key."""
    name = config.get("dtype", config.get("torch_dtype"))
    return None if name is None else str(name).removeprefix("torch.")
