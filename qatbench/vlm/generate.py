"""Generate mode: greedy answers of a batch; a row that has ended leaves the batch at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import Tensor

from qatbench.vlm.batch import Encoded, arithmetic, pixel_batch
from qatbench.vlm.load import Loaded


@torch.inference_mode()
def generate(loaded: Loaded, prompts: Sequence[Encoded], max_new_tokens: int) -> list[str]:
    """Greedy responses to a batch of prompts (left-padded); special tokens are dropped.

    The model's own generation settings (Qwen2.5-VL's penalty on repetitions) do not apply.
    """
    tokens = _greedy(loaded, prompts, max_new_tokens)
    texts: list[str] = loaded.tokenizer.batch_decode(tokens, skip_special_tokens=True)
    return texts


def _greedy(loaded: Loaded, prompts: Sequence[Encoded], limit: int) -> list[list[int]]:
    """Tokens of each answer, what ended it left out."""
    model, device = loaded.model, loaded.device
    length, ends = max(map(len, prompts)), _ends(loaded)
    ids = torch.full((len(prompts), length), loaded.tokenizer.pad_token_id or 0)
    mask = torch.zeros(len(prompts), length, dtype=torch.long)
    for b, prompt in enumerate(prompts):
        ids[b, length - len(prompt) :] = torch.tensor(prompt.ids)
        mask[b, length - len(prompt) :] = 1
    # All positions of a row, those of its answer at the end.
    places = [_padded(prompt.positions(limit), length + limit) for prompt in prompts]
    positions = torch.stack(places, dim=-2).to(device)
    cache = transformers.DynamicCache(config=model.config.get_text_config())
    inputs: dict[str, Any] = pixel_batch(prompts, device, arithmetic(model))
    inputs["input_ids"], mask = ids.to(device), mask.to(device)
    written: list[list[int]] = [[] for _ in prompts]
    rows = list(range(len(prompts)))  # those in the batch
    start = 0
    for step in range(limit):
        end = length + step
        logits = model(
            **inputs, attention_mask=mask, position_ids=positions[..., start:end],
            past_key_values=cache, use_cache=True, logits_to_keep=1,
        ).logits  # fmt: skip
        chosen = logits[:, -1].argmax(-1)
        going = []
        for at, token in enumerate(chosen.tolist()):
            if token not in ends:
                written[rows[at]].append(token)
                going.append(at)
        if not going:
            break
        if len(going) < len(rows):
            keep = torch.tensor(going, device=device)
            cache.batch_select_indices(keep)
            rows, chosen, mask = [rows[at] for at in going], chosen[keep], mask[keep]
            positions = positions.index_select(-2, keep)
        inputs = {"input_ids": chosen[:, None]}
        mask = torch.cat((mask, torch.ones_like(mask[:, :1])), 1)
        start = end
    return written


def _padded(positions: Tensor, length: int) -> Tensor:
    """Positions (..., n) with zeros before them: (..., length)."""
    return torch.nn.functional.pad(positions, (length - positions.shape[-1], 0))


def _ends(loaded: Loaded) -> set[int]:
    """Tokens that end an answer: what the model's generation settings say, else the tokenizer's."""
    told = loaded.model.generation_config.eos_token_id
    told = loaded.tokenizer.eos_token_id if told is None else told
    return set(told) if isinstance(told, list) else {told}
