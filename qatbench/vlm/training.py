"""Samples -> supervised token sequences -> micro-batches, in an order that needs no state.

Which samples an optimizer step holds, how a question's options are shuffled and in which format it
is put depends on (seed, position) alone: a resumed run sees what an uninterrupted one sees.
A question is put in a prompt format; a conversation in the model's own chat template, and each of
its answers is supervised with the token that ends it. Where a template ends an answer without one,
the end of sequence is put there, as LLaVA's training does.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import torch
from jinja2 import TemplateError
from torch import Tensor

from qatbench.errors import ArtifactError, PrerequisiteError, UsageError
from qatbench.records import Question
from qatbench.tasks import protocols, sources
from qatbench.tasks.conversations import Chat, Conversation, Said, Turn, UnusableError
from qatbench.tasks.sources import Source
from qatbench.vlm.batch import Encoded, Encoder, pixel_batch
from qatbench.vlm.load import Loaded

PACK = 512
"""Tokens of a packed sequence; a longer row has one for itself."""
TRIES = 20
"""Samples that may be unusable one after another before that is an error."""


@dataclass(frozen=True)
class Row:
    """One training sample: a prompt with all of its images, and the tokens after it.

    `spans` are the supervised parts, [start, end) in the tokens of both, rising.
    """

    prompt: Encoded
    rest: list[int]
    spans: tuple[tuple[int, int], ...]

    def __len__(self) -> int:
        return len(self.prompt) + len(self.rest)

    @cached_property
    def ids(self) -> list[int]:
        """All tokens."""
        return self.prompt.ids + self.rest

    @property
    def target(self) -> list[int]:
        """The supervised tokens."""
        return [token for start, end in self.spans for token in self.ids[start:end]]

    def cut(self, length: int) -> Row:
        """The first `length` tokens, which hold at least the prompt and one token more."""
        kept = tuple((start, min(end, length)) for start, end in self.spans if start < length)
        return replace(self, rest=self.rest[: length - len(self.prompt)], spans=kept)


@dataclass(frozen=True)
class MicroBatch:
    """Model inputs and where they are supervised.

    Shapes: input_ids (B, L); position_ids (B, L), (3, B, L) for M-RoPE; attention_mask
    (B, 1, L, L), True where i sees j, absent where each sequence is one row (causal order says
    it all then, and attention is faster without a mask); where (N,) flat positions whose output
    predicts the supervised target (N,), rising; every (M,) and every_target (M,): the same for all
    tokens of text, supervised or not; images: flat positions of each image's visual tokens.
    """

    inputs: dict[str, Tensor]
    where: Tensor
    target: Tensor
    images: list[Tensor]
    every: Tensor
    every_target: Tensor


class TrainingData:
    """The stream of samples of one run.

    Each sample of a question draws one of `formats`. A row of more than `max_length` tokens is cut
    at its end; if its first answer starts later it is unusable, for images and prompts are never
    cut. `skipped` has each sample that was unusable so far (source/id -> reason). Packing `pack`
    puts rows side by side in a sequence; `group` gives each its own, padded to the longest of the
    micro-batch, and `step` has put rows of like length side by side.

    Raises: UsageError for an unknown format, no data, or images and a text model; ArtifactError
        for a question without an answer; PrerequisiteError for conversations and a model without
        a chat template.
    """

    def __init__(
        self,
        loaded: Loaded,
        data: Sequence[Question] | Sequence[Source],
        formats: Sequence[str],
        seed: int,
        *,
        max_length: int = 2048,
        packing: Literal["pack", "group"] = "pack",
    ) -> None:
        if not data or not formats:
            raise UsageError("training needs questions and at least one prompt format")
        for name in formats:
            if name != protocols.CHOICES:
                protocols.get(name)
        self.sources = sources.given(data)
        self.order = sources.order(self.sources, seed)
        self.loaded, self.encoder, self.formats, self.seed = loaded, Encoder(loaded), formats, seed
        self.max_length, self.packing = max_length, packing
        self.image_token = self.encoder.image_token
        eos = loaded.tokenizer.eos_token_id
        self.end = [] if eos is None else [int(eos)]
        self.skipped: dict[str, str] = {}
        items = (item for source in self.sources for item in source.items)
        said = [item for item in items if isinstance(item, Conversation)]
        self.dialogue = _Dialogue(self.encoder, said, max_length)

    def step(self, number: int, batch_size: int) -> list[Row]:
        """The samples of one optimizer step, shortest first.

        Raises: ArtifactError when many samples after another cannot be used, with the last reason.
        """
        start = number * batch_size
        rows = [self._row(position) for position in range(start, start + batch_size)]
        return sorted(rows, key=len)

    def _row(self, position: int) -> Row:
        """The sample at a position; in place of an unusable one, a drawn one of its source."""
        place, why = self.order(position), ""
        for attempt in range(TRIES):
            source = self.sources[place.source]
            item = source.items[place.item]
            try:
                row = self._encoded(item, position)
                if len(row.prompt) >= self.max_length:
                    raise UnusableError(f"no answer within {self.max_length} tokens")
                return row if len(row) <= self.max_length else row.cut(self.max_length)
            except UnusableError as error:
                why = f"{source.name}/{item.id}: {error}"
                self.skipped[f"{source.name}/{item.id}"] = str(error)
            place = self.order.instead(position, attempt)
        raise ArtifactError(f"{TRIES} training samples one after another are unusable; {why}")

    def _encoded(self, item: Question | Conversation, position: int) -> Row:
        if isinstance(item, Conversation):
            return self.dialogue.row(item)
        draw = random.Random(f"{self.seed}/{position}")
        name = draw.choice(self.formats)
        question = sources.shuffled(item, draw)
        text, answer = protocols.with_answer(question, name)
        prompt = self.encoder.prompt(text, question.image)
        rest = self.encoder.answer(prompt, answer) + self.end
        return Row(prompt, rest, ((len(prompt), len(prompt) + len(rest)),))

    def collate(self, rows: Sequence[Row], device: torch.device, dtype: torch.dtype) -> MicroBatch:
        """Pack rows into sequences: each sees itself only, from position 0 on.

        Raises: ArtifactError when visual tokens and images do not add up.
        """
        packs = _packs(rows) if self.packing == "pack" else [[row] for row in rows]
        length = max(sum(map(len, pack)) for pack in packs)
        axes = (3,) if any(row.prompt.places is not None for row in rows) else ()
        ids = torch.zeros(len(packs), length, dtype=torch.long)
        positions = torch.zeros(*axes, len(packs), length, dtype=torch.long)
        owner = torch.arange(-1, -length - 1, -1).repeat(len(packs), 1)  # padding sees itself
        where: list[Tensor] = []
        every: list[Tensor] = []
        images: list[Tensor] = []
        for b, pack in enumerate(packs):
            at = 0
            for number, row in enumerate(pack):
                end, first = at + len(row), b * length + at
                tokens = torch.tensor(row.ids)
                ids[b, at:end] = tokens
                places = row.prompt.positions(len(row.rest) + (length - at - len(row)))
                positions[..., b, at:] = places  # padding goes on counting: no new sequence
                owner[b, at:end] = number
                where += [torch.arange(first + i - 1, first + j - 1) for i, j in row.spans]
                text = tokens[1:] != (-1 if self.image_token is None else self.image_token)
                every.append(text.nonzero()[:, 0] + first)
                images += [places + first for places in self._images(row.prompt)]
                at = end
        inputs = {"input_ids": ids, "position_ids": positions}
        if any(len(pack) > 1 for pack in packs):
            inputs["attention_mask"] = (owner[:, :, None] == owner[:, None]).tril()[:, None]
        inputs = {name: value.to(device) for name, value in inputs.items()}
        inputs |= pixel_batch([row.prompt for pack in packs for row in pack], device, dtype)
        flat = inputs["input_ids"].reshape(-1)
        where_, every_ = torch.cat(where).to(device), torch.cat(every).to(device)
        seen = [places.to(device) for places in images]
        return MicroBatch(inputs, where_, flat[where_ + 1], seen, every_, flat[every_ + 1])

    def _images(self, prompt: Encoded) -> list[Tensor]:
        """Positions of each image's visual tokens in a prompt, int64."""
        if not prompt.pixels or self.image_token is None:
            return []
        seen = (torch.tensor(prompt.ids) == self.image_token).nonzero()[:, 0]
        grid = prompt.pixels.get("image_grid_thw")
        if grid is not None:  # (images, 3): patches in time, height and width
            merge = int(self.loaded.model.config.vision_config.spatial_merge_size) ** 2
            counts = (grid.prod(-1) // merge).tolist()
        else:
            n = len(prompt.pixels["pixel_values"])
            counts = [len(seen) // n] * n
        if sum(counts) != len(seen):
            raise ArtifactError(
                f"{len(seen)} visual tokens for {len(counts)} images of {counts} tokens",
                hint="config.json and the processor's config do not belong together",
            )
        return list(torch.split(seen, counts))


class _Dialogue:
    """Conversations in the model's chat template, answers supervised."""

    def __init__(
        self, encoder: Encoder, conversations: Sequence[Conversation], max_length: int
    ) -> None:
        self.encoder, self.max_length = encoder, max_length
        tokenizer, generation = encoder.tokenizer, encoder.loaded.model.generation_config
        if encoder.processor is None and any(one.images for one in conversations):
            raise UsageError(
                "a text model cannot be trained on conversations with images",
                hint="leave that source out, or train a vision-language model",
            )
        if encoder.processor is None and conversations and not tokenizer.chat_template:
            raise PrerequisiteError(
                f"{encoder.loaded.folder.path} has no chat template to put conversations in",
                hint="add chat_template.jinja to the model's folder, or train on questions",
            )
        ends = generation.eos_token_id or []
        known = {*([ends] if isinstance(ends, int) else ends), tokenizer.eos_token_id} - {None}
        self.ends = tuple(map(str, tokenizer.convert_ids_to_tokens(sorted(known))))
        added = {str(t) for t in tokenizer.added_tokens_decoder.values() if t.special}
        special = sorted(added | set(tokenizer.all_special_tokens))
        self.special = re.compile("|".join(map(re.escape, special)) or r"(?!)")

    def row(self, conversation: Conversation) -> Row:
        """Tokens and supervised spans of a conversation.

        Raises: UnusableError for this sample's own trouble; ArtifactError for the template's.
        """
        turns = [Turn(turn.asked.strip(), turn.answered.strip()) for turn in conversation.turns]
        if any(self.special.search(text) for turn in turns for text in turn):
            raise UnusableError("its text holds a special token of the model")
        prompt = self._prompt(turns[0].asked, conversation.images)
        images, eos = len(conversation.images), self.encoder.tokenizer.eos_token or ""
        chat = Chat(partial(self._render, images=images), self._tokens, self.ends, eos)
        tokens, spans = chat.supervised(turns, self.max_length - len(prompt))
        start, mark = spans[0][0], self.encoder.image_token
        if [t for t in tokens[:start] if t != mark] != [t for t in prompt.ids if t != mark]:
            raise ArtifactError("the processor changes more of a prompt than its image marks")
        more = len(prompt) - start  # each image's mark became its visual tokens
        return Row(prompt, tokens[start:], tuple((i + more, j + more) for i, j in spans))

    def _prompt(self, asked: str, images: Sequence[Path]) -> Encoded:
        """All images and the first question."""
        if self.encoder.processor is None:
            text = self._render([(asked, None)], images=0)
            return Encoded(self._tokens(text), text, {})
        try:
            return self.encoder.prompt(asked, images)
        except (PrerequisiteError, ArtifactError) as error:
            raise UnusableError(error.message) from error

    def _render(self, turns: Sequence[Said], *, images: int) -> str:
        parts = self.encoder.processor is not None
        messages: list[dict[str, Any]] = [
            {"role": role, "content": [{"type": "text", "text": text}] if parts else text}
            for turn in turns
            for role, text in zip(("user", "assistant"), turn, strict=True)
            if text is not None
        ]
        if images:
            messages[0]["content"][:0] = [{"type": "image"} for _ in range(images)]
        template = (self.encoder.processor or self.encoder.tokenizer).apply_chat_template
        asks = turns[-1][1] is None
        try:
            return str(template(messages, add_generation_prompt=asks, tokenize=False))
        except TemplateError as error:  # its words stay out: they may hold the data
            raise ArtifactError(
                "the model's chat template refuses conversations", hint="train on questions"
            ) from error

    def _tokens(self, text: str) -> list[int]:
        special = self.encoder.processor is not None  # a text model's template holds its own
        return list(self.encoder.tokenizer(text, add_special_tokens=special).input_ids)


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
