"""Questions -> batches -> predictions: what one model answers under one protocol a task.

An option mode answer is the option of the highest mean log-probability, rounded to 1e-6 nats
before it is judged, so that the letters of predictions.jsonl follow from the scores in it.
"""

from __future__ import annotations

import hashlib
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from qatbench.errors import ArtifactError, NumericsError, PrerequisiteError
from qatbench.records import Prediction, Question
from qatbench.tasks import protocols
from qatbench.tasks.answers_meta import meta_of
from qatbench.tasks.protocols import Protocol
from qatbench.vlm.batch import Encoded, Encoder
from qatbench.vlm.generate import generate
from qatbench.vlm.scoring import OptionRow, score_options

Mode = Literal["options", "generate"]
Writer = Callable[[Sequence[Encoded], int], list[str]]
"""Prompts and a limit of tokens -> greedy responses."""
Key = tuple[str, str]
"""(task, id): what names a question."""
DIGITS = 6  # of a score, nats


@dataclass(frozen=True)
class Item:
    """A question ready to run, or the reason why it cannot.

    The prompt holds no pixels: those of a whole test set would fill the memory.
    """

    question: Question
    protocol: Protocol
    prompt: Encoded | None = None
    answers: list[list[int]] | None = None  # tokens of each option; None in generate mode
    error: str | None = None

    @property
    def key(self) -> Key:
        """Task and id."""
        return self.question.task, self.question.id

    @property
    def cost(self) -> int:
        """Tokens of the sequence that is run."""
        return len(self.prompt or ()) + sum(len(answer) - 1 for answer in self.answers or ())


def prepare(encoder: Encoder, question: Question, protocol: Protocol, mode: Mode) -> Item:
    """Encode a question; a missing or damaged image becomes an error item, not an answer.

    Raises: UsageError for an image question and a text model.
    """
    try:
        prompt = encoder.prompt(protocol.prompt(question), question.image)
        answers = None
        if mode == "options":
            texts = [protocol.continuation(question, letter) for letter in question.options]
            answers = [encoder.answer(prompt, text) for text in texts]
    except (PrerequisiteError, ArtifactError) as error:
        return Item(question, protocol, error=error.message)
    return Item(question, protocol, replace(prompt, pixels={}), answers)


