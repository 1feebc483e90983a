"""Groups of questions, and the bootstrap intervals of a difference in each."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import numpy as np

from qatbench import stats
from qatbench.records import Prediction
from qatbench.stages.answers import Ints
from qatbench.stats_resample import widened

KINDS = ("subject", "category", "l2_category", "context")

Bounds = tuple[float | None, float | None]
Interval = Callable[[Ints, Ints, int], Bounds]  # numerators, places of questions, denominator


class Group(NamedTuple):
    """Questions that share a subject, a category or a context."""

    kind: str
    name: str
    places: Ints  # of its questions


def groups_of(first: Sequence[Prediction]) -> list[Group]:
    """Groups of questions by kind and name; a question is in none of a kind it does not state."""
    named = [_names(row) for row in first]
    found = []
    for kind in KINDS:
        places: dict[str, list[int]] = {}
        for place, names in enumerate(named):
            if kind in names:
                places.setdefault(names[kind], []).append(place)
        found += [Group(kind, name, np.array(some)) for name, some in sorted(places.items())]
    return found


def _names(row: Prediction) -> dict[str, str]:
    """Kind -> name of the groups that a question belongs to."""
    names = {kind: str(row.meta[kind]) for kind in KINDS if row.meta.get(kind)}
    names.pop("context", None)  # worked out, never read
    image = row.meta.get("has_image")
    return names if image is None else {**names, "context": "image" if image else "text only"}


def intervals(draws: int, seed: int, level: float, clusters: Sequence[Hashable] | None) -> Interval:
    """Bootstrap intervals of groups; (None, None) where there is but one thing to draw.

    Where each question is drawn alone, the distribution is worked out, which of a thousand groups
    takes less time than drawing from it; where a group's questions share clusters, it is drawn.
    """
    known: dict[tuple[tuple[int, ...], tuple[int, ...], int], Bounds] = {}

    def interval(numerators: Ints, places: Ints, denominator: int) -> Bounds:
        ids = range(len(places)) if clusters is None else [clusters[place] for place in places]
        different = len(set(ids))
        if different < 2:
            return None, None
        if different < len(ids):
            differences = numerators / denominator
            found = stats.paired_bootstrap(
                differences, 0 * differences, ids, draws=draws, level=level, seed=seed
            )
            return found.low, found.high
        sizes, counts = np.unique(numerators, return_counts=True)
        key = tuple(sizes.tolist()), tuple(counts.tolist()), denominator
        if key not in known:
            away = numerators - numerators.mean()
            known[key] = percentiles(sizes, counts, denominator, widened(away, level))
        return known[key]

    return interval


def percentiles(sizes: Ints, counts: Ints, denominator: int, level: float) -> tuple[float, float]:
    """The percentiles that resampling comes to with ever more draws, without drawing.

    The sum of n draws has the Fourier inverse of the n-th power of one draw's characteristic
    function as its distribution.

    Shapes: sizes (k,) distinct differences times `denominator`, rising; counts (k,) how many
    questions have each, n together. Returns: the lowest and the highest mean that at least a share
    of (1 - level) / 2 of all resamples reach or pass on its side; swapped arms mirror it.
    """
    n, least = int(counts.sum()), int(sizes[0])
    unit = int(np.gcd.reduce(sizes - least)) or 1
    steps = (sizes - least) // unit  # a sum is n * least + unit * (sum of steps)
    length = n * int(steps[-1]) + 1
    one = np.zeros(length)
    one[steps] = counts / n
    padded = 1 << (length - 1).bit_length()
    chances = np.fft.irfft(np.fft.rfft(one, padded) ** n, padded)[:length] if length > 1 else one
    tail = (1 - level) / 2
    low = int(np.argmax(np.cumsum(chances) >= tail))
    high = length - 1 - int(np.argmax(np.cumsum(chances[::-1]) >= tail))
    low_sum, high_sum = (n * least + unit * reached for reached in (low, high))
    return low_sum / (n * denominator), high_sum / (n * denominator)
