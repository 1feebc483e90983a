"""Which evaluation questions the training data holds too: by text and by image.

Texts are equal up to case and white space; of a conversation, each question asked and each line of
one is a text, for its options and the request to answer stand on lines of their own. Images are
equal when their decoded RGB pixels are, by SHA-256: another file format hides nothing, another
size or JPEG quality does. A training image is decoded only if an evaluation image has its width and
height; an image that lies at one path is looked at once. Nothing but ids and counts leaves.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from qatbench.errors import QatbenchError, UsageError
from qatbench.records import Question
from qatbench.tasks.images import open_rgb
from qatbench.tasks.sources import Item
from qatbench.vlm.batch import Picture

KINDS = ("both", "image", "context", "text")  # of a match, the strongest first
EXAMPLES = 5  # ids told of each kind


class Match(NamedTuple):
    """A question that was trained on: `kind` is text, context, image or both."""

    kind: str
    evaluated: str  # task/id of the question
    trained: str  # id of the first sample that matches


@dataclass(frozen=True)
class Leak:
    """How many evaluation questions match a training sample; a circular question counts once."""

    n_train: int
    n_eval: int
    n_images: int  # evaluation questions with an image
    text: int  # the question's text, whatever its hint
    context: int  # its hint and text
    image: int
    both: int  # text and image, in one training sample
    plain: int  # of the questions without an image, those whose hint and text were trained on
    unreadable: int  # images, of either side, that are missing or cannot be decoded: not compared
    examples: tuple[
        Match, ...
    ]  # a question by its strongest match; of one with an image, with that

    def as_lines(self) -> list[str]:
        """For the report: what was found, and ids of the first that match."""
        lines = [
            f"Leakage check of {self.n_eval} evaluation questions against {self.n_train} training"
            f" samples: trained on as a whole were {self.both} of {self.n_images} questions with an"
            f" image (text and pixels) and {self.plain} of {self.n_eval - self.n_images} without"
            f" (hint and text); in part, {self.text} texts ({self.context} with their hint) and"
            f" {self.image} images"
        ]
        if self.unreadable:
            lines[0] += f"; {self.unreadable} images could not be read and were not compared"
        for kind in dict.fromkeys(match.kind for match in self.examples):
            pairs = [f"{m.evaluated} = {m.trained}" for m in self.examples if m.kind == kind]
            lines.append(f"Leakage by {kind}, e.g. {', '.join(pairs)}")
        return lines


def leakage(train_items: Iterable[Item], eval_questions: Sequence[Question]) -> Leak:
    """Look for evaluation questions in the training data.

    Raises: UsageError when either is empty.
    """
    samples = list(train_items)
    passes = {(q.task, (q.group,) if q.group is not None else q.id): q for q in eval_questions}
    asked = list(passes.values())
    if not samples or not asked:
        raise UsageError("a leakage check needs training samples and evaluation questions")
    pixels = _Pixels()
    ours = pixels.hashed([image for q in asked for image in _images(q)], only=None)
    theirs = pixels.hashed([image for s in samples for image in _images(s)], only=pixels.sizes)
    wanted = [
        _Wanted(f"{q.task}/{q.id}", *_keys(q), ours.get(q.image) if q.image else None)
        for q in asked
    ]
    trained = _trained(samples, theirs, wanted)
    matches = [
        [Match(kind, one.id, trained[key]) for kind in KINDS if (key := one.key(kind)) in trained]
        for one in wanted
    ]
    count = Counter(match.kind for found in matches for match in found)
    told = [  # a text alone says little of a question with an image
        (q, match) for q, found in zip(asked, matches, strict=True) for match in found[:1]
    ]
    strongest = [m for q, m in told if not q.has_image or m.kind in ("both", "image")]
    plain = [
        found
        for q, found in zip(asked, matches, strict=True)
        if not q.has_image and any(match.kind == "context" for match in found)
    ]
    return Leak(
        n_train=len(samples),
        n_eval=len(asked),
        n_images=sum(q.has_image for q in asked),
        text=count["text"],
        context=count["context"],
        image=count["image"],
        both=count["both"],
        plain=len(plain),
        unreadable=len(pixels.unreadable),
        examples=tuple(
            match for kind in KINDS for match in [m for m in strongest if m.kind == kind][:EXAMPLES]
        ),
    )


_Key = tuple[str, ...]  # a kind of match, and what must be equal for it


class _Wanted(NamedTuple):
    """An evaluation question, as it is looked for."""

    id: str
    text: str
    context: str
    image: str | None

    def key(self, kind: str) -> _Key | None:
        """What a training sample must have for a match; None where there is nothing to match."""
        if kind in ("image", "both") and self.image is None:
            return None
        return {
            "text": (kind, self.text),
            "context": (kind, self.context),
            "image": (kind, self.image or ""),
            "both": (kind, self.text, self.image or ""),
        }[kind]


def _trained(
    samples: Sequence[Item], hashes: Mapping[Picture, str], wanted: Sequence[_Wanted]
) -> dict[_Key | None, str]:
    """The first sample's id for every key that is wanted and that some sample has."""
    keys = {key for one in wanted for kind in KINDS if (key := one.key(kind)) is not None}
    trained: dict[_Key | None, str] = {}
    for sample in samples:
        texts, contexts = _texts(sample)
        images = {hashes[image] for image in _images(sample) if image in hashes}
        had: list[_Key] = [("text", text) for text in texts]
        had += [("context", context) for context in contexts]
        had += [("image", image) for image in images]
        had += [("both", text, image) for text in texts for image in images]
        for key in had:
            if key in keys:
                trained.setdefault(key, sample.id)
    return trained


