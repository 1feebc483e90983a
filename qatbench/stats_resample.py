"""Resampling whole clusters of questions: what the intervals and tests of `stats` are made of."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import brentq
from scipy.stats import norm, t

from qatbench.errors import UsageError

Array = NDArray[np.float64]

_CHUNK_BYTES = 32 << 20  # counts of one chunk; their float copy in the product doubles it
_ROUNDING = 1e-9  # sums of thousands of thirds differ by less than this
_LEAST_FREEDOM = 3.0


def clustered(values: Array, clusters: Any) -> tuple[Array, Array]:
    """Per cluster, in order of first appearance: sums of the values and number of questions.

    Shapes: values (n, k), clusters (n,) or None (each question alone); returns (G, k), (G,).
    Raises: UsageError for ids that are missing, or fewer than two clusters.
    """
    sums, sizes = values, np.ones(len(values))
    if clusters is not None:
        ids = list(clusters)
        if len(ids) != len(values):
            raise UsageError(f"{len(ids)} cluster ids for {len(values)} questions")
        if any(key is None or key != key for key in ids):  # NaN is not equal to itself
            raise UsageError("a question without a cluster id (None or NaN)")
        codes: dict[Hashable, int] = {}
        code = np.array([codes.setdefault(key, len(codes)) for key in ids])
        sums = np.column_stack([np.bincount(code, weights=column) for column in values.T])
        sizes = np.bincount(code).astype(np.float64)
    if len(sums) < 2:
        hint = "give at least two questions that do not share a cluster"
        raise UsageError("one cluster says nothing about the spread between clusters", hint=hint)
    return sums, sizes


def resampled(table: Array, draws: int, seed: int) -> Array:
    """Column sums of `draws` bootstrap samples of the rows.

    Equal rows are interchangeable, so the number drawn of each *kind* is multinomial: the same
    distribution as drawing G rows with replacement, and a few kinds instead of thousands of rows.
    Kinds keep the order of first appearance: swapping the arms then draws the same clusters, and
    mirrors the interval.

    Shapes: table (G, k), a row a cluster; returns (draws, k).
    Raises: UsageError if there are no draws.
    """
    kinds, counts = _kinds(table)
    return _drawn(kinds, counts / len(table), len(table), draws, seed)


def interval(figures: Array, influence: Array, level: float) -> tuple[float, float]:
    """Percentile interval of a resampled figure, as wide as Student's t (`widened`).

    Shapes: figures (draws,); influence (G,), each cluster's part in the figure's error.
    """
    wide = widened(influence, level)
    low, high = np.quantile(figures, ((1 - wide) / 2, (1 + wide) / 2))
    return float(low), float(high)


def widened(influence: Array, level: float) -> float:
    """The level that a percentile interval has to be taken at to keep `level`.

    A percentile interval takes the spread between clusters for known. Where few clusters differ it
    is not, and the interval falls short of its level; so the percentiles are those that t has on
    the normal scale, with the degrees of freedom at which a sample variance is as uncertain as
    this one: 2 G / (kurtosis - 1), which is about twice the number of clusters that differ. They
    are at least 3: with the 2 of a single differing question among 300, the interval would reach
    to 2.6 points, where the exact (Clopper-Pearson) limit of 1 in 300 is 1.84 and mid-p's 1.63.

    Shapes: influence (G,), each cluster's part in the figure's error.
    Source: Hesterberg 2015, doi:10.1080/00031305.2015.1089789, sec. 5.3 (expanded percentiles);
        the degrees of freedom after Satterthwaite 1946, doi:10.2307/3002019.
    """
    square = float((influence**2).mean())
    beyond = float((influence**4).mean()) / square**2 - 1 if square > 0 else 0.0
    freedom = 2 * len(influence) / beyond if beyond > _ROUNDING else np.inf
    freedom = max(freedom, _LEAST_FREEDOM)
    return float(2 * norm.cdf(t.ppf((1 + level) / 2, freedom)) - 1)


def ratio_interval(
    numerator: Array, denominator: Array, estimates: tuple[float, float], level: float
) -> tuple[float, float] | None:
    """Fieller's interval of a ratio of two estimates, with the covariance of their draws.

    It holds every r that numerator - r * denominator = 0 would not be rejected for by the normal
    test of that level: (n - r d)^2 <= z^2 (v_nn - 2 r v_nd + r^2 v_dd), a quadratic in r. Nothing
    is divided by a draw, so a few draws with a denominator of almost nothing do no harm.

    Shapes: numerator, denominator (draws,), of the same resamples; `estimates` (n, d), what the
        data themselves say; `level` is the two-sided coverage.
    Returns: (low, high), n / d within; None where g = z^2 v_dd / d^2 is 1 or more: the denominator
        is not shown to differ from 0 at that level, and the values of r have no bound.
    Raises: UsageError for fewer than two draws.
    Source: Fieller 1954, J. R. Statist. Soc. B 16:175-185.
    """
    if len(numerator) < 2:
        raise UsageError(f"the spread of a ratio takes at least 2 draws, got {len(numerator)}")
    n, d = estimates
    squares = norm.ppf((1 + level) / 2) ** 2 * np.cov(numerator, denominator)
    leading = d**2 - squares[1, 1]
    if leading <= 0:
        return None
    middle = n * d - squares[0, 1]
    root = np.sqrt(max(middle**2 - leading * (n**2 - squares[0, 0]), 0.0))  # rounding goes below 0
    return float((middle - root) / leading), float((middle + root) / leading)


def tail_at(sums: Array, sizes: Array, mean: float, draws: int, seed: int) -> float:
    """P(a mean at most as high as the one seen, if the true one were `mean`), by bootstrap.

    The clusters are drawn with the weights, exponential in each cluster's sum, under which the
    mean is `mean`: so spread and skewness are those of the null, not of the sample. Where
    differences are rare and all one way, a bootstrap around the mean seen rejects a true null at
    1.5 to 2.5 times its level; this one is then the binomial test. It is never below
    (1 - mean)^G: that no cluster of G differs although the share `mean` does.

    Shapes: sums, sizes (G,); `mean` is a fraction in (0, 1).
    Returns: (1 + draws as low) / (1 + draws), or that bound.
    Source: Efron 1981, doi:10.2307/3314608; Davison & Hinkley 1997, sec. 4.4.
    """
    unseen = (1 - mean) ** len(sums)
    kinds, counts = _kinds(np.column_stack((sums, sizes)))
    excess = kinds[:, 0] - mean * kinds[:, 1]  # its weighted mean is 0 under the null
    if excess.max() <= 0:  # no weights lead there
        return float(unseen)
    if excess.min() >= 0:
        return 1.0
    weights = counts * _weights(excess, counts)
    drawn = _drawn(excess[:, None], weights / weights.sum(), len(sums), draws, seed)[:, 0]
    as_low = np.count_nonzero(drawn <= counts @ excess + _ROUNDING)
    return max(float(unseen), (1 + as_low) / (1 + draws))


def _weights(excess: Array, counts: Array) -> Array:
    """exp(tilt * excess), up to a factor, of the tilt under which the mean excess is 0."""

    def tilted(tilt: float) -> Array:
        exponents = tilt * excess
        weights: Array = np.exp(exponents - exponents.max())
        return weights

    def slope(tilt: float) -> float:
        return float((counts * excess) @ tilted(tilt))

    low, high = -1.0, 1.0
    while slope(low) > 0:
        low *= 2
    while slope(high) < 0:
        high *= 2
    return tilted(brentq(slope, low, high))


def _kinds(table: Array) -> tuple[Array, Array]:
    """Distinct rows in order of first appearance, and how many of each there are."""
    _, first, counts = np.unique(table, axis=0, return_index=True, return_counts=True)
    order = np.argsort(first)
    return table[first[order]], counts[order].astype(np.float64)


def _drawn(kinds: Array, shares: Array, size: int, draws: int, seed: int) -> Array:
    """Column sums of samples of `size` rows of these kinds, (draws, k)."""
    if draws < 1:
        raise UsageError(f"bootstrap draws must be at least 1, got {draws}")
    rng = np.random.default_rng(seed)
    rows = max(1, _CHUNK_BYTES // (8 * len(kinds)))
    totals = np.empty((draws, kinds.shape[1]))
    for start in range(0, draws, rows):
        stop = min(start + rows, draws)
        totals[start:stop] = rng.multinomial(size, shares, size=stop - start) @ kinds
    return totals


def aligned(*arms: ArrayLike) -> Array:
    """Arms as columns, (n, arms) float64, finite, n >= 1.

    Raises: UsageError for no questions, unequal lengths, NaN, or more than one value a question.
    """
    columns = [np.asarray(arm, dtype=np.float64) for arm in arms]
    if any(column.ndim != 1 for column in columns):
        shapes = " and ".join(str(column.shape) for column in columns)
        raise UsageError(f"need one value a question, got shapes {shapes}")
    if len({len(column) for column in columns}) > 1:
        hint = "compare arms on the questions that both answered"
        lengths = " and ".join(str(len(column)) for column in columns)
        raise UsageError(f"paired arms have {lengths} questions", hint=hint)
    table = np.column_stack(columns)
    if len(table) == 0:
        raise UsageError("no questions to compare")
    if not np.isfinite(table).all():
        raise UsageError("NaN or infinite correctness", hint="score a crashed question as 0")
    return table
