"""Questions -> supervised token sequences -> micro-batches, in an order that needs no state.

Which questions an optimizer step holds, how their options are shuffled and in which format they
are put depends on (seed, position) alone: a resumed run sees what an uninterrupted one sees.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from qatbench.errors import ArtifactError, UsageError
from qatbench.records import LETTERS, Question
from qatbench.tasks import protocols
from qatbench.vlm.batch import Encoded, Encoder, pixel_batch
from qatbench.vlm.load import Loaded

PACK = 512
"""Tokens of a packed sequence; a longer row has one for itself."""


@dataclass(frozen=True)
class Row:
    """One training sample: a prompt and the target tokens that are supervised."""

    prompt: Encoded
    target: list[int]

    def __len__(self) -> int:
        return len(self.prompt) + len(self.target)


@dataclass(frozen=True)
class MicroBatch:
    """Model inputs and where they are supervised.

    Shapes: input_ids, position_ids (B, L); attention_mask (B, 1, L, L), True where i sees j;
    where (N,) flat positions whose output predicts the supervised target (N,), rising; every (M,)
    and every_target (M,): the same for all tokens of text, supervised or not; images: flat
    positions of each image's visual tokens.
    """

    inputs: dict[str, Tensor]
    where: Tensor
    target: Tensor
    images: list[Tensor]
    every: Tensor
    every_target: Tensor


class TrainingData:
    """The stream of samples of one run.

    Raises: UsageError for an unknown format or no questions; ArtifactError for a question
        without an answer.
    """

    def __init__(
        self, loaded: Loaded, questions: Sequence[Question], formats: Sequence[str], seed: int
    ) -> None:
        if not questions or not formats:
            raise UsageError("training needs questions and at least one prompt format")
        for name in formats:
            if name != protocols.CHOICES:
                protocols.get(name)
        for question in questions:
            if question.gold is None:
                raise ArtifactError(f"training question {question.id} has no answer")
        self.encoder = Encoder(loaded)
        self.questions = list(questions)
        self.formats = list(formats)
        self.seed = seed
        self.image_token = next(
            (t for k in loaded.arch.image_token_keys if (t := loaded.folder.config.get(k))), None
        )
        eos = loaded.tokenizer.eos_token_id
        self.end = [] if eos is None else [int(eos)]

    def step(self, number: int, batch_size: int) -> list[Row]:
        """The samples of one optimizer step, shortest first."""
        start = number * batch_size
        rows = [self._row(position) for position in range(start, start + batch_size)]
        return sorted(rows, key=len)

    def _row(self, position: int) -> Row:
        epoch, index = divmod(position, len(self.questions))
        question = self.questions[_order(len(self.questions), self.seed, epoch)[index]]
        draw = random.Random(f"{self.seed}/{position}")
        name = draw.choice(self.formats)
        question = _shuffled(question, draw)
        text, answer = protocols.with_answer(question, name)
        prompt = self.encoder.prompt(text, question.image)
        return Row(prompt, self.encoder.answer(prompt, answer) + self.end)

    def collate(self, rows: Sequence[Row], device: torch.device, dtype: torch.dtype) -> MicroBatch:
        """Pack rows into sequences: each sees itself only, from position 0 on."""
        packs = _packs(rows)
        length = max(sum(map(len, pack)) for pack in packs)
        ids = torch.zeros(len(packs), length, dtype=torch.long)
        positions = torch.zeros(len(packs), length, dtype=torch.long)
        owner = torch.arange(-1, -length - 1, -1).repeat(len(packs), 1)  # padding sees itself
        where: list[int] = []
        target: list[int] = []
        images: list[Tensor] = []
        every: list[int] = []
        every_target: list[int] = []
        for b, pack in enumerate(packs):
            at = 0
            for number, row in enumerate(pack):
                end = at + len(row)
                ids[b, at:end] = torch.tensor(row.prompt.ids + row.target)
                positions[b, at:end] = torch.arange(len(row))
                owner[b, at:end] = number
                before = b * length + at + len(row.prompt) - 1
                where += range(before, before + len(row.target))
                target += row.target
                for place, token in enumerate((row.prompt.ids + row.target)[1:]):
                    if token != self.image_token:
                        every.append(b * length + at + place)
                        every_target.append(token)
                if row.prompt.pixels and self.image_token is not None:
                    seen = torch.tensor(row.prompt.ids) == self.image_token
                    images.append((seen.nonzero()[:, 0] + b * length + at).to(device))
                at = end
        owner = owner.to(device)
        mask = (owner[:, :, None] == owner[:, None]).tril()
        inputs = {
            "input_ids": ids.to(device),
            "position_ids": positions.to(device),
            "attention_mask": mask[:, None],
        }
        ordered = [row.prompt for pack in packs for row in pack]
        inputs |= pixel_batch(ordered, device, dtype)
        places = (torch.tensor(p, device=device) for p in (where, target, every, every_target))
        where_, target_, every_, every_target_ = places
        return MicroBatch(inputs, where_, target_, images, every_, every_target_)


def _packs(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows put side by side, longest first, into sequences of at most PACK tokens.

    Little padding, and attention stays far from quadratic in the whole micro-batch.
    """
    room = max(PACK, *map(len, rows))
    packs: list[list[Row]] = []
    for row in sorted(rows, key=len, reverse=True):
        fits = (pack for pack in packs if sum(map(len, pack)) + len(row) <= room)
        pack = next(fits, None)
        if pack is None:
            packs.append([row])
        else:
            pack.append(row)
    return packs


@lru_cache(maxsize=4)
def _order(n: int, seed: int, epoch: int) -> tuple[int, ...]:
    order = list(range(n))
    random.Random(f"{seed}/epoch-{epoch}").shuffle(order)
    return tuple(order)


def _shuffled(question: Question, draw: random.Random) -> Question:
    """The same question with its options in another order, letters given anew."""
    texts = list(question.options.items())
    draw.shuffle(texts)
    options = {letter: text for letter, (_, text) in zip(LETTERS, texts, strict=False)}
    gold = next(new for new, (old, _) in zip(LETTERS, texts, strict=False) if old == question.gold)
    return question.model_copy(update={"options": options, "gold": gold})
