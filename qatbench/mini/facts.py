"""Facts to memorise: people, books, towns and minerals, all drawn from one seed.

A fact is (kind, subject, attribute); `Facts.value` gives its value as text. Facts are dealt to
splits by a hash: one of val or test is asked in one wording there and in another in train, so that
no two splits share a question although a model can have learned every fact.
"""

from __future__ import annotations

import random
import zlib
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from qatbench.mini import names
from qatbench.mini.draw import COLORS, SHAPES, TOWN_LETTERS

PEOPLE = 16_000
BOOKS = len(names.ADJECTIVES) * len(names.NOUNS)


class Attribute(NamedTuple):
    """One thing that is known: how it is stated and asked ("{x}": the subject; two wordings)."""

    name: str
    values: tuple[str, ...]
    states: str  # "{v}": the value
    asks: tuple[str, ...]


PERSON = (
    Attribute("home", names.TOWNS, "lives in {v}",
              ("In which town does {x} live?", "Where is the home of {x}?")),
    Attribute("job", names.JOBS, "works as a {v}",
              ("What is the job of {x}?", "How does {x} earn a living?")),
    Attribute("pet", names.PETS, "owns a {v}",
              ("Which animal does {x} own?", "What is the pet of {x}?")),
    Attribute("music", names.INSTRUMENTS, "plays the {v}",
              ("Which instrument does {x} play?", "What does {x} play in the band?")),
    Attribute("food", names.FOODS, "likes {v}",
              ("What does {x} like to eat?", "Which food does {x} like?")),
    Attribute("birth", names.MONTHS, "was born in {v}",
              ("In which month was {x} born?", "When is the birthday of {x}?")),
    Attribute("color", tuple(COLORS), "wears {v}",
              ("Which color does {x} wear?", "What is the color of the coat of {x}?")),
)  # fmt: skip
BOOK = (
    Attribute("author", (), "was written by {v}",
              ("Who wrote {x}?", "Who is the author of {x}?")),
    Attribute("genre", names.GENRES, "is a {v}",
              ("What kind of book is {x}?", "Which word describes {x}?")),
    Attribute("place", names.TOWNS, "takes place in {v}",
              ("Where does {x} take place?", "Which town is in the story {x}?")),
)  # fmt: skip
TOWN = (
    Attribute("goods", names.GOODS, "sells {v}", ("What does {x} sell?",)),
    Attribute("river", names.RIVERS, "lies on the river {v}", ("On which river does {x} lie?",)),
)
MINERAL = (
    Attribute("name", names.MINERALS, "is called {v}", ("What is the name of {x}?",)),
    Attribute("hardness", names.NUMBERS[1:10], "has a hardness of {v}",
              ("What is the hardness of {x}?",)),
    Attribute("use", names.USES, "is used for {v}", ("What is {x} used for?",)),
)  # fmt: skip
KINDS = {"person": PERSON, "book": BOOK, "town": TOWN, "mineral": MINERAL}


@dataclass(frozen=True)
class Facts:
    """Value indices by kind: (subjects, attributes); an author is a person's number."""

    people: int
    seed: int
    table: dict[str, NDArray[np.int32]]

    def subjects(self, kind: str) -> int:
        """How many subjects of a kind there are."""
        return len(self.table[kind])

    def subject(self, kind: str, number: int) -> str:
        """The subject's name as text."""
        if kind == "person":
            return person(number)
        if kind == "book":
            adjective, noun = divmod(number, len(names.NOUNS))
            return f"The {names.ADJECTIVES[adjective]} {names.NOUNS[noun]}"
        if kind == "town":
            return names.TOWNS[number]
        color, shape = divmod(number, len(SHAPES))
        return f"the {tuple(COLORS)[color]} {SHAPES[shape]}"

    def value(self, kind: str, number: int, attribute: int) -> str:
        """The value of one attribute as text."""
        index = int(self.table[kind][number, attribute])
        values = KINDS[kind][attribute].values
        return values[index] if values else person(index)

    def draw(self, kind: str, rng: random.Random) -> int:
        """A subject; the first people are spoken of more often than the last, as in any town."""
        if kind == "person":
            return int(self.people * rng.random() ** 2)
        return rng.randrange(self.subjects(kind))

    def near(self, kind: str, attribute: int, rng: random.Random) -> str:
        """A value that another subject may have, for a wrong choice."""
        values = KINDS[kind][attribute].values
        return rng.choice(values) if values else person(rng.randrange(self.people))

    def statement(self, kind: str, number: int, rng: random.Random) -> str:
        """All attributes of a subject in one sentence, in a drawn order."""
        order = list(range(len(KINDS[kind])))
        rng.shuffle(order)
        parts = [KINDS[kind][a].states.replace("{v}", self.value(kind, number, a)) for a in order]
        subject = self.subject(kind, number)
        return f"{subject[0].upper()}{subject[1:]} {', '.join(parts)}."


def person(number: int) -> str:
    """Name of a person: first name, middle letter, last name."""
    number, first = divmod(number, len(names.FIRST_NAMES))
    number, last = divmod(number, len(names.LAST_NAMES))
    letter = TOWN_LETTERS[number % len(TOWN_LETTERS)]
    return f"{names.FIRST_NAMES[first]} {letter} {names.LAST_NAMES[last]}"


def facts(seed: int = 0, people: int = PEOPLE) -> Facts:
    """Draw all facts; the same seed and number of people give the same facts."""
    rng = np.random.default_rng(seed)

    def draw(rows: int, kind: str) -> NDArray[np.int32]:
        columns = [
            rng.integers(0, len(attribute.values) or people, size=rows) for attribute in KINDS[kind]
        ]
        return np.stack(columns, axis=1).astype(np.int32)

    table = {"person": draw(people, "person"), "book": draw(BOOKS, "book")}
    table["town"] = draw(len(names.TOWNS), "town")
    table["mineral"] = draw(len(names.MINERALS), "mineral")
    table["mineral"][:, 0] = rng.permutation(len(names.MINERALS))  # a name each
    return Facts(people, seed, table)


def home_split(kind: str, number: int, attribute: int) -> str:
    """The split that has a wording of a fact for itself: 4 % test, 1 % val, the rest train."""
    bucket = zlib.crc32(f"{kind}/{number}/{attribute}".encode()) % 100
    return "test" if bucket < 4 else "val" if bucket < 5 else "train"
