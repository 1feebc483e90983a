"""Questions about a picture of a map: land, and towns marked with a letter."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np

from qatbench.mini.draft import Draft, other_numbers
from qatbench.mini.draw import LANDS, SIDE, TOWN_LETTERS, Grid, land_tile
from qatbench.mini.facts import TOWN, Facts
from qatbench.mini.names import NUMBERS, TOWNS

Place = tuple[int, int]
TOP = 4  # the highest count that is asked for
Map = tuple[list[list[int]], dict[Place, int]]  # land of every tile; town letters by place

AXES = {"north": (0, 1), "south": (0, -1), "west": (1, 1), "east": (1, -1)}  # axis, sign
_PLACES = [(row, column) for row in range(SIDE) for column in range(SIDE)]


def farthest(rng: random.Random, facts: Facts) -> Draft:
    """Name the town farthest in a direction."""
    way, (land, towns), place = _with_farthest(rng)
    return _draft(land, towns, f"Which town is farthest {way}?", _town(towns[place]), towns, rng)


def land_of(rng: random.Random, facts: Facts) -> Draft:
    """Say on which land a town lies."""
    land, towns = _map(rng)
    place = rng.choice(list(towns))
    text = f"On which kind of land is {_town(towns[place])}?"
    return _about_land(land, towns, text, place)


def land_of_farthest(rng: random.Random, facts: Facts) -> Draft:
    """Two steps: find the farthest town, say on which land it lies."""
    way, (land, towns), place = _with_farthest(rng)
    text = f"On which kind of land is the town farthest {way}?"
    return _about_land(land, towns, text, place)


def count_towns(rng: random.Random, facts: Facts) -> Draft:
    """Count the towns on one kind of land."""
    count = rng.randint(1, TOP)
    while True:
        land, towns = _map(rng)
        kinds = Counter(land[row][column] for row, column in towns)
        fitting = [kind for kind, found in kinds.items() if found == count]
        if fitting:
            break
    text = f"How many towns lie on {LANDS[rng.choice(fitting)]}?"
    return Draft(text, NUMBERS[count], other_numbers(count, TOP, rng), _grid(land, towns))


def next_town(rng: random.Random, facts: Facts) -> Draft:
    """Name the next town in a direction along the row or column."""
    way = rng.choice(list(AXES))
    axis, sign = AXES[way]
    land, towns = _map(rng, count=rng.randint(4, 6))
    start, end = sorted(rng.sample(range(SIDE), 2), reverse=sign > 0)
    line = rng.randrange(SIDE)
    here = (start, line) if axis == 0 else (line, start)
    there = (end, line) if axis == 0 else (line, end)
    between = {(i, line) if axis == 0 else (line, i) for i in range(SIDE)}
    kept = {p: t for p, t in towns.items() if p not in between}
    unused = [t for t in range(len(TOWN_LETTERS)) if t not in kept.values()]
    kept[here], kept[there] = rng.sample(unused, 2)
    text = f"Which town is directly {way} of {_town(kept[here])}?"
    others = {place: town for place, town in kept.items() if place != here}
    return _draft(land, kept, text, _town(kept[there]), others, rng)


def same_land(rng: random.Random, facts: Facts) -> Draft:
    """Two steps: see on which land a town lies, find the other town on it."""
    while True:
        land, towns = _map(rng)
        by_land: dict[int, list[Place]] = {}
        for row, column in towns:
            by_land.setdefault(land[row][column], []).append((row, column))
        pairs = [places for places in by_land.values() if len(places) == 2]
        if pairs:
            break
    asked, other = rng.sample(rng.choice(pairs), 2)
    text = f"Which town is on the same kind of land as {_town(towns[asked])}?"
    others = {place: town for place, town in towns.items() if place != asked}
    return _draft(land, towns, text, _town(towns[other]), others, rng)


def fact_of_farthest(rng: random.Random, facts: Facts) -> Draft:
    """Two steps: find the farthest town, remember a fact about it."""
    way, (land, towns), place = _with_farthest(rng)
    attribute = rng.randrange(len(TOWN))
    text = TOWN[attribute].asks[0].replace("{x}", f"the town farthest {way}")
    near = [facts.value("town", town, attribute) for town in towns.values()]
    near += [facts.near("town", attribute, rng) for _ in range(6)]
    right = facts.value("town", towns[place], attribute)
    return Draft(text, right, near, _grid(land, towns))


def name_of_farthest(rng: random.Random, facts: Facts) -> Draft:
    """Two steps: find the farthest town, remember its full name."""
    way, (land, towns), place = _with_farthest(rng)
    near = [TOWNS[town] for town in towns.values()]
    text = f"What is the name of the town farthest {way}?"
    return Draft(text, TOWNS[towns[place]], near, _grid(land, towns))


def _town(number: int) -> str:
    return f"town {TOWN_LETTERS[number]}"


def _map(rng: random.Random, count: int | None = None) -> Map:
    """Land in patches around drawn centres, with 5 to 8 towns."""
    centres = [(rng.random() * SIDE, rng.random() * SIDE, rng.randrange(len(LANDS)))
               for _ in range(rng.randint(4, 7))]  # fmt: skip

    def nearest(row: int, column: int) -> int:
        return min(centres, key=lambda c: (c[0] - row) ** 2 + (c[1] - column) ** 2)[2]

    land = [[nearest(row, column) for column in range(SIDE)] for row in range(SIDE)]
    places = rng.sample(_PLACES, count or rng.randint(5, 8))
    letters = rng.sample(range(len(TOWN_LETTERS)), len(places))
    return land, dict(zip(places, letters, strict=True))


def _with_farthest(rng: random.Random) -> tuple[str, Map, Place]:
    """A direction, a map where one town alone is farthest in it, and that town's place."""
    way = rng.choice(list(AXES))
    axis, sign = AXES[way]
    while True:
        land, towns = _map(rng)
        ranked = sorted(towns, key=lambda place: sign * place[axis])
        if ranked[0][axis] != ranked[1][axis]:
            return way, (land, towns), ranked[0]


def _about_land(land: list[list[int]], towns: dict[Place, int], text: str, at: Place) -> Draft:
    near = [LANDS[land[row][column]] for row, column in towns]
    return Draft(text, LANDS[land[at[0]][at[1]]], [*near, *LANDS], _grid(land, towns))


def _draft(
    land: list[list[int]],
    towns: dict[Place, int],
    text: str,
    right: str,
    near: dict[Place, int],
    rng: random.Random,
) -> Draft:
    others = [_town(number) for number in near.values()]
    rng.shuffle(others)
    return Draft(text, right, others, _grid(land, towns))


def _grid(land: list[list[int]], towns: dict[Place, int]) -> Grid:
    grid: Grid = np.empty((SIDE, SIDE), dtype=np.int16)
    for row, column in _PLACES:
        grid[row, column] = land_tile(land[row][column], towns.get((row, column)))
    return grid
