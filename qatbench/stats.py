"""Statistics of arms that answered the same questions: fractions in, fractions out, no torch.

Every function refuses what it cannot answer honestly (no data, NaN, a single cluster) with a
UsageError; none returns 0.0 for "unknown". Differences are always mean(a) - mean(b).
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import binomtest, norm

from qatbench.errors import UsageError

Array = NDArray[np.float64]
Verdict = Literal["equivalent", "better", "worse", "undecided"]

_CHUNK_BYTES = 32 << 20  # counts of one chunk; their float copy in the product doubles it
_POWER = 0.8


class PairedCounts(NamedTuple):
    """Questions by who was right; the four add up to n."""

    both: int
    only_a: int
    only_b: int
    neither: int


class PairedDifference(NamedTuple):
    """mean(a) - mean(b) with its percentile interval (fractions)."""

    difference: float
    low: float
    high: float
    draws: int
    n: int
    n_clusters: int


class Equivalence(NamedTuple):
    """Outcome of `tost_paired`; `low`, `high` bound the (1 - 2 alpha) interval (fractions)."""

    verdict: Verdict
    difference: float
    low: float
    high: float
    n_needed: int


def wilson(k: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson score interval, without continuity correction, of k right answers out of n.

    Returns: (low, high), fractions; `level` is the two-sided coverage.
    Raises: UsageError if n is 0, k lies outside [0, n], a count is not whole, or level is not in
        (0, 1).
    Source: Wilson 1927, doi:10.1080/01621459.1927.10502953.
    """
    _check_level(level)
    right, asked = _count(k, "k"), _count(n, "n")
    if asked == 0:
        raise UsageError("wilson: no interval for 0 questions", hint="count at least one question")
    if right > asked:
        raise UsageError(f"wilson: {right} right answers out of {asked} questions")
    interval = binomtest(right, asked).proportion_ci(confidence_level=level, method="wilson")
    return float(interval.low), float(interval.high)


def mcnemar_exact(b: int, c: int) -> float:
    """Two-sided exact McNemar p-value; b and c count the questions only one arm got right.

    Returns: P(a split at least as uneven as b : c in b + c tosses of a fair coin); 1.0 when
        b + c = 0.
    Raises: UsageError if a count is negative or not whole.
    Source: McNemar 1947, doi:10.1007/BF02295996, with the binomial in place of chi-square.
    """
    only_a, only_b = _count(b, "b"), _count(c, "c")
    if only_a + only_b == 0:
        return 1.0
    return float(binomtest(only_a, only_a + only_b).pvalue)


def paired_counts(a: ArrayLike, b: ArrayLike) -> PairedCounts:
    """Count who was right on each question.

    Shapes: a, b (n,), 0/1 or bool, the same questions in the same order.
    Raises: UsageError if empty, of unequal lengths, NaN, or a value is neither 0 nor 1.
    """
    x, y = _pair(a, b)
    if not np.isin(np.concatenate((x, y)), (0.0, 1.0)).all():
        raise UsageError("paired_counts: every entry must be 0 or 1 (one seed at a time)")
    right_a, right_b = x == 1, y == 1
    cells = (right_a & right_b, right_a & ~right_b, ~right_a & right_b, ~(right_a | right_b))
    return PairedCounts(*(int(cell.sum()) for cell in cells))


def paired_bootstrap(
    a: ArrayLike,
    b: ArrayLike,
    clusters: Sequence[Hashable] | NDArray[Any] | None = None,
    *,
    draws: int = 10_000,
    level: float = 0.95,
    seed: int = 0,
) -> PairedDifference:
    """Percentile bootstrap of mean(a) - mean(b) that resamples whole clusters of questions.

    With few differing clusters (fewer than about ten) a percentile interval is too short: read
    `mcnemar_exact` beside it.

    Shapes: a, b (n,), correctness in [0, 1] on the same questions in the same order, a mean over
        seeds allowed; clusters (n,), questions with one id are drawn together (None: each alone).
    Returns: the difference and its two-sided `level` interval, fractions; equal inputs and `seed`
        give equal intervals.
    Raises: UsageError if empty, of unequal lengths, NaN, in fewer than two clusters, or if draws or
        level make no sense.
    Source: Efron & Tibshirani 1993, ch. 13; why clusters: arXiv:2411.00640.
    """
    _check_level(level)
    sums, sizes = _cluster_sums(a, b, clusters)
    means = _resampled_means(sums, sizes, draws, seed)
    low, high = _percentiles(means, level)
    n = int(sizes.sum())
    return PairedDifference(float(sums.sum() / n), low, high, draws, n, len(sums))


