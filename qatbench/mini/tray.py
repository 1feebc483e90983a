"""Questions about a picture of mineral samples on a tray."""

from __future__ import annotations

import random

import numpy as np

from qatbench.mini.draft import Draft, other_numbers
from qatbench.mini.draw import COLORS, EMPTY, FILLS, SHAPES, SIDE, Grid, sample_tile
from qatbench.mini.facts import MINERAL, Facts
from qatbench.mini.names import NUMBERS

Sample = tuple[int, int, int]  # indices into COLORS, SHAPES and FILLS
Place = tuple[int, int]  # row, column
Tray = dict[Place, Sample]
TOP = 7  # the highest count that is asked for

COLOR_NAMES = tuple(COLORS)
CORNERS = {
    "top left": (0, 0), "top right": (0, SIDE - 1), "bottom left": (SIDE - 1, 0),
    "bottom right": (SIDE - 1, SIDE - 1),
}  # fmt: skip
STEPS = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}
_PLACES = [(row, column) for row in range(SIDE) for column in range(SIDE)]


def words(sample: Sample) -> str:
    """A sample in words, e.g. `hollow red star`."""
    color, shape, fill = sample
    return f"{'hollow ' if fill else ''}{COLOR_NAMES[color]} {SHAPES[shape]}"


def color_of(rng: random.Random, facts: Facts) -> Draft:
    """Find the only sample of a shape, name its colour."""
    tray, place = _with_only_shape(rng)
    color, shape, _ = tray[place]
    seen = [COLOR_NAMES[other[0]] for other in tray.values()]
    text = f"What color is the {SHAPES[shape]}?"
    return _draft(tray, text, COLOR_NAMES[color], [*seen, *COLOR_NAMES], rng)


def corner(rng: random.Random, facts: Facts) -> Draft:
    """Name the sample in a corner."""
    name = rng.choice(list(CORNERS))
    tray = _tray(rng, (CORNERS[name],))
    target = tray[CORNERS[name]]
    text = f"Which sample is in the {name} corner?"
    return _draft(tray, text, words(target), _like(target, rng), rng)


def count_color(rng: random.Random, facts: Facts) -> Draft:
    """Count the samples of a colour."""
    color = rng.randrange(len(COLORS))
    tray, count = _counted(rng, 0, color)
    text = f"How many {COLOR_NAMES[color]} samples are there?"
    return _draft(tray, text, NUMBERS[count], other_numbers(count, TOP, rng), rng)


def count_shape(rng: random.Random, facts: Facts) -> Draft:
    """Count the samples of a shape."""
    shape = rng.randrange(len(SHAPES))
    tray, count = _counted(rng, 1, shape)
    text = f"How many samples have the shape of a {SHAPES[shape]}?"
    return _draft(tray, text, NUMBERS[count], other_numbers(count, TOP, rng), rng)


def count_hollow(rng: random.Random, facts: Facts) -> Draft:
    """Count the hollow samples."""
    tray, count = _counted(rng, 2, FILLS.index("hollow"))
    text = "How many hollow samples are there?"
    return _draft(tray, text, NUMBERS[count], other_numbers(count, TOP, rng), rng)


def more(rng: random.Random, facts: Facts) -> Draft:
    """Compare how many samples two colours have."""
    first, second = rng.sample(range(len(COLORS)), 2)
    few = rng.randint(1, 3)
    many = few + rng.randint(1, 2)
    high, low = (first, second) if rng.random() < 0.5 else (second, first)
    rest = [c for c in range(len(COLORS)) if c not in (high, low)]
    colors = [high] * many + [low] * few + [rng.choice(rest) for _ in range(rng.randint(2, 5))]
    places = rng.sample(_PLACES, len(colors))
    tray = {p: (c, *_sample(rng)[1:]) for p, c in zip(places, colors, strict=True)}
    text = f"Which color has more samples, {COLOR_NAMES[first]} or {COLOR_NAMES[second]}?"
    return _draft(tray, text, COLOR_NAMES[high], [COLOR_NAMES[low]], rng)


def neighbour(rng: random.Random, facts: Facts) -> Draft:
    """Name the sample next to one that is described."""
    tray, place, step, other = _with_neighbour(rng)
    text = f"Which sample is directly {step} the {words(tray[place])}?"
    return _draft(tray, text, words(tray[other]), _like(tray[other], rng), rng)


def hop(rng: random.Random, facts: Facts) -> Draft:
    """Two steps: find the only sample of a shape, name the colour of its neighbour."""
    tray, place, step, other = _with_neighbour(rng, only_shape=True)
    seen = [COLOR_NAMES[sample[0]] for sample in tray.values()]
    text = f"What color is the sample directly {step} the {SHAPES[tray[place][1]]}?"
    right = COLOR_NAMES[tray[other][0]]
    return _draft(tray, text, right, [*seen, *COLOR_NAMES], rng)


