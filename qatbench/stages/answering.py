"""All questions of an evaluation, batch by batch, into a file that a cut-off run goes on from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from qatbench import store
from qatbench.errors import PrerequisiteError
from qatbench.records import Prediction, Question
from qatbench.stages.common import Progress
from qatbench.vlm import answer, layout
from qatbench.vlm.answer import Item, Key, Mode, Writer
from qatbench.vlm.batch import Encoder
from qatbench.vlm.load import Loaded, ModelFolder

PARTIAL = "predictions.partial.jsonl"
ON_CPU = 2048  # padded tokens a batch: more are not faster there
OPTIONS_ON_CPU = 512  # in option mode: what a layer makes of them stays in the caches
AT_MOST = 65536  # and on a GPU
SHARE = 0.6  # of the free memory that a batch may take


class Answered(NamedTuple):
    """Predictions in the order asked."""

    rows: list[Prediction]
    now: int  # answered by this run, the others by an earlier one


class Batching(NamedTuple):
    """How questions are put together, and which of the batches are run."""

    size: int | None = None  # rows a batch; None: as many as `tokens` allow
    tokens: int = ON_CPU  # padded, a batch
    part: tuple[int, int] = (1, 1)  # (k, n): every n-th batch, from the k-th on

    def file(self, partial: Path) -> Path:
        """Where the part's answers are collected."""
        number, parts = self.part
        return partial if parts == 1 else partial.with_suffix(f".{number}-of-{parts}.jsonl")


def collected(partial: Path) -> list[Path]:
    """The files that hold answers of an unfinished evaluation, those of parts too."""
    return [file for file in (partial, *sorted(partial.parent.glob(f"{partial.stem}.*-of-*.jsonl")))
            if file.exists()]  # fmt: skip


def answer_all(
    loaded: Loaded,
    asked: Mapping[str, Sequence[Question]],
    protocol: Mapping[str, str],
    mode: Mode,
    partial: Path,
    progress: Progress,
    batching: Batching = Batching(),  # noqa: B008 (immutable)
    write: Writer | None = None,
) -> Answered:
    """Answer all questions, batch by batch, appending to `partial`.

    `write` is what writes answers in generate mode, the plain model if None. What is collected
    already is kept; its errors are tried again. Of a part of the batches only their rows come back.
    """
    encoder = Encoder(loaded)
    progress("Reading the questions", 0, 0)
    questions = [question for rows in asked.values() for question in rows]
    items = answer.items_of(encoder, questions, protocol, mode)
    run, twins = answer.distinct(items)
    number, parts = batching.part
    batches = answer.batches(run, batching.size, batching.tokens)[number - 1 :: parts]
    total = sum(map(len, batches))
    done = _whole_batches(collected(partial), batches)
    kept = set(done)
    own = batching.file(partial)
    store.write_text(own, store.as_lines(done.values()))
    todo = [batch for batch in batches if batch[0].key not in done]
    with own.open("a", encoding="utf-8") as stream:
        for batch, prompts in answer.ahead(encoder, todo):
            rows = answer.answer(encoder, batch, prompts, write)
            done |= {(row.task, row.id): row for row in rows}
            stream.write(store.as_lines(rows))
            stream.flush()
            progress("Answering", len(done), total)
    found, now = [], 0
    for item in items:
        twin = twins.get(item.key, item)
        if twin.key in done:
            row = done[twin.key]
            found.append(row if twin is item else answer.mirrored(item, twin, row))
            now += twin.key not in kept
    return Answered(found, now)


def found_tokens(
    model: ModelFolder, device: str, dtype: torch.dtype, mode: Mode, workers: int = 1
) -> int:
    """Padded tokens a batch that the free memory of a GPU holds beside the weights of each worker.

    A layer's widest moment is counted, and in generate mode the cache. On a CPU a constant, by
    mode.

    Raises: PrerequisiteError when the weights alone do not fit.
    """
    if device == "cpu":
        return OPTIONS_ON_CPU if mode == "options" else ON_CPU
    sizes = layout.text_sizes(model.config)
    hidden, heads = int(sizes["hidden_size"]), int(sizes["num_attention_heads"])
    each = dtype.itemsize * (4 * int(sizes["intermediate_size"]) + 8 * hidden)
    if mode == "generate":
        width = int(sizes.get("head_dim") or hidden // heads)
        cached = int(sizes.get("num_key_value_heads") or heads) * width
        each += 2 * dtype.itemsize * int(sizes["num_hidden_layers"]) * cached
    free, _ = torch.cuda.mem_get_info(torch.device(device))
    room = free / workers - model.weight_bytes()
    if room <= 0:
        raise PrerequisiteError(
            f"{workers} x {model.weight_bytes() / 1e9:.1f} GB of weights do not fit into the "
            f"{free / 1e9:.1f} GB that are free on {device}",
            hint="fewer --jobs, or another --device",
        )
    return max(ON_CPU, min(AT_MOST, int(SHARE * room / each)))


def _whole_batches(
    files: Sequence[Path], batches: Sequence[Sequence[Item]]
) -> dict[Key, Prediction]:
    """Rows of batches that were answered as a whole; errors are not answers."""
    rows = [row for file in files for row in store.read_predictions(file, torn_tail=True)]
    found = {(row.task, row.id): row for row in rows if row.status != "error"}
    done: dict[Key, Prediction] = {}
    for batch in batches:
        if all(item.key in found for item in batch):
            done |= {item.key: found[item.key] for item in batch}
    return done
