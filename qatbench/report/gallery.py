"""Questions on which two arms part, as cards: ids and letters, and what is asked where it is known.

Data that may not be passed on never come with a comparison: pictures and texts are in the page only
if the one who draws it hands them over.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from qatbench.records import Question
from qatbench.report.details import Changes, Flip

LARGEST = 320  # pixels, of a picture's longer side
SMALL = 96  # pixels: below it a picture is enlarged, its pixels kept sharp

Gallery = Mapping[tuple[str, str], Question]  # (task, id of a row)


class Picture(NamedTuple):
    """A picture inside the page."""

    uri: str
    width: int
    height: int

    @property
    def small(self) -> bool:
        """Whether its pixels are to be enlarged."""
        return max(self.width, self.height) <= SMALL


class Option(NamedTuple):
    """An option with who chose it."""

    letter: str
    text: str
    gold: bool
    arms: tuple[str, ...]  # the arms that chose it


class Card(NamedTuple):
    """One flipped question."""

    flip: Flip
    question: Question | None
    picture: Picture | None
    missing: bool  # there is a picture, but no file that can be read
    options: tuple[Option, ...]  # all of them, or, without the question, those that are known

    @property
    def kind(self) -> Literal["lost", "gained"]:
        """Whether the arm is the one that got it wrong, or right."""
        return "gained" if self.flip.chosen == self.flip.gold else "lost"


class Wall(NamedTuple):
    """The cards of one pair."""

    changes: Changes
    lost: tuple[Card, ...]
    gained: tuple[Card, ...]
    missing: int  # pictures whose file cannot be read

    @property
    def filled(self) -> bool:
        """Whether its questions were handed over."""
        return any(card.question for card in (*self.lost, *self.gained))

    @property
    def order(self) -> str:
        """How the cards are sorted, where scores do not say it of all; else ""."""
        unknown = [flip.margin is None or flip.reference_margin is None
                   for flip in self.changes.flips]  # fmt: skip
        if all(unknown):
            return "Their options were not scored: without margins they stand in the order of ids."
        return "Those that were not scored come last, in the order of ids." if any(unknown) else ""


def walls(changes: Sequence[Changes], task: str, gallery: Gallery | None) -> list[Wall]:
    """The pairs whose flips are kept, in their order; without `gallery`, of ids and letters."""
    made = []
    for pair in changes:
        if not pair.flips:
            continue
        cards = [_card(flip, pair, (gallery or {}).get((task, flip.id))) for flip in pair.flips]
        lost, gained = (
            tuple(card for card in cards if card.kind == kind) for kind in ("lost", "gained")
        )
        made.append(Wall(pair, lost, gained, sum(card.missing for card in cards)))
    return made


def _card(flip: Flip, pair: Changes, question: Question | None) -> Card:
    picture = embed(question.image) if question and question.image is not None else None
    texts = question.options if question else _letters(flip)
    chosen = {pair.arm: flip.chosen, pair.reference: flip.reference_chosen}
    options = tuple(
        Option(
            letter,
            text,
            letter == flip.gold,
            tuple(arm for arm, choice in chosen.items() if choice == letter),
        )
        for letter, text in texts.items()
    )
    missing = question is not None and question.image is not None and picture is None
    return Card(flip, question, picture, missing, options)


def _letters(flip: Flip) -> dict[str, str]:
    """The options that are known of without the question."""
    known = {flip.gold, flip.chosen, flip.reference_chosen} - {None}
    return {letter: "" for letter in sorted(str(letter) for letter in known)}


def embed(image: Path | bytes) -> Picture | None:
    """Make a picture part of the page, at most LARGEST pixels: PNG or WebP, whichever is smaller.

    Returns None where there is no file, or none that can be read.
    """
    from PIL import Image  # slow to import

    try:
        data = image.read_bytes() if isinstance(image, Path) else image
        with Image.open(io.BytesIO(data)) as opened:
            picture = opened.convert("RGBA" if "A" in opened.getbands() else "RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    picture.thumbnail((LARGEST, LARGEST))
    found = []
    small = max(picture.size) <= SMALL
    lossy = {"lossless": True} if small else {"quality": 80, "method": 4}
    for kind, settings in (("PNG", {"optimize": True}), ("WEBP", lossy)):
        stream = io.BytesIO()
        picture.save(stream, kind, **settings)
        found.append((kind.lower(), stream.getvalue()))
    kind, smallest = min(found, key=lambda pair: len(pair[1]))
    uri = f"data:image/{kind};base64,{base64.b64encode(smallest).decode()}"
    return Picture(uri, *picture.size)