def mineral(rng: random.Random, facts: Facts) -> Draft:
    """Two steps: see a sample, remember a fact about its mineral."""
    if rng.random() < 0.5:
        name = rng.choice(list(CORNERS))
        place, where = CORNERS[name], f"in the {name} corner"
        tray = _tray(rng, (place,))
    else:
        tray, known, step, place = _with_neighbour(rng)
        where = f"directly {step} the {words(tray[known])}"
    attribute = rng.randrange(len(MINERAL))
    text = MINERAL[attribute].asks[0].replace("{x}", f"the mineral {where}")
    others = [_known(facts, sample, attribute) for sample in tray.values()]
    far = [facts.near("mineral", attribute, rng) for _ in range(6)]
    return _draft(tray, text, _known(facts, tray[place], attribute), [*others, *far], rng)


def count_mineral(rng: random.Random, facts: Facts) -> Draft:
    """Two steps: remember what a named mineral looks like, count its samples."""
    number = rng.randrange(facts.subjects("mineral"))
    color, shape = divmod(number, len(SHAPES))
    count = rng.randint(1, TOP)
    others: list[Sample] = []
    while len(others) < rng.randint(4, 8):
        one = _sample(rng)
        near = (color, one[1], one[2]) if rng.random() < 0.4 else (one[0], shape, one[2])
        drawn = near if rng.random() < 0.5 else one
        if drawn[:2] != (color, shape):
            others.append(drawn)
    samples = [(color, shape, rng.randrange(2)) for _ in range(count)] + others
    tray = dict(zip(rng.sample(_PLACES, len(samples)), samples, strict=True))
    text = f"How many pieces of {facts.value('mineral', number, 0)} are there?"
    return _draft(tray, text, NUMBERS[count], other_numbers(count, TOP, rng), rng)


def _known(facts: Facts, sample: Sample, attribute: int) -> str:
    return facts.value("mineral", sample[0] * len(SHAPES) + sample[1], attribute)


def _sample(rng: random.Random) -> Sample:
    return rng.randrange(len(COLORS)), rng.randrange(len(SHAPES)), rng.randrange(len(FILLS))


def _tray(rng: random.Random, taken: tuple[Place, ...] = ()) -> Tray:
    free = [place for place in _PLACES if place not in taken]
    places = [*taken, *rng.sample(free, rng.randint(6, 13))]
    return {place: _sample(rng) for place in places}


def _counted(rng: random.Random, part: int, value: int) -> tuple[Tray, int]:
    """A tray where a drawn number of samples has a value in one of its parts."""
    sizes = (len(COLORS), len(SHAPES), len(FILLS))
    count = rng.randint(1, TOP)
    tray = {}
    for i, place in enumerate(rng.sample(_PLACES, count + rng.randint(2, 7))):
        sample = list(_sample(rng))
        others = [v for v in range(sizes[part]) if v != value]
        sample[part] = value if i < count else rng.choice(others)
        tray[place] = (sample[0], sample[1], sample[2])
    return tray, count


def _with_only_shape(rng: random.Random, taken: tuple[Place, ...] = ()) -> tuple[Tray, Place]:
    """A tray and the place of the only sample of its shape: the first taken one, if any."""
    tray = _tray(rng, taken)
    place = next(iter(tray))
    shape = tray[place][1]
    others = [s for s in range(len(SHAPES)) if s != shape]
    for other, (color, its, fill) in tray.items():
        if other != place and its == shape:
            tray[other] = (color, rng.choice(others), fill)
    return tray, place


def _with_neighbour(
    rng: random.Random, *, only_shape: bool = False
) -> tuple[Tray, Place, str, Place]:
    """A tray, a place whose sample is there once, a direction, and the place next to it."""
    while True:
        step = rng.choice(list(STEPS))
        row, column = rng.choice(_PLACES)
        other = (row + STEPS[step][0], column + STEPS[step][1])
        if other in _PLACES:
            break
    tray, place = _with_only_shape(rng, ((row, column), other))
    if not only_shape:  # allow its shape elsewhere, in another colour
        for spot in rng.sample([p for p in tray if p not in (place, other)], 2):
            color = rng.choice([c for c in range(len(COLORS)) if c != tray[place][0]])
            tray[spot] = (color, tray[place][1], tray[spot][2])
    return tray, place, step, other


def _like(sample: Sample, rng: random.Random) -> list[str]:
    """The other three of two values in each of two parts: no choice has more in common."""
    sizes = (len(COLORS), len(SHAPES), len(FILLS))
    first, second = rng.sample(range(3), 2)
    changed = {
        part: rng.choice([v for v in range(sizes[part]) if v != sample[part]])
        for part in (first, second)
    }
    near = []
    for parts in ((first,), (second,), (first, second)):
        other = list(sample)
        for part in parts:
            other[part] = changed[part]
        near.append(words((other[0], other[1], other[2])))
    rng.shuffle(near)
    return near


def _draft(tray: Tray, text: str, right: str, near: list[str], rng: random.Random) -> Draft:
    grid: Grid = np.full((SIDE, SIDE), EMPTY, dtype=np.int16)
    for (row, column), sample in tray.items():
        grid[row, column] = sample_tile(*sample)
    return Draft(text, right, near, grid)
