"""Intervals of a ratio, and of a difference that few questions carry."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest, norm, t

from qatbench.errors import UsageError
from qatbench.stats import paired_bootstrap, recovery
from qatbench.stats_resample import ratio_interval, widened

Z = float(norm.ppf(0.975))


def draws_of(covariance: np.ndarray, n: int = 500) -> tuple[np.ndarray, np.ndarray]:
    """Draws whose sample covariance is exactly this one; their mean does not matter."""
    raw = np.random.default_rng(0).standard_normal((2, n))
    raw -= raw.mean(axis=1, keepdims=True)
    white = np.linalg.solve(np.linalg.cholesky(np.cov(raw)), raw)
    one, other = np.linalg.cholesky(covariance) @ white
    return one, other


def covariance(v_n: float, v_d: float, correlation: float) -> np.ndarray:
    shared = correlation * math.sqrt(v_n * v_d)
    return np.array([[v_n, shared], [shared, v_d]])


def closed_form(n: float, d: float, v: np.ndarray, z: float) -> tuple[float, float]:
    """As textbooks write it: around the ratio, with g."""
    r, g = n / d, z**2 * v[1, 1] / d**2
    centre = r - g * v[0, 1] / v[1, 1]
    inner = v[0, 0] - 2 * r * v[0, 1] + r**2 * v[1, 1] - g * (v[0, 0] - v[0, 1] ** 2 / v[1, 1])
    half = z / abs(d) * math.sqrt(inner)
    return (centre - half) / (1 - g), (centre + half) / (1 - g)


@settings(max_examples=60, deadline=None)
@given(
    ratio=st.floats(-3, 3),
    d=st.floats(0.5, 4).flatmap(lambda d: st.sampled_from([d, -d])),
    g=st.floats(0.001, 0.95),
    spread=st.floats(0.1, 3),
    correlation=st.floats(-0.95, 0.95),
    level=st.sampled_from([0.8, 0.95]),
)
def test_a_ratio_has_the_closed_form_of_fieller(
    ratio: float, d: float, g: float, spread: float, correlation: float, level: float
) -> None:
    z = float(norm.ppf((1 + level) / 2))
    v = covariance(spread**2, g * (d / z) ** 2, correlation)
    got = ratio_interval(*draws_of(v), (ratio * d, d), level)
    assert got == pytest.approx(closed_form(ratio * d, d, v, z), rel=1e-6, abs=1e-6)
    assert got is not None
    assert got[0] <= ratio <= got[1]


@pytest.mark.parametrize("d", [3.0, -0.2])
@pytest.mark.parametrize("correlation", [-0.9, 0.0, 0.9])
def test_a_ratio_is_bounded_exactly_where_the_denominator_is_shown_not_to_be_0(
    d: float, correlation: float
) -> None:
    def of(g: float) -> tuple[float, float] | None:
        v = covariance(1.0, g * (d / Z) ** 2, correlation)
        return ratio_interval(*draws_of(v), (1.0, d), 0.95)

    below, above = of(1 - 1e-6), of(1 + 1e-6)
    assert below is not None
    assert max(map(abs, below)) > 1e3  # ever wider on the way there
    assert above is None


def test_with_a_small_variance_it_is_the_delta_method() -> None:
    n, d, v = 0.3, 0.5, covariance(1e-6, 2e-6, 0.4)
    r = n / d
    error = math.sqrt(v[0, 0] - 2 * r * v[0, 1] + r**2 * v[1, 1]) / d
    low, high = ratio_interval(*draws_of(v), (n, d), 0.95) or (math.nan, math.nan)
    # g is 3e-5: ends and delta's differ by about that share of the width
    assert (low - r, high - r) == pytest.approx((-Z * error, Z * error), rel=0.01)


def test_a_ratio_without_spread_is_a_point_and_one_draw_has_no_spread() -> None:
    one = np.ones(10)
    assert ratio_interval(one, one, (2.0, 4.0), 0.95) == (0.5, 0.5)
    with pytest.raises(UsageError, match="at least 2 draws"):
        ratio_interval(one[:1], one[:1], (2.0, 4.0), 0.95)


# of a question: what QAT and what 16 bits add to PTQ
KINDS = np.array([(1, 1), (0, 1), (-1, -1), (1, 0), (-1, 0), (0, -1), (0, 0)])


@pytest.mark.parametrize(
    ("questions", "shares"),
    [
        (2000, (0.04, 0.02, 0.01, 0.005, 0.005, 0.005)),  # truth 30 / 45, g about 0.12
        (300, (0.05, 0.02, 0.02, 0.005, 0.005, 0.005)),  # 30 / 45, g about 0.6: some are withheld
    ],
)
def test_recovery_covers_a_known_share(questions: int, shares: tuple[float, ...]) -> None:
    rng = np.random.default_rng(0)
    chances = np.array([*shares, 1 - sum(shares)])
    gained, lost = chances @ KINDS
    sets, told, held = 500, 0, 0
    for at in range(sets):
        drawn = np.repeat(KINDS, rng.multinomial(questions, chances), axis=0)
        ptq = drawn.min(axis=1) < 0
        found = recovery(drawn[:, 0] + ptq, ptq, drawn[:, 1] + ptq, draws=400, seed=at)
        if found.share is None or found.low is None or found.high is None:
            assert (found.low, found.high) == (None, None)
            continue
        told += 1
        assert found.low <= found.share <= found.high
        held += found.low <= gained / lost <= found.high
    assert told > 0.6 * sets
    # sd of a coverage of 0.95 over 300 to 500 sets is 0.010 to 0.013; where shares of small
    # losses are withheld, those told lie a little high
    assert 0.92 <= held / told <= 0.98


@pytest.mark.parametrize(("n", "differing"), [(300, 1), (300, 2), (2000, 1), (2000, 2)])
def test_one_or_two_differing_questions_reach_about_the_exact_limit(n: int, differing: int) -> None:
    base = np.array([0.0] * differing + [1.0] * (n - differing))
    exact = binomtest(differing, n).proportion_ci(0.95).high
    for seed in range(5):
        got = paired_bootstrap(np.ones(n), base, seed=seed)
        assert got.low == 0.0
        # to the nearest question either way (the resampled count is whole): 2.6 points of 300 were
        # 2.3 questions above
        assert abs(got.high - exact) < 1.0 / n


def test_a_spread_is_taken_for_known_from_three_degrees_of_freedom_on() -> None:
    one = np.array([1.0] + [0.0] * 299) - 1 / 300
    assert widened(one, 0.95) == pytest.approx(2 * norm.cdf(t.ppf(0.975, 3)) - 1)
    four = np.array([1.0] * 4 + [0.0] * 296) - 4 / 300
    share = 4 / 300
    kurtosis = (1 - 3 * share * (1 - share)) / (share * (1 - share))
    freedom = 600 / (kurtosis - 1)
    assert freedom > 8
    assert widened(four, 0.95) == pytest.approx(2 * norm.cdf(t.ppf(0.975, freedom)) - 1)