def batches(items: Sequence[Item], size: int | None, budget: int) -> list[list[Item]]:
    """Longest first, `size` rows or `budget` padded tokens a batch, one protocol a batch.

    Items in error come first, each by itself.
    """
    formed: list[list[Item]] = [[item] for item in items if item.error]
    names = dict.fromkeys(item.protocol.name for item in items)
    for name in names:
        rest = [item for item in items if not item.error and item.protocol.name == name]
        rest.sort(key=lambda item: -item.cost)
        start = 0
        while start < len(rest):
            rows = size or max(1, budget // max(1, rest[start].cost))
            formed.append(rest[start : start + rows])
            start += rows
    return formed


def distinct(items: Sequence[Item]) -> tuple[list[Item], dict[Key, Item]]:
    """Items to run, and for every other one the item that is the same to the model.

    Where options are not shown, the passes of a circular question differ in their order alone.
    """
    first: dict[Any, Item] = {}
    run, twins = [], {}
    for item in items:
        q = item.question
        if item.error or item.answers is None or q.group is None:
            run.append(item)
            continue
        prompt, answers = tuple(item.prompt.ids if item.prompt else ()), sorted(item.answers)
        same = (q.task, q.group, item.protocol.name, prompt, q.image, tuple(map(tuple, answers)))
        if same in first:
            twins[item.key] = first[same]
        else:
            first[same] = item
            run.append(item)
    return run, twins


def mirrored(item: Item, twin: Item, row: Prediction) -> Prediction:
    """The answer of an item from that of its twin: each option has the score that it has there."""
    assert item.answers is not None
    assert twin.answers is not None
    known = zip(twin.answers, (row.scores or {}).values(), strict=True)
    scores = {tuple(tokens): score for tokens, score in known}
    return _scored(item, [scores[tuple(tokens)] for tokens in item.answers])


def ahead(
    encoder: Encoder, batches: Iterable[Sequence[Item]]
) -> Iterator[tuple[Sequence[Item], list[Encoded]]]:
    """Each batch with its prompts, pixels included, which are made while the one before runs."""
    waiting: deque[tuple[Sequence[Item], Future[list[Encoded]]]] = deque()
    with ThreadPoolExecutor(max_workers=1) as pool:
        for batch in batches:
            waiting.append((batch, pool.submit(pictured, encoder, batch)))
            if len(waiting) > 1:
                first, prompts = waiting.popleft()
                yield first, prompts.result()
        for last, prompts in waiting:
            yield last, prompts.result()


def pictured(encoder: Encoder, batch: Sequence[Item]) -> list[Encoded]:
    """Prompts of a batch with their pixels; none for items in error."""
    return [_with_pixels(encoder, item) for item in batch if not item.error]


def answer(
    encoder: Encoder,
    batch: Sequence[Item],
    prompts: Sequence[Encoded] | None = None,
    write: Writer | None = None,
) -> list[Prediction]:
    """Answer one batch; out of GPU memory, answer its halves.

    `prompts` are those of `pictured`; they are made here if None. `write` is what writes answers in
    generate mode, the plain model if None.

    Raises: NumericsError when a score is not finite; PrerequisiteError when a single question
        does not fit into memory.
    """
    prompts = pictured(encoder, batch) if prompts is None else prompts
    try:
        return _answer(encoder, batch, prompts, write)
    except torch.OutOfMemoryError:
        if len(batch) == 1:
            raise PrerequisiteError(
                f"question {batch[0].question.id} alone does not fit into memory",
                hint="a smaller model, --dtype bfloat16, or a larger device",
            ) from None
        torch.cuda.empty_cache()
    middle = len(batch) // 2
    halves = (batch[:middle], prompts[:middle]), (batch[middle:], prompts[middle:])
    return [row for half in halves for row in answer(encoder, *half, write)]


def _answer(
    encoder: Encoder, batch: Sequence[Item], prompts: Sequence[Encoded], write: Writer | None
) -> list[Prediction]:
    if batch[0].error:
        return [_row(item, status="error", error=item.error) for item in batch]
    if batch[0].answers is not None:
        rows = [OptionRow(p, item.answers or []) for p, item in zip(prompts, batch, strict=True)]
        scores = score_options(encoder.loaded, rows)
        return [_scored(item, some) for item, some in zip(batch, scores, strict=True)]
    limit = batch[0].protocol.max_new_tokens
    texts = write(prompts, limit) if write else generate(encoder.loaded, prompts, limit)
    return [_extracted(item, text.strip()) for item, text in zip(batch, texts, strict=True)]


def _with_pixels(encoder: Encoder, item: Item) -> Encoded:
    assert item.prompt is not None
    if item.question.image is None:
        return item.prompt
    if (pixels := encoder.pixels(item.question.image)) is not None:
        return replace(item.prompt, pixels=pixels)
    return encoder.prompt(item.protocol.prompt(item.question), item.question.image)


def _scored(item: Item, scores: Sequence[float]) -> Prediction:
    question = item.question
    if not all(map(math.isfinite, scores)):
        raise NumericsError(
            f"question {question.id}: option scores are not finite: {scores}",
            hint="the model overflows: try --dtype float32, or check its weights",
        )
    rounded = {k: round(v, DIGITS) for k, v in zip(question.options, scores, strict=True)}
    best = max(rounded.values())
    winners = [letter for letter, score in rounded.items() if score == best]
    return _row(item, status="ok", chosen=winners[0], scores=rounded, tie=len(winners) > 1)


def _extracted(item: Item, text: str) -> Prediction:
    chosen = item.protocol.extract(text, item.question.options)
    return _row(
        item,
        status="ok" if chosen else "unparsed",
        chosen=chosen,
        raw=text,
        raw_sha256=hashlib.sha256(text.encode()).hexdigest(),
        raw_length=len(text),
    )


def _row(item: Item, **fields: Any) -> Prediction:
    """A prediction; rows with one `group` count as one question, with one `pass_of` they do not."""
    question = item.question
    return Prediction(
        id=question.id,
        task=question.task,
        choices=tuple(question.options),
        gold=question.gold,
        meta=meta_of(question, circular=item.protocol.circular),
        **({"chosen": None} | fields),
    )


def items_of(
    encoder: Encoder, questions: Sequence[Question], named: Mapping[str, str], mode: Mode
) -> list[Item]:
    """Prepare all questions; `named` gives each task's protocol."""
    table = {task: protocols.get(name) for task, name in named.items()}
    return [prepare(encoder, question, table[question.task], mode) for question in questions]
