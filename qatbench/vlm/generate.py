"""Greedy decoding with the plain model; in generate mode a row that has ended leaves the batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor

from qatbench.vlm.batch import Encoded, arithmetic, pixel_batch
from qatbench.vlm.load import Loaded


@dataclass
class Decoding:
    """A left-padded batch on its way, everything on the device.

    `inputs` are what the next forward reads: the prompts with their pixels, then a token a row.
    """

    inputs: dict[str, Any]
    mask: Tensor  # (B, keys) int64: 0 at padding; the tokens that are read next are keys too
    positions: Tensor  # (B, prompt + room), of all that is ever read; M-RoPE: (3, B, prompt + room)
    cache: transformers.DynamicCache
    read: int = 0  # columns that were read: padding, prompt and tokens


def begin(loaded: Loaded, prompts: Sequence[Encoded], room: int) -> Decoding:
    """Pad a batch of prompts on the left, with positions for `room` tokens a row."""
    length, device = max(map(len, prompts)), loaded.device
    ids = torch.full((len(prompts), length), loaded.tokenizer.pad_token_id or 0)
    mask = torch.zeros(len(prompts), length, dtype=torch.long)
    for b, prompt in enumerate(prompts):
        ids[b, length - len(prompt) :] = torch.tensor(prompt.ids)
        mask[b, length - len(prompt) :] = 1
    # All positions of a row, those of its answer at the end.
    places = [_padded(prompt.positions(room), length + room) for prompt in prompts]
    inputs: dict[str, Any] = pixel_batch(prompts, device, arithmetic(loaded.model))
    inputs["input_ids"] = ids.to(device)
    cache = transformers.DynamicCache(config=loaded.model.config.get_text_config())
    return Decoding(inputs, mask.to(device), torch.stack(places, dim=-2).to(device), cache)


@torch.inference_mode()
def tell(loaded: Loaded, batch: Decoding) -> Tensor:
    """One forward: the most likely next token of every row, (B,) int64; it is read by the next."""
    end = batch.mask.shape[1]
    logits = loaded.model(
        **batch.inputs, attention_mask=batch.mask,
        position_ids=batch.positions[..., batch.read : end],
        past_key_values=batch.cache, use_cache=True, logits_to_keep=1,
    ).logits  # fmt: skip
    chosen: Tensor = logits[:, -1].argmax(-1)
    batch.inputs = {"input_ids": chosen[:, None]}
    batch.mask = torch.cat((batch.mask, torch.ones_like(batch.mask[:, :1])), 1)
    batch.read = end
    return chosen


def keep(batch: Decoding, rows: Sequence[int]) -> None:
    """Go on with these rows alone."""
    chosen = torch.tensor(rows, device=batch.mask.device)
    batch.cache.batch_select_indices(chosen)
    batch.inputs = {"input_ids": batch.inputs["input_ids"][chosen]}
    batch.mask = batch.mask[chosen]
    batch.positions = batch.positions.index_select(-2, chosen)


@torch.inference_mode()
def generate(loaded: Loaded, prompts: Sequence[Encoded], max_new_tokens: int) -> list[str]:
    """Greedy responses to a batch of prompts (left-padded); special tokens are dropped.

    The model's own generation settings (Qwen2.5-VL's penalty on repetitions) do not apply.
    """
    tokens = _greedy(loaded, prompts, max_new_tokens)
    texts: list[str] = loaded.tokenizer.batch_decode(tokens, skip_special_tokens=True)
    return texts


def _greedy(loaded: Loaded, prompts: Sequence[Encoded], limit: int) -> list[list[int]]:
    """Tokens of each answer, what ended it left out. Engines are held to it."""
    ending, batch = ends(loaded), begin(loaded, prompts, limit)
    written: list[list[int]] = [[] for _ in prompts]
    rows = list(range(len(prompts)))  # those in the batch
    for _ in range(limit):
        going = []
        for at, token in enumerate(tell(loaded, batch).tolist()):
            if token not in ending:
                written[rows[at]].append(token)
                going.append(at)
        if not going:
            break
        if len(going) < len(rows):
            keep(batch, going)
            rows = [rows[at] for at in going]
    return written


def _padded(positions: Tensor, length: int) -> Tensor:
    """Positions (..., n) with zeros before them: (..., length)."""
    return torch.nn.functional.pad(positions, (length - positions.shape[-1], 0))


def ends(loaded: Loaded) -> set[int]:
    """Tokens that end an answer: what the model's generation settings say, else the tokenizer's."""
    told = loaded.model.generation_config.eos_token_id
    told = loaded.tokenizer.eos_token_id if told is None else told
    return set(told) if isinstance(told, list) else {told}