# --- texts ----------------------------------------------------------------------------------------


def _normal(text: str) -> str:
    return " ".join(text.casefold().split())


def _keys(question: Question) -> tuple[str, str]:
    """The question's text, and its hint with it."""
    return _normal(question.text), _normal(f"{question.hint}\n{question.text}")


def _texts(sample: Item) -> tuple[set[str], set[str]]:
    """What a sample asks: texts, and texts with their hints."""
    if isinstance(sample, Question):
        text, context = _keys(sample)
        return {text}, {context}
    asked = {turn.asked for turn in sample.turns}
    lines = {_normal(line) for text in asked for line in text.splitlines()}
    texts = (lines | {_normal(text) for text in asked}) - {""}
    return texts, texts


# --- images ---------------------------------------------------------------------------------------


def _images(sample: Item) -> Iterator[Picture]:
    if not isinstance(sample, Question):
        yield from sample.images
    elif sample.image is not None:
        yield sample.image


class _Pixels:
    """Hashes of decoded images."""

    def __init__(self) -> None:
        self.sizes: set[tuple[int, int]] = set()  # of the images hashed so far
        self.unreadable: set[Picture] = set()

    def hashed(
        self, images: Iterable[Picture], only: set[tuple[int, int]] | None
    ) -> dict[Picture, str]:
        """SHA-256 (hex) of width, height and RGB pixels; images of other sizes are left out."""
        once = list(dict.fromkeys(images))
        wanted = None if only is None else frozenset(only)
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # decoding frees the lock
            told = pool.map(lambda image: self._hash(image, wanted), once)
            return {image: key for image, key in zip(once, told, strict=True) if key is not None}

    def _hash(self, image: Picture, only: frozenset[tuple[int, int]] | None) -> str | None:
        try:
            size = _size(image)
            if only is not None and size not in only:
                return None
            content = hashlib.sha256(f"{size}".encode() + open_rgb(image).tobytes())
        except (QatbenchError, OSError, SyntaxError, ValueError, Image.DecompressionBombError):
            self.unreadable.add(image)
            return None
        self.sizes.add(size)
        return content.hexdigest()


def _size(image: Picture) -> tuple[int, int]:
    """Width and height, from the header alone."""
    with Image.open(image if isinstance(image, Path) else io.BytesIO(image)) as opened:
        return opened.size
