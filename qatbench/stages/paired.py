"""Two arms on the same questions: the numbers of one PairResult."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from qatbench import stats
from qatbench.report.model import PairResult, SeedPair

Counts = NDArray[np.int64]
LEVEL = 0.95  # of every interval


class Scores(NamedTuple):
    """One arm's answers: who was right, by seed and question."""

    name: str
    seeds: tuple[int, ...]
    right: Counts  # (seeds, questions), 0 or 1


def pair_result(
    arm: Scores,
    reference: Scores,
    *,
    margin: float,
    draws: int,
    seed: int,
    clusters: Sequence[str] | None = None,
) -> PairResult:
    """Compare two arms; `p_holm` is still `p`, for the caller to adjust.

    With `clusters`, one a question, questions of one cluster are resampled together, and their
    signs are flipped together, of single seeds too.

    Raises: UsageError if there are fewer than two clusters or margin is not in (0, 1).
    """
    a, b = arm.right.mean(axis=0), reference.right.mean(axis=0)
    interval = stats.paired_bootstrap(a, b, clusters, draws=draws, level=LEVEL, seed=seed)
    tost = stats.tost_paired(
        a, b, margin, clusters=clusters, level=LEVEL, draws=draws, seed=seed
    )  # fmt: skip
    pairs = tuple(
        _seed_pair(arm, reference, i, j, clusters) for i, j in partners(arm.seeds, reference.seeds)
    )
    if len(arm.seeds) == len(reference.seeds) == 1:
        p = pairs[0].p
    else:  # one denominator for both means: seeds of the one times seeds of the other
        differences = arm.right.sum(axis=0) * len(reference.seeds)
        differences -= reference.right.sum(axis=0) * len(arm.seeds)
        p = sign_flip_test(differences if clusters is None else _by_cluster(differences, clusters))
    return PairResult(
        arm=arm.name,
        reference=reference.name,
        difference=interval.difference,
        low=interval.low,
        high=interval.high,
        p=p,
        p_holm=p,
        p_equivalence=tost.p,
        verdict=tost.verdict,
        n_needed=tost.n_needed,
        seed_pairs=pairs,
        lost=sum(pair.lost for pair in pairs) / len(pairs) if pairs else None,
        gained=sum(pair.gained for pair in pairs) / len(pairs) if pairs else None,
    )


def _by_cluster(differences: Counts, clusters: Sequence[str]) -> Counts:
    _, place = np.unique(np.asarray(clusters), return_inverse=True)
    sums = np.zeros(place.max() + 1, dtype=np.int64)
    np.add.at(sums, place, differences)
    return sums


def sign_flip_test(differences: Counts) -> float:
    """Two-sided exact p-value of a sum whose terms' signs are fair coins under the null.

    The distribution of the sum is the Fourier inverse of its characteristic function, the product
    of cos(size * t) over the terms; with terms of -1, 0 and 1 this is McNemar's exact test.

    Shapes: differences (n,), whole numbers (per-question counts, brought to one denominator).
    Returns: P(|sum| at least as large); not below 1e-12, which rounding cannot resolve.
    Source: Fisher's randomization test, The Design of Experiments (1935), sec. 21.
    """
    sizes, counts = np.unique(np.abs(differences[differences != 0]), return_counts=True)
    if len(sizes) == 0:
        return 1.0
    unit = np.gcd.reduce(sizes)
    sizes, observed = sizes // unit, abs(int(differences.sum())) // int(unit)
    reach = int(sizes @ counts)
    length = 2 * reach + 1  # the sums -reach .. reach
    angles = 2 * np.pi * np.arange(length) / length
    characteristic = np.ones(length)
    for size, count in zip(sizes, counts, strict=True):
        characteristic *= np.cos(size * angles) ** count
    chances = np.fft.fft(characteristic).real / length  # of the sum t, at index t mod length
    sums = np.arange(-reach, reach + 1)
    tail = float(chances[sums[np.abs(sums) >= observed] % length].sum())
    return min(max(tail, 1e-12), 1.0)


def wilson_of_mean(accuracies: tuple[float, ...], n: int) -> tuple[float, float]:
    """Wilson interval of n questions around the mean over seeds.

    It has the width of one seed's n questions, however many seeds there are: all seeds answered
    the same questions. The closed form of `stats.wilson`, as the mean count need not be whole.
    """
    if len(accuracies) == 1:
        return stats.wilson(round(accuracies[0] * n), n, LEVEL)
    share, z = sum(accuracies) / len(accuracies), NormalDist().inv_cdf((1 + LEVEL) / 2)
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * (share * (1 - share) / n + z**2 / (4 * n**2)) ** 0.5
    return max(centre - half, 0.0), min(centre + half, 1.0)


def partners(arm: tuple[int, ...], reference: tuple[int, ...]) -> list[tuple[int, int]]:
    """Positions of the seeds to pair: equal seeds, or all with the only seed of either arm."""
    alone = len(arm) == 1 or len(reference) == 1
    return [
        (i, j)
        for i, mine in enumerate(arm)
        for j, other in enumerate(reference)
        if alone or mine == other
    ]


def _seed_pair(
    arm: Scores, reference: Scores, i: int, j: int, clusters: Sequence[str] | None
) -> SeedPair:
    mine, other = arm.right[i], reference.right[j]
    counts = stats.paired_counts(mine, other)
    if clusters is None:
        p = stats.mcnemar_exact(counts.only_b, counts.only_a)
    else:
        p = sign_flip_test(_by_cluster(mine - other, clusters))
    return SeedPair(
        seed=arm.seeds[i],
        reference_seed=reference.seeds[j],
        lost=counts.only_b,
        gained=counts.only_a,
        p=p,
    )
