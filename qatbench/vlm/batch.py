"""Questions -> token sequences -> batches; option scoring from one forward.

A text model gets the prompt as it is. A VLM gets it inside its own chat template as one user turn,
images first; its processor expands each image mark to that image's visual tokens.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from qatbench.errors import ArtifactError, PrerequisiteError, UsageError
from qatbench.vlm.layout import image_token
from qatbench.vlm.load import Loaded

MAX_PIXELS = 64_000_000


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


Picture = Path | bytes


def open_image(image: Picture) -> Image.Image:
    """Decode an image to RGB.

    Raises: PrerequisiteError when the file is missing; ArtifactError when it cannot be decoded
        or has more than 64 million pixels.
    """
    if isinstance(image, Path) and not image.exists():
        raise PrerequisiteError(f"missing image {image.parent.name}/{image.name}")
    try:
        with Image.open(io.BytesIO(image) if isinstance(image, bytes) else image) as opened:
            if opened.width * opened.height > MAX_PIXELS:
                size = f"{opened.width} x {opened.height}"
                raise ArtifactError(f"an image of {size} pixels is too large")
            return opened.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        # Not the library's own words: they hold the file's whole path.
        raise ArtifactError(f"image cannot be decoded: {type(error).__name__}") from error


class Encoder:
    """Turns prompts and answers into token ids for one model."""

    def __init__(self, loaded: Loaded) -> None:
        self.loaded = loaded
        self.tokenizer = loaded.tokenizer
        self.processor = loaded.processor
        self.image_token = image_token(loaded.folder.config)
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
        opened = [open_image(one) for one in images]
        try:
            inputs = self.processor(text=[rendered], images=opened, return_tensors="pt")
        except ValueError as error:  # Qwen's: more than 200 times as long as wide
            raise ArtifactError(f"the processor refuses an image: {error}") from error
        ids = inputs.pop("input_ids")[0].tolist()
        for key in ("attention_mask", "mm_token_type_ids", "token_type_ids"):
            inputs.pop(key, None)
        return self._placed(ids, rendered, dict(inputs))

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


def pixel_batch(
    rows: Sequence[Encoded], device: torch.device, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Vision inputs of all rows, in order, on the device."""
    out: dict[str, Tensor] = {}
    for key in dict.fromkeys(key for row in rows for key in row.pixels):
        value = torch.cat([row.pixels[key] for row in rows if key in row.pixels]).to(device)
        out[key] = value.to(dtype) if value.is_floating_point() else value
    return out


@dataclass(frozen=True)
class OptionRow:
    """One question ready to be scored: prompt and one continuation an option."""

    prompt: Encoded
    answers: list[list[int]]

    def __len__(self) -> int:
        return len(self.prompt) + sum(map(len, self.answers))


@torch.inference_mode()
def score_options(loaded: Loaded, rows: Sequence[OptionRow]) -> list[list[float]]:
    """Mean log-probability (nats a token) of each option after its prompt.

    One forward over sequences that hold the prompt once and then every option side by side: an
    option's tokens see the prompt and themselves, at the positions right after the prompt.

    Returns: one list a row, one float an option; the log-softmax is in fp32.
    """
    model, device = loaded.model, loaded.device
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    asked, rows = rows, [_unique(row) for row in rows]
    ids, positions, mask = _layout(rows, loaded.tokenizer.pad_token_id or 0)
    hidden = backbone(model)(
        input_ids=ids.to(device),
        position_ids=positions.to(device),
        attention_mask=mask.to(device)[:, None],
        use_cache=False,
        **pixel_batch([row.prompt for row in rows], device, dtype),
    ).last_hidden_state
    where, tokens = _predictors(rows)
    flat = hidden.reshape(-1, hidden.shape[-1])[where.to(device)]
    logprobs = _token_logprobs(model.lm_head, flat, tokens.to(device)).tolist()
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


def _layout(rows: Sequence[OptionRow], pad: int) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids (B, L), positions (B, L) and the boolean mask (B, L, L): True where i sees j.

    Positions have the shape (3, B, L) for M-RoPE. Padding is at position 0.
    """
    length = max(map(len, rows))
    ids = torch.full((len(rows), length), pad)
    axes = rows[0].prompt.positions().shape[:-1]  # (3,) for M-RoPE, else ()
    positions = torch.zeros(*axes, len(rows), length, dtype=torch.long)
    mask = torch.eye(length, dtype=torch.bool).repeat(len(rows), 1, 1)  # padding sees itself
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    for b, row in enumerate(rows):
        start = len(row.prompt)
        ids[b, :start] = torch.tensor(row.prompt.ids)
        positions[..., b, :start] = row.prompt.positions()
        mask[b, :start, :start] = causal[:start, :start]
        at = start
        for answer in row.answers:
            end = at + len(answer)
            ids[b, at:end] = torch.tensor(answer)
            positions[..., b, at:end] = row.prompt.positions(len(answer))[..., start:]
            mask[b, at:end, :start] = True
            mask[b, at:end, at:end] = causal[: len(answer), : len(answer)]
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
            at += len(answer)
    return torch.tensor(where), torch.tensor(tokens)


def _token_logprobs(head: nn.Module, hidden: Tensor, tokens: Tensor, chunk: int = 1024) -> Tensor:
    parts = []
    for some, wanted in zip(torch.split(hidden, chunk), torch.split(tokens, chunk), strict=True):
        logp = head(some).float().log_softmax(-1)
        parts.append(logp.gather(-1, wanted[:, None])[:, 0])
    return torch.cat(parts)


@torch.inference_mode()
def generate(loaded: Loaded, prompts: Sequence[Encoded], max_new_tokens: int) -> list[str]:
    """Greedy responses to a batch of prompts (left-padded); special tokens are dropped.

    The model's own generation settings (Qwen2.5-VL's penalty on repetitions) do not apply.
    """
    model, device = loaded.model, loaded.device
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    length = max(map(len, prompts))
    pad = loaded.tokenizer.pad_token_id
    pad = loaded.tokenizer.eos_token_id if pad is None else pad
    ids = torch.full((len(prompts), length), pad)
    mask = torch.zeros(len(prompts), length, dtype=torch.long)
    for b, prompt in enumerate(prompts):
        ids[b, length - len(prompt) :] = torch.tensor(prompt.ids)
        mask[b, length - len(prompt) :] = 1
    kinds = [F.pad(p.kinds, (length - len(p), 0)) for p in prompts if p.kinds is not None]
    extra = {"mm_token_type_ids": torch.stack(kinds).to(device)} if kinds else {}
    out = model.generate(
        input_ids=ids.to(device),
        attention_mask=mask.to(device),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        temperature=None,
        top_p=None,
        top_k=None,
        repetition_penalty=1.0,
        pad_token_id=pad,
        **extra,
        **pixel_batch(prompts, device, dtype),
    )
    texts: list[str] = loaded.tokenizer.batch_decode(out[:, length:], skip_special_tokens=True)
    return texts
