"""Questions without a picture: facts to remember, and short stories to read."""

from __future__ import annotations

import random

from qatbench.mini import names
from qatbench.mini.draft import Draft
from qatbench.mini.facts import KINDS, TOWN, Facts, home_split, person

THINGS = names.words("bell book box brush candle coin cup drum hat key lamp letter map ring rope")
SPOTS = names.words(
    "attic barn basket cellar closet drawer garage garden kitchen library shed tower"
)


def about_person(rng: random.Random, facts: Facts, split: str) -> Draft:
    """Ask one fact about a person."""
    return _fact(rng, facts, "person", split)


def about_book(rng: random.Random, facts: Facts, split: str) -> Draft:
    """Ask one fact about a book."""
    return _fact(rng, facts, "book", split)


def home_of_person(rng: random.Random, facts: Facts, split: str) -> Draft:
    """Two steps: a person's home town, and a fact about that town."""
    number = _pick(rng, facts, "person", split, 0)
    town = int(facts.table["person"][number, 0])
    attribute = rng.randrange(len(TOWN))
    ask = TOWN[attribute].asks[0].replace("{x}", f"the home town of {person(number)}")
    near = [facts.near("town", attribute, rng) for _ in range(12)]
    return Draft(ask, facts.value("town", town, attribute), near)


def story(rng: random.Random, facts: Facts, split: str) -> Draft:
    """Read where things were put; the hint tells."""
    things, spots = rng.sample(THINGS, 3), rng.sample(SPOTS, 3)
    people = [person(rng.randrange(facts.people)) for _ in things]
    rows = list(zip(people, things, spots, strict=True))
    hint = " ".join(f"{who} put the {what} in the {where}." for who, what, where in rows)
    who, what, where = rng.choice(rows)
    if rng.random() < 0.5:
        near = [f"in the {spot}" for spot in [*spots, *rng.sample(SPOTS, 2)]]
        return Draft(f"Where is the {what}?", f"in the {where}", near, hint=hint)
    near = [*things, *rng.sample(THINGS, 2)]
    text = f"What did {who} put away?"
    return Draft(text, f"the {what}", [f"the {thing}" for thing in near], hint=hint)


def _fact(rng: random.Random, facts: Facts, kind: str, split: str) -> Draft:
    """A fact of val or test is asked in the second wording there, and in the first in train."""
    attribute = rng.randrange(len(KINDS[kind]))
    if split == "train":
        number = facts.draw(kind, rng)
        both = home_split(kind, number, attribute) == "train"
        wording = rng.randrange(2) if both else 0
    else:
        number, wording = _pick(rng, facts, kind, split, attribute), 1
    ask = KINDS[kind][attribute].asks[wording].replace("{x}", facts.subject(kind, number))
    near = [facts.near(kind, attribute, rng) for _ in range(12)]
    return Draft(ask, facts.value(kind, number, attribute), near)


def _pick(rng: random.Random, facts: Facts, kind: str, split: str, attribute: int) -> int:
    while True:
        number = facts.draw(kind, rng)
        if home_split(kind, number, attribute) == split:
            return number
