"""Where the names of points go: beside them if there is room, else further off with a leader line.

Greedy, name by name; all lengths are points of a figure (1/72 inch), y upwards. No name lies over
another or over a point, and none leaves the frame: one that cannot is not placed, and its caller is
told. A leader line goes round names, unless its point is shut in by them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

GAP, ASIDE = 1.0, 4.0  # between two names one above the other, and side by side
BESIDE = 5.5  # from a point to a name beside it
LED = 8.5  # a name further off has a leader line
_RINGS = (10.0, 15.0, 21.0, 28.0, 36.0, 46.0, 58.0, 72.0, 90.0)  # distances to try
_DIRECTIONS = 16
_STEP = 6.0  # of the raster that is tried last
# Costs, in points of distance: what a name puts up with rather than move that much further.
_ON_LINE, _OVER_POINT, _CROSSED, _NEARER_OTHER = 9.0, 12.0, 25.0, 6.0

Spot = tuple[float, float]


class Box(NamedTuple):
    """An upright rectangle."""

    x0: float
    y0: float
    x1: float
    y1: float

    def padded(self, by: float) -> Box:
        """Grow it on all sides."""
        return Box(self.x0 - by, self.y0 - by, self.x1 + by, self.y1 + by)

    def meets(self, other: Box) -> bool:
        """Whether they share more than an edge."""
        across = self.x0 < other.x1 and other.x0 < self.x1
        return across and self.y0 < other.y1 and other.y0 < self.y1

    def holds(self, other: Box) -> bool:
        """Whether the other lies inside."""
        across = self.x0 <= other.x0 and other.x1 <= self.x1
        return across and self.y0 <= other.y0 and other.y1 <= self.y1

    def nearest(self, spot: Spot) -> Spot:
        """The place in it that is nearest to a spot."""
        return min(max(spot[0], self.x0), self.x1), min(max(spot[1], self.y0), self.y1)

    def cut_by(self, one: Spot, other: Spot) -> bool:
        """Whether a straight line from one spot to another goes through its inside."""
        first, last = 0.0, 1.0
        for at, step, low, high in (
            (one[0], other[0] - one[0], self.x0, self.x1),
            (one[1], other[1] - one[1], self.y0, self.y1),
        ):
            if step == 0:
                if not low < at < high:
                    return False
                continue
            enter, leave = sorted(((low - at) / step, (high - at) / step))
            first, last = max(first, enter), min(last, leave)
        return first < last


class Name(NamedTuple):
    """What is to be placed: the spot it names, and how large its text is."""

    spot: Spot
    width: float
    height: float


class Placed(NamedTuple):
    """Where a name goes."""

    box: Box
    leader: tuple[Spot, Spot] | None  # from its point to its edge, if it is not beside it


def place(
    names: Sequence[Name], frame: Box, points: Sequence[Spot], lines: Sequence[Box] = ()
) -> list[Placed | None]:
    """Place names one after the other.

    Args:
        names: the first has the first choice.
        frame: what no name leaves.
        points: all that are drawn, those that are named among them; a name keeps off by
            `BESIDE` - 1.
        lines: stretches of upright or level lines; a name may lie on one if it must.

    Returns: for each name its place; None where no place of the frame is free.
    """
    dots = [Box(x, y, x, y).padded(BESIDE - 1) for x, y in points]
    placed: list[Placed | None] = []
    for name in names:
        there = [mine for mine in placed if mine is not None]
        placed.append(_best(name, frame, dots, there, lines))
    return placed


def _best(
    name: Name, frame: Box, dots: Sequence[Box], placed: Sequence[Placed], lines: Sequence[Box]
) -> Placed | None:
    for tries, shut_in in (((_around,), False), ((_everywhere,), False),
                           ((_around, _everywhere), True)):  # fmt: skip
        best: tuple[float, Placed] | None = None
        for box in (box for boxes in tries for box in boxes(name, frame)):
            made = Placed(box, _leader(name, box))
            if not _free(box, dots, placed):
                continue
            under = _passed_under(made, placed)
            if under and not shut_in:
                continue
            cost = _cost(name, made, dots, placed, lines) + _CROSSED * under
            if best is None or cost < best[0]:
                best = cost, made
        if best is not None:
            return best[1]
    return None


def _around(name: Name, frame: Box) -> Iterator[Box]:
    """Beside the point in eight ways, then on rings about it."""
    (x, y), w, h = name.spot, name.width, name.height
    lefts, lows = (x + BESIDE, x - BESIDE - w), (y + BESIDE, y - BESIDE - h)
    corners = [(left, low) for left in lefts for low in lows]
    middles = [(lefts[0], y - h / 2), (lefts[1], y - h / 2), *((x - w / 2, low) for low in lows)]
    spots = [*corners, *middles]
    for ring in _RINGS:
        for k in range(_DIRECTIONS):
            angle = 2 * math.pi * k / _DIRECTIONS
            left = x + math.cos(angle) * (ring + w / 2) - w / 2
            spots.append((left, y + math.sin(angle) * (ring + h / 2) - h / 2))
    for left, low in spots:
        box = Box(left, low, left + w, low + h)
        if frame.holds(box):
            yield box


def _everywhere(name: Name, frame: Box) -> Iterator[Box]:
    across = int((frame.x1 - frame.x0 - name.width) // _STEP) + 1
    upwards = int((frame.y1 - frame.y0 - name.height) // _STEP) + 1
    for column in range(across):
        for row in range(upwards):
            left, low = frame.x0 + _STEP * column, frame.y0 + _STEP * row
            yield Box(left, low, left + name.width, low + name.height)


def _leader(name: Name, box: Box) -> tuple[Spot, Spot] | None:
    end = box.nearest(name.spot)
    return (name.spot, end) if math.dist(name.spot, end) > LED else None


def _free(box: Box, dots: Sequence[Box], placed: Sequence[Placed]) -> bool:
    """Whether a name there lies over no point and no name."""
    if any(box.meets(dot) for dot in dots):
        return False
    apart = Box(box.x0 - ASIDE, box.y0 - GAP, box.x1 + ASIDE, box.y1 + GAP)
    return not any(apart.meets(other.box) for other in placed)


def _passed_under(made: Placed, placed: Sequence[Placed]) -> int:
    """How many names its leader would go through, and how many leaders would go through it."""
    box = made.box.padded(GAP)
    return sum(
        bool(made.leader and other.box.padded(GAP).cut_by(*made.leader))
        + bool(other.leader and box.cut_by(*other.leader))
        for other in placed
    )


def _cost(
    name: Name, made: Placed, dots: Sequence[Box], placed: Sequence[Placed], lines: Sequence[Box]
) -> float:
    """How far off it is, and what lies under it or nearer to it than its own point."""
    own = math.dist(name.spot, made.box.nearest(name.spot))
    cost = own + _ON_LINE * sum(made.box.padded(GAP).meets(line) for line in lines)
    for dot in dots:
        middle = ((dot.x0 + dot.x1) / 2, (dot.y0 + dot.y1) / 2)
        if middle == name.spot:
            continue
        if math.dist(middle, made.box.nearest(middle)) <= own:
            cost += _NEARER_OTHER
        if made.leader and dot.cut_by(*made.leader):
            cost += _OVER_POINT
    if made.leader:
        leaders = [other.leader for other in placed if other.leader]
        cost += _CROSSED * sum(_cross(made.leader, leader) for leader in leaders)
    return cost


def _cross(one: tuple[Spot, Spot], other: tuple[Spot, Spot]) -> bool:
    """Whether two stretches of line cross; not if they only meet at an end."""

    def side(line: tuple[Spot, Spot], spot: Spot) -> float:
        (x0, y0), (x1, y1) = line
        return (x1 - x0) * (spot[1] - y0) - (y1 - y0) * (spot[0] - x0)

    return (
        side(one, other[0]) * side(one, other[1]) < 0
        and side(other, one[0]) * side(other, one[1]) < 0
    )
