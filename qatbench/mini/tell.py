"""What else there is to say about a picture: dense supervision for rows with a picture.

A question asks for one word of a scene, which is little to learn from. Each tell looks one place
up and names all that is to be known there; tells are in the training rows only, never in the
benchmark.
"""

from __future__ import annotations

import random
from collections import Counter

from qatbench.mini.atlas import AXES
from qatbench.mini.draw import EMPTY, SIDE, TOWN_LETTERS, Grid, is_map, kind_of_sample, tile_words
from qatbench.mini.facts import MINERAL, TOWN, Facts
from qatbench.mini.names import TOWNS
from qatbench.mini.tray import CORNERS, STEPS, Place

Tell = tuple[str, str]  # what is asked, what is told
NOTHING, OUTSIDE = "empty", "the edge"


def tells(grid: Grid, facts: Facts, rng: random.Random) -> list[Tell]:
    """All that can be told of a scene, in a drawn order."""
    found = _of_map(grid, facts) if is_map(int(grid[0, 0])) else _of_tray(grid, facts)
    rng.shuffle(found)
    return found


def _of_tray(grid: Grid, facts: Facts) -> list[Tell]:
    words = tile_words()
    samples: dict[Place, str] = {
        (r, c): words[tile]
        for r, row in enumerate(grid.tolist())
        for c, tile in enumerate(row)
        if tile != EMPTY
    }
    names, shapes = Counter(samples.values()), Counter(w.split()[-1] for w in samples.values())
    found = []
    for place, its in samples.items():
        around = f" {its}; {_around(place, samples)}"
        if names[its] == 1:
            found.append((f"What is around the {its}?", around))
        if shapes[its.split()[-1]] == 1:
            found.append((f"What is around the {its.split()[-1]}?", around))
    for name, place in CORNERS.items():
        if place in samples:
            number = kind_of_sample(int(grid[place]))
            known = [facts.value("mineral", number, a) for a in range(len(MINERAL))]
            told = " ".join((samples[place], *known))
            found.append((f"What is known of the mineral in the {name} corner?", f" {told}"))
    return found


def _around(place: Place, samples: dict[Place, str]) -> str:
    told = []
    for step, (down, right) in STEPS.items():
        row, column = place[0] + down, place[1] + right
        inside = 0 <= row < SIDE and 0 <= column < SIDE
        there = samples.get((row, column), NOTHING) if inside else OUTSIDE
        told.append(f"{step} {there}")
    return ", ".join(told)


def _of_map(grid: Grid, facts: Facts) -> list[Tell]:
    words = tile_words()
    towns: dict[str, Place] = {}
    land: dict[str, str] = {}
    for r, row in enumerate(grid.tolist()):
        for c, tile in enumerate(row):
            if " " in words[tile]:
                its, letter = words[tile].split()
                towns[letter], land[letter] = (r, c), its
    found = [
        (f"What is around town {town}?", f" {land[town]}; {_next(place, towns)}")
        for town, place in towns.items()
    ]
    for way, (axis, sign) in AXES.items():
        ranked = sorted(towns, key=lambda town: sign * towns[town][axis])
        if towns[ranked[0]][axis] == towns[ranked[1]][axis]:
            continue
        number = TOWN_LETTERS.index(ranked[0])
        known = [facts.value("town", number, a) for a in range(len(TOWN))]
        told = " ".join((ranked[0], land[ranked[0]], TOWNS[number], *known))
        found.append((f"What is known of the town farthest {way}?", f" {told}"))
    return found


def _next(here: Place, towns: dict[str, Place]) -> str:
    told = []
    for way, (axis, sign) in AXES.items():
        ahead = [
            (sign * (here[axis] - place[axis]), town)
            for town, place in towns.items()
            if place[1 - axis] == here[1 - axis] and sign * (here[axis] - place[axis]) > 0
        ]
        told.append(f"{way} {min(ahead)[1] if ahead else NOTHING}")
    return ", ".join(told)
