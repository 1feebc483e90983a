"""What speed is measured on: prompts of an exact length, the same for every engine and run."""

from __future__ import annotations

import contextlib
import io
import random
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from PIL import Image

from qatbench.errors import UsageError
from qatbench.mini import draw
from qatbench.vlm.batch import Encoded, Encoder
from qatbench.vlm.layout import text_sizes

Shown = Literal["none", "mini", "grey"]
GREY_SIDE = 448  # pixels, where the processor takes pictures of any size


def prompts(
    encoder: Encoder, batch: int, context: int, *, image: Shown, seed: int
) -> list[Encoded]:
    """`batch` prompts of `context` tokens each: random text, behind one picture if asked for.

    The tokens are drawn from the vocabulary without its special and added tokens: (seed, batch,
    context) and the tokenizer decide them. A text model gets text whatever `image` says.

    Raises: UsageError when a picture alone has more tokens.
    """
    rng = random.Random(f"{seed} {batch} {context}")
    known = _plain_tokens(encoder)
    head = None
    if image != "none" and encoder.loaded.arch.is_vlm:
        picture = drawn(seed) if image == "mini" else grey(encoder.processor)
        head = encoder.prompt("", picture)
        if len(head) > context:
            raise UsageError(
                f"{encoder.loaded.folder.name}: a picture and its marks are {len(head)} tokens,"
                f" more than a context of {context}",
                hint=f"--context {len(head) + 1} or more",
            )
    missing = context - (len(head) if head else 0)
    return [encoder.tokens(rng.choices(known, k=missing), head) for _ in range(batch)]


def _plain_tokens(encoder: Encoder) -> Sequence[int]:
    """Ids of plain text tokens, those of which the model has no embedding left out."""
    tokenizer = encoder.tokenizer
    most = int(text_sizes(encoder.loaded.folder.config)["vocab_size"])
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder, encoder.image_token}
    ids = set(tokenizer.get_vocab().values()) - special
    return sorted(token for token in ids if token < most)


def drawn(seed: int) -> bytes:
    """A tray of the mini world, full of samples, as a PNG."""
    rng = random.Random(seed)
    sizes = (len(draw.COLORS), len(draw.SHAPES), len(draw.FILLS))
    tiles = [
        [draw.sample_tile(*(rng.randrange(size) for size in sizes)) for _ in range(draw.SIDE)]
        for _ in range(draw.SIDE)
    ]
    return draw.png(np.array(tiles))


def grey(processor: Any) -> bytes:
    """A grey picture of the size that the processor makes of any other, as a PNG."""
    part = processor.image_processor
    shape = GREY_SIDE, GREY_SIDE
    for name in ("size", "crop_size"):  # the second is what comes out, where there is one
        with contextlib.suppress(AttributeError, KeyError, TypeError):
            size = getattr(part, name)
            shape = int(size["width"]), int(size["height"])
    stream = io.BytesIO()
    Image.new("RGB", shape, (128, 128, 128)).save(stream, "PNG")
    return stream.getvalue()
