"""Whole answers by an engine, greedily; rows that have ended leave the batch."""

from __future__ import annotations

from collections.abc import Sequence

from qatbench.engine.runner import Runner
from qatbench.vlm.batch import Encoded
from qatbench.vlm.generate import ends

ROOM = 64  # tokens that a batch gets room for at first; twice as many whenever they are used up


def written(runner: Runner, prompts: Sequence[Encoded], limit: int) -> list[list[int]]:
    """Tokens of each answer, `limit` at most, what ended it left out.

    A protocol may allow 2048 tokens of which an answer takes five: room is made as it is needed.
    """
    ending = ends(runner.loaded)
    found: list[list[int]] = [[] for _ in prompts]
    rows: list[int | None] = list(range(len(prompts)))  # of the batch; None: ended, still in it
    started = runner.start(prompts, min(limit, ROOM))
    fresh, told, left = started.first[:, None], 1, limit - 1
    while True:
        for at, tokens in enumerate(fresh.tolist()):
            row = rows[at]
            if row is None:
                continue
            end = next((i for i, token in enumerate(tokens) if token in ending), None)
            found[row] += tokens[:end]
            if end is not None:
                rows[at] = None
        going = [at for at, row in enumerate(rows) if row is not None]
        if not going or not left:
            return found
        if len(going) <= runner.shrinks_at * len(rows) and len(going) < len(rows):
            runner.keep(started, going)
            rows = [rows[at] for at in going]
        if told == started.room:
            runner.grow(started, min(left, told))
        count = min(runner.at_once, left, started.room - told)
        fresh, told, left = runner.step(started, count), told + count, left - count


def texts(runner: Runner, prompts: Sequence[Encoded], limit: int) -> list[str]:
    """Greedy responses to a batch of prompts; special tokens are dropped."""
    tokens = written(runner, prompts, limit)
    told: list[str] = runner.loaded.tokenizer.batch_decode(tokens, skip_special_tokens=True)
    return told
