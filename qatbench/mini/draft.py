"""A question before its choices are drawn."""

from __future__ import annotations

import random
from typing import NamedTuple

from qatbench.mini.draw import Grid
from qatbench.mini.names import NUMBERS


class Draft(NamedTuple):
    """Text, right answer, wrong answers (the nearest first, repeats allowed), scene and hint."""

    text: str
    right: str
    near: list[str]
    grid: Grid | None = None
    hint: str = ""


def other_numbers(count: int, top: int, rng: random.Random) -> list[str]:
    """The other number words from one to `top`, in a drawn order.

    Counts are drawn evenly from the same range, so no set of choices tells which is right.
    """
    numbers = [n for n in range(1, top + 1) if n != count]
    return [NUMBERS[n] for n in rng.sample(numbers, len(numbers))]
