"""Several weighted sources of training samples: which sample stands at which place of the stream.

The place alone decides, with the seed: a resumed run, or one of several processes, sees what a
single uninterrupted one sees. Sources take turns by their weights exactly: after any N places a
source has had N times its share, rounded up or down. Each goes through its own epochs, in an order
of its own in every epoch.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

from qatbench.errors import ArtifactError, UsageError
from qatbench.records import LETTERS, Question
from qatbench.tasks import selector
from qatbench.tasks.conversations import Conversation

Item = Question | Conversation


@dataclass(frozen=True)
class Source:
    """Training samples of one kind; `weight` is relative to those of the other sources."""

    name: str
    items: Sequence[Item]
    weight: float = 1.0


def given(data: Sequence[Question] | Sequence[Source]) -> list[Source]:
    """Sources as they are, or questions as the only source."""
    sources = [item for item in data if isinstance(item, Source)]
    questions = [item for item in data if isinstance(item, Question)]
    return sources or [Source("questions", questions)]


class Place(NamedTuple):
    """Where a sample is: index of the source, and of the item in it."""

    source: int
    item: int


def order(sources: Sequence[Source], seed: int) -> Order:
    """The stream of all sources.

    Raises: UsageError for no sources, one without items, a name twice or a weight not above 0;
        ArtifactError for a question without an answer.
    """
    if not sources:
        raise UsageError("training needs at least one source of samples")
    names = [source.name for source in sources]
    for source in sources:
        if not len(source.items):
            raise UsageError(f"the training source {source.name} is empty")
        if not (math.isfinite(source.weight) and source.weight > 0):
            raise UsageError(
                f"the training source {source.name} has the weight {source.weight}",
                hint="a weight is a number above 0",
            )
        if names.count(source.name) > 1:
            raise UsageError(f"two training sources are called {source.name}")
        for item in source.items:
            if isinstance(item, Question) and item.gold is None:
                raise ArtifactError(f"training question {item.id} has no answer")
    return Order(sources, seed)


class Order:
    """position -> Place, from (seed, position) alone; see `order`."""

    def __init__(self, sources: Sequence[Source], seed: int) -> None:
        self._seed, self._sizes = seed, [len(source.items) for source in sources]
        # A source alone keeps the order that finished results were trained in.
        alone = len(sources) == 1
        self._seeds = [str(seed) if alone else f"{seed}/{source.name}" for source in sources]
        self._turns = _Turns(shares(sources))
        self._epochs: dict[int, tuple[int, array[int]]] = {}  # of each source, the last one used

    def __call__(self, position: int) -> Place:
        """The sample at a place of the stream, 0 the first."""
        source, turn = self._turns(position)
        epoch, index = divmod(turn, self._sizes[source])
        return Place(source, self._epoch(source, epoch)[index])

    def instead(self, position: int, attempt: int) -> Place:
        """What is drawn from the same source for a sample there that cannot be used."""
        source, _ = self._turns(position)
        draw = random.Random(f"{self._seed}/{position}/instead-{attempt}")
        return Place(source, draw.randrange(self._sizes[source]))

    def _epoch(self, source: int, epoch: int) -> array[int]:
        known = self._epochs.get(source)
        if known is None or known[0] != epoch:
            items = array("q", range(self._sizes[source]))
            random.Random(f"{self._seeds[source]}/epoch-{epoch}").shuffle(items)
            known = self._epochs[source] = epoch, items
        return known[1]


def shuffled(question: Question, draw: random.Random) -> Question:
    """The same question with its options in another order, letters given anew."""
    texts = list(question.options.items())
    draw.shuffle(texts)
    options = {letter: text for letter, (_, text) in zip(LETTERS, texts, strict=False)}
    gold = next(new for new, (old, _) in zip(LETTERS, texts, strict=False) if old == question.gold)
    return question.model_copy(update={"options": options, "gold": gold})


def shares(sources: Sequence[Source]) -> list[int]:
    """Weights as whole numbers without a common factor, read as they are written: 0.1 is 1/10."""
    weights = [Fraction(repr(float(source.weight))) for source in sources]
    whole = math.lcm(*(weight.denominator for weight in weights))
    numbers = [int(weight * whole) for weight in weights]
    return [number // math.gcd(*numbers) for number in numbers]


class _Turns:
    """Whose turn it is at a place, and which of its turns; each within 1 of its share everywhere.

    The j-th turn of a source with share w must lie in places floor((j - 1) / w) to ceil(j / w) - 1
    for that. Always serving the source whose window closes first meets all windows, as it does for
    any unit jobs on one machine that can be met at all; and a fractional schedule shows that these
    can (Tijdeman 1980, "The chairman assignment problem", Discrete Math. 32). After as many places
    as the shares add up to, all start anew.
    """

    def __init__(self, shares: Sequence[int]) -> None:
        self._shares, self._round = shares, sum(shares)
        self._had = [0] * len(shares)
        self._source, self._turn = array("H"), array("q")

    def __call__(self, position: int) -> tuple[int, int]:
        if len(self._shares) == 1:
            return 0, position
        rounds, place = divmod(position, self._round)
        while len(self._source) <= place:
            self._extend()
        source = self._source[place]
        return source, rounds * self._shares[source] + self._turn[place]

    def _extend(self) -> None:
        place, whole = len(self._source), self._round
        open_now = (
            (-((had + 1) * whole // -share), source)  # the place before which its window closes
            for source, (had, share) in enumerate(zip(self._had, self._shares, strict=True))
            if had * whole < (place + 1) * share  # its window is open
        )
        source = min(open_now)[1]
        self._source.append(source)
        self._turn.append(self._had[source])
        self._had[source] += 1


def digest(sources: Sequence[Source]) -> str:
    """SHA-256 (hex) of the samples, their order and the sources' names and shares.

    One source of questions has the digest of its questions. An image of a conversation counts by
    the last three parts of its path and its size in bytes, not by its content: there are hundreds
    of thousands of them.
    """
    first = list(sources[0].items) if len(sources) == 1 else []
    questions = [item for item in first if isinstance(item, Question)]
    if questions and len(questions) == len(first):
        return selector.digest(questions)
    total = hashlib.sha256()
    for source, share in zip(sources, shares(sources), strict=True):
        total.update(_line([source.name, share, len(source.items)]))
        for item in source.items:
            if isinstance(item, Question):
                total.update(_line(selector.digest([item])))
            else:
                total.update(_line([item.id, item.turns, list(map(_picture, item.images))]))
    return total.hexdigest()


def _line(content: Any) -> bytes:
    return json.dumps(content, ensure_ascii=True).encode() + b"\n"


def _picture(path: Path) -> list[Any]:
    """Stands for an image of a conversation; the size is None where the file is not there."""
    return ["/".join(path.parts[-3:]), path.stat().st_size if path.is_file() else None]
