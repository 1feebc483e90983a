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
from qatbench.stats_resample import (
    Array,
    aligned,
    clustered,
    interval,
    ratio_interval,
    resampled,
    tail_at,
)

Verdict = Literal["equivalent", "better", "worse", "undecided"]

_POWER = 0.8


class PairedCounts(NamedTuple):
    """Questions by who was right; the four add up to n."""

    both: int
    only_a: int
    only_b: int
    neither: int


class PairedDifference(NamedTuple):
    """mean(a) - mean(b) with its bootstrap interval (fractions)."""

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
    p: float  # of equivalence: the larger of the two one-sided p-values at the margin


class RecoveredShare(NamedTuple):
    """Outcome of `recovery`; the share and its interval are None where there is no telling."""

    share: float | None
    low: float | None
    high: float | None
    loss: float  # full - ptq, a fraction, and its interval
    loss_low: float
    loss_high: float


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
    table = aligned(a, b)
    if not np.isin(table, (0.0, 1.0)).all():
        raise UsageError("paired_counts: every entry must be 0 or 1 (one seed at a time)")
    right_a, right_b = table.T == 1
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

    The percentiles are widened as Student's t is (`stats_resample.interval`). With fewer than
    about ten differing clusters no such interval keeps its level: read `mcnemar_exact` beside it.

    Shapes: a, b (n,), correctness in [0, 1] on the same questions in the same order, a mean over
        seeds allowed; clusters (n,), questions with one id are drawn together (None: each alone).
    Returns: the difference and its two-sided `level` interval, fractions; equal inputs and `seed`
        give equal intervals.
    Raises: UsageError if empty, of unequal lengths, NaN, in fewer than two clusters, or if draws or
        level make no sense.
    Source: Efron & Tibshirani 1993, ch. 13; why clusters: arXiv:2411.00640.
    """
    _check_level(level)
    sums, sizes = _differences(a, b, clusters)
    mean = float(sums.sum() / sizes.sum())
    low, high = interval(_means(sums, sizes, draws, seed), sums - mean * sizes, level)
    return PairedDifference(mean, low, high, draws, int(sizes.sum()), len(sums))


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
    """Is arm a as good as arm b, within +-margin? Two one-sided bootstrap tests.

    With alpha = 1 - level, the first rule that holds is the verdict:

    1. "equivalent": the (1 - 2 alpha) interval (90 % at level 0.95) lies strictly inside
       (-margin, margin), and p is below alpha. p (`stats_resample.tail_at`, the larger of both
       sides) is at least (1 - margin)^clusters: with fewer than 149 at 0.02, even a full margin of
       questions that differ could go unseen more often than alpha, and two arms that agree on ten
       questions would count as proven equal.
    2. "better" / "worse": the two-sided `level` interval lies above / below 0, and at least
       1 + log2(1 / alpha) clusters differ (6 at 0.95): with fewer, no exact sign test at that
       level can reject.
    3. "undecided".

    So a difference that is real but surely smaller than the margin is "equivalent".

    Shapes: a, b, clusters as in `paired_bootstrap`; margin is a fraction in (0, 1), 0.02 = 2 pp.
    Returns: the verdict on a, the difference, its (1 - 2 alpha) interval, n_needed (questions for
        80 % power to show equivalence if the true difference is 0, at the paired variance per
        question, clusters included, and the cluster size seen here) and p.
    Raises: UsageError as `paired_bootstrap`, for a margin outside (0, 1) or a level not above 0.5.
    Source: Schuirmann 1987, doi:10.1007/BF01068419 (equivalent = the 1 - 2 alpha interval inside).
    """
    _check_level(level)
    if level <= 0.5:
        raise UsageError(f"tost_paired: level must be above 0.5, got {level}")
    if not 0 < margin < 1:
        raise UsageError(f"margin must lie in (0, 1), got {margin}", hint="0.02 is 2 points")
    sums, sizes = _differences(a, b, clusters)
    means, alpha = _means(sums, sizes, draws, seed), 1 - level
    difference = float(sums.sum() / sizes.sum())
    influence = sums - difference * sizes
    low, high = interval(means, influence, 1 - 2 * alpha)
    wide_low, wide_high = interval(means, influence, level)
    p = max(tail_at(side, sizes, margin, draws, seed) for side in (sums, -sums))
    enough_differ = np.count_nonzero(sums) >= 1 + math.log2(1 / alpha)

    verdict: Verdict = "undecided"
    if -margin < low and high < margin and p < alpha:
        verdict = "equivalent"
    elif wide_low > 0 and enough_differ:
        verdict = "better"
    elif wide_high < 0 and enough_differ:
        verdict = "worse"
    return Equivalence(verdict, difference, low, high, _n_needed(sums, sizes, margin, alpha), p)


def recovery(
    qat: ArrayLike,
    ptq: ArrayLike,
    full: ArrayLike,
    clusters: Sequence[Hashable] | NDArray[Any] | None = None,
    *,
    draws: int = 10_000,
    level: float = 0.95,
    seed: int = 0,
) -> RecoveredShare:
    """(qat - ptq) / (full - ptq) of the means: the share of what PTQ lost that came back.

    Above 1 where QAT is better than full, below 0 where it is worse than PTQ. Its interval is
    Fieller's (`stats_resample.ratio_interval`) from the bootstrap's covariance. Withheld unless
    the interval of full - ptq lies above 0 and Fieller's is bounded: a share of nothing is no
    figure.

    Shapes: three times (n,), as in `paired_bootstrap`, and its `clusters`; all arms are resampled
        together.
    Raises: UsageError as `paired_bootstrap`, and for fewer than two draws.
    Source: Fieller 1954, J. R. Statist. Soc. B 16:175-185.
    """
    _check_level(level)
    table = aligned(qat, ptq, full)
    gains = table[:, [0, 2]] - table[:, [1]]  # over ptq
    sums, sizes = clustered(gains, clusters)
    drawn = resampled(np.column_stack((sums, sizes)), draws, seed)
    gained, lost = (float(total) for total in sums.sum(axis=0) / sizes.sum())
    gains_drawn, losses_drawn = (drawn[:, :2] / drawn[:, 2:]).T
    low, high = interval(losses_drawn, sums[:, 1] - lost * sizes, level)
    bounds = ratio_interval(gains_drawn, losses_drawn, (gained, lost), level)
    if low <= 0 or bounds is None:
        return RecoveredShare(None, None, None, lost, low, high)
    return RecoveredShare(gained / lost, *bounds, lost, low, high)


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


def _differences(a: ArrayLike, b: ArrayLike, clusters: Any) -> tuple[Array, Array]:
    """Per cluster: sum of a - b and number of questions, (G,)."""
    table = aligned(a, b)
    sums, sizes = clustered(table[:, :1] - table[:, 1:], clusters)
    return sums[:, 0], sizes


def _means(sums: Array, sizes: Array, draws: int, seed: int) -> Array:
    """(draws,) ratio of resampled sums to resampled sizes."""
    drawn = resampled(np.column_stack((sums, sizes)), draws, seed)
    return drawn[:, 0] / drawn[:, 1]


def _count(value: float, name: str) -> int:
    if not (math.isfinite(value) and value == int(value) and value >= 0):
        raise UsageError(f"{name} must be a whole number of questions, got {value}")
    return int(value)


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise UsageError(f"level must lie in (0, 1), got {level}", hint="0.95 is 95 %")
