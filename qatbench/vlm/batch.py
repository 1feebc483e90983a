"""Questions -> token sequences and what the vision tower needs.

A text model gets the prompt as it is. A VLM gets it inside its own chat template as one user turn,
images first; its processor expands each image mark to that image's visual tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qatbench.errors import ArtifactError, PrerequisiteError, UsageError
from qatbench.tasks.images import open_rgb
from qatbench.vlm.layout import image_token
from qatbench.vlm.load import Loaded

Picture = Path | bytes
HELD = 2 << 30  # bytes of encoded pictures an encoder keeps: passes of a question share theirs


@dataclass(frozen=True)
class Encoded:
    """A prompt's tokens with what the vision tower needs; `text` is the rendered prompt.

    Models with M-RoPE, and no others, have `places` and `kinds`.
    """

    ids: list[int]
    text: str
    pixels: dict[str, Tensor]  # vision inputs; the first dimension runs over images or patches
    places: Tensor | None = None  # (3, len(ids)) for M-RoPE, None where positions simply count
    kinds: Tensor | None = None  # (len(ids),) int64: 1 at visual tokens, 0 at text
    images: tuple[Picture, ...] = ()  # as they were given, for engines with their own processor

    def positions(self, more: int = 0) -> Tensor:
        """Positions of the prompt and of `more` tokens of text after it: (L,), M-RoPE: (3, L)."""
        if self.places is None:
            return torch.arange(len(self.ids) + more)
        after = self.places.max() + 1 + torch.arange(more)
        return torch.cat((self.places, after.expand(3, -1)), 1)

    def inputs(self, more: Sequence[int] = ()) -> dict[str, Tensor]:
        """What the plain model takes for this prompt and `more` tokens of text: a batch of one."""
        out = {"input_ids": torch.tensor([[*self.ids, *more]])}
        if self.kinds is not None:
            out["mm_token_type_ids"] = F.pad(self.kinds, (0, len(more)))[None]
        return out | self.pixels

    def __len__(self) -> int:
        return len(self.ids)


class Encoder:
    """Turns prompts and answers into token ids for one model."""

    def __init__(self, loaded: Loaded) -> None:
        self.loaded = loaded
        self.tokenizer = loaded.tokenizer
        self.processor = loaded.processor
        self.image_token = image_token(loaded.folder.config)
        self._pictures: dict[Picture, tuple[int, dict[str, Tensor]]] = {}  # with their tokens
        self._room = HELD
        if self.processor is not None and not self._template():
            raise PrerequisiteError(
                f"{loaded.folder.path} has no chat template",
                hint="add chat_template.jinja to the processor's folder",
            )

    def _template(self) -> bool:
        return bool(getattr(self.processor, "chat_template", None) or self.tokenizer.chat_template)

    @property
    def form(self) -> str:
        """How prompts reach the model, for the record."""
        return "as it is" if self.processor is None else "chat template, one user turn"

    def prompt(self, text: str, image: Picture | Sequence[Picture] | None) -> Encoded:
        """Encode one prompt; its image, or its images in their order, come before the text.

        Raises: UsageError for an image question and a text model; PrerequisiteError and
            ArtifactError for an image that is missing, damaged or refused by the processor.
        """
        images = [image] if isinstance(image, Path | bytes) else list(image or ())
        if self.processor is None:
            if images:
                raise UsageError(
                    "a text model cannot answer a question with an image",
                    hint="pick the text subset, e.g. scienceqa:test:text",
                )
            return Encoded(list(self.tokenizer(text).input_ids), text, {})
        parts = [{"type": "image"} for _ in images] + [{"type": "text", "text": text}]
        rendered = self.processor.apply_chat_template(
            [{"role": "user", "content": parts}], add_generation_prompt=True, tokenize=False
        )
        if not images:
            return self._placed(list(self.tokenizer(rendered).input_ids), rendered, {})
        mark = self.processor.image_token
        if len(images) == 1 and images[0] in self._pictures and rendered.count(mark) == 1:
            tokens, pixels = self._pictures[images[0]]
            ids = list(self.tokenizer(rendered.replace(mark, mark * tokens)).input_ids)
            return replace(self._placed(ids, rendered, pixels), images=tuple(images))
        opened = [open_rgb(one) for one in images]
        try:
            inputs = self.processor(text=[rendered], images=opened, return_tensors="pt")
        except ValueError as error:  # Qwen's: more than 200 times as long as wide
            raise ArtifactError(f"the processor refuses an image: {error}") from error
        ids = inputs.pop("input_ids")[0].tolist()
        for key in ("attention_mask", "mm_token_type_ids", "token_type_ids"):
            inputs.pop(key, None)
        if len(images) == 1:
            self._keep(images[0], ids.count(self.image_token), inputs)
        return replace(self._placed(ids, rendered, dict(inputs)), images=tuple(images))

    def tokens(self, ids: Sequence[int], after: Encoded | None = None) -> Encoded:
        """A prompt of these tokens, all of them text; behind those of another prompt if given."""
        if after is None:
            return self._placed(list(ids), "", {})
        places = None if after.places is None else after.positions(len(ids))
        kinds = None if after.kinds is None else F.pad(after.kinds, (0, len(ids)))
        return replace(after, ids=[*after.ids, *ids], places=places, kinds=kinds)

    def pixels(self, image: Picture) -> dict[str, Tensor] | None:
        """Vision inputs of a picture that was encoded before and is still held."""
        return self._pictures[image][1] if image in self._pictures else None

    def _keep(self, image: Picture, tokens: int, pixels: Mapping[str, Tensor]) -> None:
        """Remember an encoded picture while there is room."""
        size = sum(value.numel() * value.element_size() for value in pixels.values())
        if size <= self._room:
            self._pictures[image] = tokens, dict(pixels)
            self._room -= size

    def _placed(self, ids: list[int], text: str, pixels: dict[str, Tensor]) -> Encoded:
        """The prompt with the positions that the model itself gives to its tokens."""
        if not self.loaded.arch.mrope:
            return Encoded(ids, text, pixels)
        kinds = torch.tensor([int(token == self.image_token) for token in ids])
        if not pixels:
            return Encoded(ids, text, pixels, torch.arange(len(ids)).repeat(3, 1), kinds)
        places, _ = backbone(self.loaded.model).get_rope_index(
            torch.tensor([ids]),
            mm_token_type_ids=kinds[None],
            image_grid_thw=pixels["image_grid_thw"],
        )
        return Encoded(ids, text, pixels, places[:, 0], kinds)

    def answer(self, prompt: Encoded, text: str) -> list[int]:
        """Token ids of `text` as the continuation of `prompt`.

        A chat template that ends in a newline wants no space before the answer.

        Raises: ArtifactError when the tokenizer merges prompt and answer into one token.
        """
        if prompt.text.endswith("\n"):
            text = text.removeprefix(" ")
        anchor = prompt.text[-32:]
        head = list(self.tokenizer(anchor, add_special_tokens=False).input_ids)
        both = list(self.tokenizer(anchor + text, add_special_tokens=False).input_ids)
        if both[: len(head)] != head or len(both) == len(head):
            # The text stays out: data that may not be passed on must not travel in a message.
            raise ArtifactError("the tokenizer does not separate an answer from its prompt")
        return both[len(head) :]


def backbone(loaded_model: Any) -> Any:
    """The model without its output head: last hidden states come out."""
    return loaded_model.model


def arithmetic(model: Any) -> torch.dtype:
    """The dtype that a model's floats have: of its activations, and what pixels are cast to."""
    dtype: torch.dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    return dtype


def pixel_batch(
    rows: Sequence[Encoded], device: torch.device, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Vision inputs of all rows, in order, on the device."""
    out: dict[str, Tensor] = {}
    for key in dict.fromkeys(key for row in rows for key in row.pixels):
        value = torch.cat([row.pixels[key] for row in rows if key in row.pixels]).to(device)
        out[key] = value.to(dtype) if value.is_floating_point() else value
    return out