def holm(pvalues: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p-values, in the order given (family-wise error control).

    Raises: UsageError if there is no p-value, or one is NaN or outside [0, 1].
    Source: Holm 1979, Scand. J. Statist. 6:65-70.
    """
    p = np.asarray(pvalues, dtype=np.float64)
    if p.ndim != 1 or p.size == 0:
        raise UsageError("holm: need a flat list of at least one p-value")
    if not ((p >= 0) & (p <= 1)).all():  # NaN fails both
        raise UsageError(f"holm: p-values must lie in [0, 1], got {p.tolist()}")
    order = np.argsort(p, kind="stable")
    stepped = np.maximum.accumulate(p[order] * np.arange(p.size, 0, -1))
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(stepped, 1.0)
    return [float(value) for value in adjusted]


def tost_paired(
    a: ArrayLike,
    b: ArrayLike,
    margin: float = 0.02,
    *,
    clusters: Sequence[Hashable] | NDArray[Any] | None = None,
    level: float = 0.95,
    draws: int = 10_000,
    seed: int = 0,
) -> Equivalence:
    """Is arm a as good as arm b, within +-margin? Two one-sided tests on one bootstrap.

    With alpha = 1 - level, the first rule that holds is the verdict:

    1. "equivalent": the (1 - 2 alpha) interval (90 % at level 0.95) lies strictly inside
       (-margin, margin), and there are at least log(alpha) / log(1 - margin) clusters (149 at
       0.02): with fewer, even a full margin of questions that differ could go unseen more often
       than alpha, and two arms that agree on ten questions would count as proven equal.
    2. "better" / "worse": the two-sided `level` interval lies above / below 0, and at least
       1 + log2(1 / alpha) clusters differ (6 at 0.95): with fewer, no exact sign test at that
       level can reject.
    3. "undecided".

    So a difference that is real but surely smaller than the margin is "equivalent".

    Shapes: a, b, clusters as in `paired_bootstrap`; margin is a fraction in (0, 1), 0.02 = 2 pp.
    Returns: the verdict on a, the difference, its (1 - 2 alpha) interval, and n_needed: questions
        for 80 % power to show equivalence if the true difference is 0, at the paired variance per
        question (clusters included) and the cluster size seen here.
    Raises: UsageError as `paired_bootstrap`, for a margin outside (0, 1) or a level not above 0.5.
    Source: Schuirmann 1987, doi:10.1007/BF01068419 (equivalent = the 1 - 2 alpha interval inside).
    """
    _check_level(level)
    if level <= 0.5:
        raise UsageError(f"tost_paired: level must be above 0.5, got {level}")
    if not 0 < margin < 1:
        raise UsageError(f"margin must lie in (0, 1), got {margin}", hint="0.02 is 2 points")
    sums, sizes = _cluster_sums(a, b, clusters)
    means = _resampled_means(sums, sizes, draws, seed)
    alpha = 1 - level
    low, high = _percentiles(means, 1 - 2 * alpha)
    wide_low, wide_high = _percentiles(means, level)
    enough_clusters = len(sums) >= _fewest_clusters(margin, alpha)
    enough_differ = np.count_nonzero(sums) >= 1 + math.log2(1 / alpha)

    verdict: Verdict = "undecided"
    if -margin < low and high < margin and enough_clusters:
        verdict = "equivalent"
    elif wide_low > 0 and enough_differ:
        verdict = "better"
    elif wide_high < 0 and enough_differ:
        verdict = "worse"
    difference = float(sums.sum() / sizes.sum())
    return Equivalence(verdict, difference, low, high, _n_needed(sums, sizes, margin, alpha))


def _n_needed(sums: Array, sizes: Array, margin: float, alpha: float) -> int:
    """Smallest n with 2 Phi(margin / se(n) - z_(1 - alpha)) - 1 >= `_POWER`: normal power at 0."""
    n, groups = float(sizes.sum()), len(sums)
    residual = sums - sizes * (sums.sum() / n)  # of the ratio estimator, one a cluster
    variance = groups / (groups - 1) * float((residual**2).sum()) / n  # n * se^2
    z = float(norm.ppf(1 - alpha) + norm.ppf((1 + _POWER) / 2))
    by_power = variance * (z / margin) ** 2
    by_clusters = _fewest_clusters(margin, alpha) * n / groups
    return math.ceil(max(by_power, by_clusters) - 1e-9)  # 1e-9: rounding adds no question


def _fewest_clusters(margin: float, alpha: float) -> int:
    """Smallest g with (1 - margin)^g <= alpha: a margin-sized share shows up at least once."""
    return math.ceil(math.log(alpha) / math.log1p(-margin))


def _cluster_sums(a: ArrayLike, b: ArrayLike, clusters: Any) -> tuple[Array, Array]:
    """Per cluster, in order of first appearance: sum of a - b and number of questions, (G,)."""
    x, y = _pair(a, b)
    sums, sizes = x - y, np.ones_like(x)
    if clusters is not None:
        ids = list(clusters)
        if len(ids) != len(x):
            raise UsageError(f"{len(ids)} cluster ids for {len(x)} questions")
        if any(key is None or key != key for key in ids):  # NaN is not equal to itself
            raise UsageError("a question without a cluster id (None or NaN)")
        codes: dict[Hashable, int] = {}
        code = np.array([codes.setdefault(key, len(codes)) for key in ids])
        sums = np.bincount(code, weights=sums).astype(np.float64)
        sizes = np.bincount(code).astype(np.float64)
    if len(sums) < 2:
        hint = "give at least two questions that do not share a cluster"
        raise UsageError("one cluster says nothing about the spread between clusters", hint=hint)
    return sums, sizes


def _resampled_means(sums: Array, sizes: Array, draws: int, seed: int) -> Array:
    """(draws,) ratio of resampled sums to resampled sizes.

    Clusters with equal (sum, size) are interchangeable, so the number drawn of each *kind* is
    multinomial: the same distribution as drawing G clusters with replacement, and a few kinds
    instead of thousands of clusters. Kinds keep the order of first appearance: swapping the arms
    then draws the same clusters, and mirrors the interval.
    """
    if draws < 1:
        raise UsageError(f"bootstrap draws must be at least 1, got {draws}")
    pairs = np.column_stack((sums, sizes))
    _, first, counts = np.unique(pairs, axis=0, return_index=True, return_counts=True)
    order = np.argsort(first)
    kinds, shares = pairs[first[order]], counts[order] / len(sums)
    rng = np.random.default_rng(seed)
    rows = max(1, _CHUNK_BYTES // (8 * len(kinds)))
    means = np.empty(draws)
    for start in range(0, draws, rows):
        stop = min(start + rows, draws)
        totals = rng.multinomial(len(sums), shares, size=stop - start) @ kinds
        means[start:stop] = totals[:, 0] / totals[:, 1]
    return means


def _percentiles(means: Array, level: float) -> tuple[float, float]:
    low, high = np.quantile(means, ((1 - level) / 2, (1 + level) / 2))
    return float(low), float(high)


def _pair(a: ArrayLike, b: ArrayLike) -> tuple[Array, Array]:
    """Both as (n,) float64, finite, n >= 1."""
    x, y = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if x.ndim != 1 or y.ndim != 1:
        raise UsageError(f"need one value a question, got shapes {x.shape} and {y.shape}")
    if len(x) != len(y):
        hint = "compare arms on the questions that both answered"
        raise UsageError(f"paired arms have {len(x)} and {len(y)} questions", hint=hint)
    if len(x) == 0:
        raise UsageError("no questions to compare")
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise UsageError("NaN or infinite correctness", hint="score a crashed question as 0")
    return x, y


def _count(value: float, name: str) -> int:
    if not (math.isfinite(value) and value == int(value) and value >= 0):
        raise UsageError(f"{name} must be a whole number of questions, got {value}")
    return int(value)


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise UsageError(f"level must lie in (0, 1), got {level}", hint="0.95 is 95 %")
