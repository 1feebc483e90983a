"""Option mode: the log-probability of every option of a question, from one forward.

A sequence holds the prompt once, images included, and then every option side by side: an option's
tokens see the prompt and themselves, at the positions right after the prompt. The last token of an
option is only predicted, never read, so options of one token (letters) add nothing: prompts then
run as they are, and attention needs no mask of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qatbench.vlm.batch import Encoded, arithmetic, backbone, pixel_batch
from qatbench.vlm.load import Loaded


@dataclass(frozen=True)
class OptionRow:
    """One question ready to be scored: prompt and one continuation an option."""

    prompt: Encoded
    answers: list[list[int]]

    def __len__(self) -> int:
        return len(self.prompt) + sum(len(answer) - 1 for answer in self.answers)


@torch.inference_mode()
def score_options(loaded: Loaded, rows: Sequence[OptionRow]) -> list[list[float]]:
    """Mean log-probability (nats a token) of each option after its prompt.

    Returns: one list a row, one float an option; the log-softmax is in fp32.
    """
    model, device = loaded.model, loaded.device
    asked, rows = rows, [_unique(row) for row in rows]
    ids, positions, mask = _layout(rows, loaded.tokenizer.pad_token_id or 0)
    hidden = backbone(model)(
        input_ids=ids.to(device),
        position_ids=positions.to(device),
        attention_mask=None if mask is None else mask.to(device)[:, None],
        use_cache=False,
        **pixel_batch([row.prompt for row in rows], device, arithmetic(model)),
    ).last_hidden_state
    where, tokens = _predictors(rows)
    flat = hidden.reshape(-1, hidden.shape[-1])
    logprobs = _token_logprobs(model.lm_head, flat, where.to(device), tokens.to(device)).tolist()
    scores: list[list[float]] = []
    at = 0
    for row, given in zip(rows, asked, strict=True):
        means: dict[tuple[int, ...], float] = {}
        for answer in row.answers:
            means[tuple(answer)] = sum(logprobs[at : at + len(answer)]) / len(answer)
            at += len(answer)
        scores.append([means[tuple(answer)] for answer in given.answers])
    return scores


def _unique(row: OptionRow) -> OptionRow:
    """The row with equal options once: they tie exactly, whatever the kernels' rounding."""
    return OptionRow(row.prompt, [list(ids) for ids in dict.fromkeys(map(tuple, row.answers))])


def _layout(rows: Sequence[OptionRow], pad: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Token ids (B, L), positions (B, L) and the boolean mask (B, L, L): True where i sees j.

    Positions have the shape (3, B, L) for M-RoPE. Where no row holds a token of an option the mask
    is None: all is causal, padding comes last, and its positions count on.
    """
    length = max(map(len, rows))
    ids = torch.full((len(rows), length), pad)
    for b, row in enumerate(rows):
        ids[b, : len(row.prompt)] = torch.tensor(row.prompt.ids)
    if all(len(row) == len(row.prompt) for row in rows):
        each = [row.prompt.positions(length - len(row.prompt)) for row in rows]
        return ids, torch.stack(each, dim=-2), None
    axes = rows[0].prompt.positions().shape[:-1]  # (3,) for M-RoPE, else ()
    positions = torch.zeros(*axes, len(rows), length, dtype=torch.long)
    mask = torch.eye(length, dtype=torch.bool).repeat(len(rows), 1, 1)  # padding sees itself
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    for b, row in enumerate(rows):
        start = len(row.prompt)
        positions[..., b, :start] = row.prompt.positions()
        mask[b, :start, :start] = causal[:start, :start]
        at = start
        for answer in row.answers:
            read = len(answer) - 1
            end = at + read
            ids[b, at:end] = torch.tensor(answer[:read], dtype=torch.long)
            positions[..., b, at:end] = row.prompt.positions(read)[..., start:]
            mask[b, at:end, :start] = True
            mask[b, at:end, at:end] = causal[:read, :read]
            at = end
    return ids, positions, mask


def _predictors(rows: Sequence[OptionRow]) -> tuple[Tensor, Tensor]:
    """Flat positions whose output predicts each answer token, and those tokens."""
    length = max(map(len, rows))
    where: list[int] = []
    tokens: list[int] = []
    for b, row in enumerate(rows):
        last, at = len(row.prompt) - 1, len(row.prompt)
        for answer in row.answers:
            inside = [last, *range(at, at + len(answer) - 1)]
            where.extend(b * length + position for position in inside)
            tokens.extend(answer)
            at += len(answer) - 1
    return torch.tensor(where), torch.tensor(tokens)


def _token_logprobs(
    head: nn.Module, hidden: Tensor, where: Tensor, tokens: Tensor, chunk: int = 1024
) -> Tensor:
    """Log p of each token by the output at its place; a place that predicts several runs once."""
    places, which = torch.unique(where, return_inverse=True)
    found = torch.empty(len(where), dtype=torch.float32, device=hidden.device)
    for start in range(0, len(places), chunk):
        logp = head(hidden[places[start : start + chunk]]).float().log_softmax(-1)
        own = (which >= start) & (which < start + chunk)
        found[own] = logp[which[own] - start, tokens[own]]
    return found
