"""Statistics against scipy, closed forms, hand-worked cases, and their own coverage."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom, bootstrap, norm

from qatbench.errors import UsageError
from qatbench.stats import (
    holm,
    mcnemar_exact,
    paired_bootstrap,
    paired_counts,
    tost_paired,
    wilson,
)


def arms(n: int, *, seed: int = 0, p_a: float = 0.7, p_b: float = 0.6) -> tuple[np.ndarray, ...]:
    """Two 0/1 arms that answer alike on most questions."""
    draw = np.random.default_rng(seed).random(n)
    return (draw < p_a).astype(float), (draw < p_b).astype(float)


@pytest.mark.parametrize(("k", "n"), [(0, 5), (5, 5), (1, 3), (3012, 4241)])
@pytest.mark.parametrize("level", [0.8, 0.95])
def test_wilson_is_the_closed_form(k: int, n: int, level: float) -> None:
    z, p = norm.ppf((1 + level) / 2), k / n
    centre, half = p + z * z / 2 / n, z * math.sqrt(p * (1 - p) / n + z * z / 4 / n / n)
    expected = ((centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n))
    assert wilson(k, n, level) == pytest.approx(expected, abs=1e-12)  # rounding only


@pytest.mark.parametrize(
    ("k", "n", "level"),
    [(0, 0, 0.95), (3, 2, 0.95), (-1, 2, 0.95), (0.5, 2, 0.95), (math.nan, 2, 0.95), (1, 2, 1.0)],
)
def test_wilson_refuses_what_has_no_interval(k: float, n: int, level: float) -> None:
    with pytest.raises(UsageError):
        wilson(k, n, level)  # type: ignore[arg-type]


def test_mcnemar_by_hand() -> None:
    assert mcnemar_exact(0, 0) == 1.0
    assert mcnemar_exact(0, 5) == pytest.approx(2 / 32)  # 2 * (1/2)^5
    assert mcnemar_exact(1, 5) == pytest.approx(2 * (1 + 6) / 64)
    assert mcnemar_exact(30, 50) == mcnemar_exact(50, 30)
    assert mcnemar_exact(30, 50) == pytest.approx(2 * binom.cdf(30, 80, 0.5))
    with pytest.raises(UsageError):
        mcnemar_exact(-1, 5)


def test_paired_counts_by_hand() -> None:
    counts = paired_counts([1, 1, 1, 0, 0, 0, 0], [1, 1, 0, 1, 0, 0, 0])
    assert counts == (2, 1, 1, 3)
    assert counts.only_a == 1
    assert paired_counts([True, False, True], [False, False, True]) == (1, 1, 0, 1)
    with pytest.raises(UsageError, match="0 or 1"):
        paired_counts([0.5, 1], [1, 1])


@pytest.mark.parametrize("function", [paired_counts, paired_bootstrap, tost_paired])
@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        ([1, 0, 1], [1, 0], "3 and 2 questions"),
        ([], [], "no questions"),
        ([1, math.nan], [1, 0], "NaN"),
        ([[1, 0]], [[1, 0]], "one value a question"),
    ],
)
def test_paired_functions_refuse_bad_input(function, a, b, message) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UsageError, match=message):
        function(a, b)


@pytest.mark.parametrize(
    "options",
    [
        {"clusters": ["x", "x", "x"]},  # one cluster has no spread
        {"clusters": ["x", "y"]},
        {"clusters": ["x", "y", None]},
        {"clusters": [0.0, 1.0, math.nan]},
        {"draws": 0},
        {"level": 1.0},
    ],
)
def test_bootstrap_refuses_bad_options(options) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UsageError):
        paired_bootstrap([1, 0, 1], [0, 0, 1], **options)


def test_bootstrap_of_equal_arms_is_exactly_zero() -> None:
    a, _ = arms(50)
    got = paired_bootstrap(a, a, clusters=np.arange(50) // 3)
    assert got == (0.0, 0.0, 0.0, 10_000, 50, 17)


@settings(max_examples=30, deadline=None)
@given(
    rows=st.lists(
        st.tuples(
            st.sampled_from([0, 1 / 3, 2 / 3, 1]), st.sampled_from([0, 1]), st.integers(0, 9)
        ),
        min_size=2,
        max_size=60,
    ).filter(lambda rows: len({row[2] for row in rows}) > 1)
)
def test_swapping_the_arms_mirrors_the_interval(rows: list[tuple[float, float, int]]) -> None:
    a, b, ids = zip(*rows, strict=True)
    one = paired_bootstrap(a, b, clusters=ids, draws=300)
    two = paired_bootstrap(b, a, clusters=ids, draws=300)
    # 1e-12: the same draws, summed with the other sign
    assert (two.difference, -two.high, -two.low) == pytest.approx(
        (-one.difference, one.low, one.high), abs=1e-12
    )


def test_duplicating_rows_within_clusters_changes_nothing_but_n() -> None:
    a, b = arms(120)
    ids = np.random.default_rng(1).integers(0, 40, 120)
    once = paired_bootstrap(a, b, clusters=ids, draws=2000)
    twice = paired_bootstrap(np.tile(a, 2), np.tile(b, 2), clusters=np.tile(ids, 2), draws=2000)
    assert twice[:4] == once[:4]
    assert (once.n, twice.n, twice.n_clusters) == (120, 240, once.n_clusters)
    unclustered = paired_bootstrap(np.tile(a, 2), np.tile(b, 2), draws=2000)
    # without ids the copies pass for new evidence: shorter by about sqrt(2)
    assert (unclustered.high - unclustered.low) < 0.85 * (once.high - once.low)


def test_uneven_clusters_weigh_by_their_questions() -> None:
    # one arm right everywhere, the other nowhere: 1 in every sample, whatever sizes are drawn
    got = paired_bootstrap(np.ones(6), np.zeros(6), clusters=[0, 0, 0, 1, 1, 2], draws=200)
    assert got[:3] == (1.0, 1.0, 1.0)


def test_each_question_its_own_cluster_is_the_default() -> None:
    a, b = arms(80)
    assert paired_bootstrap(a, b) == paired_bootstrap(a, b, clusters=[f"q{i}" for i in range(80)])


def test_bootstrap_is_deterministic_and_the_seed_matters() -> None:
    a, b = arms(300)
    assert paired_bootstrap(a, b, seed=3) == paired_bootstrap(a, b, seed=3)
    few = [paired_bootstrap(a, b, draws=101, seed=seed)[1:3] for seed in range(4)]
    assert len(set(few)) > 1


def test_bootstrap_agrees_with_scipy_and_with_the_normal_interval() -> None:
    a, b = arms(400)
    got = paired_bootstrap(a, b, draws=10_000)
    reference = bootstrap(
        (a - b,), np.mean, n_resamples=4000, method="percentile", rng=np.random.default_rng(5)
    ).confidence_interval
    assert got.difference == pytest.approx(a.mean() - b.mean())
    # a 2.5 % percentile of 4000 draws has sd ~ 2.7 se / sqrt(4000) = 0.0006; one count is 0.0025
    assert (got.low, got.high) == pytest.approx((reference.low, reference.high), abs=0.005)
    half = 1.96 * (a - b).std() / 20
    assert (got.low, got.high) == pytest.approx(
        (got.difference - half, got.difference + half), abs=0.005
    )


def test_small_chunks_still_draw_the_right_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qatbench.stats_resample._CHUNK_BYTES", 1000)  # a few draws a chunk
    a, b = arms(400)
    got = paired_bootstrap(a, b, draws=5001)
    half = 1.96 * (a - b).std() / 20
    assert (got.low, got.high) == pytest.approx(
        (got.difference - half, got.difference + half), abs=0.005
    )


def test_bootstrap_covers_when_clusters_are_kept_together() -> None:
    rng = np.random.default_rng(0)
    n_sets, n_clusters, truth = 300, 80, 0.1
    covered = {"clustered": 0, "ignored": 0}
    for _ in range(n_sets):
        sizes = rng.integers(1, 8, n_clusters)
        ids = np.repeat(np.arange(n_clusters), sizes)
        # all questions of a cluster differ alike: +1 with 0.2, -1 with 0.1, else 0
        difference = rng.choice([1, -1, 0], p=[0.2, 0.1, 0.7], size=n_clusters)[ids]
        a, b = (difference > 0).astype(float), (difference < 0).astype(float)
        for name, clusters in (("clustered", ids), ("ignored", None)):
            got = paired_bootstrap(a, b, clusters, draws=400, seed=int(rng.integers(1 << 30)))
            covered[name] += got.low <= truth <= got.high
    # sd of a coverage of 0.95 over 300 sets is 0.013; a percentile interval of 80 clusters and
    # 400 draws is short by a point or two: 0.90 is 2-3 sd under that, 0.985 2.8 sd above 0.95
    assert 0.90 <= covered["clustered"] / n_sets <= 0.985
    assert covered["ignored"] / n_sets < 0.80  # design effect 5: an interval half as long


def test_holm_by_hand() -> None:
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([0.2]) == [0.2]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_keeps_the_order_and_lies_between_raw_and_bonferroni(p: list[float]) -> None:
    adjusted = holm(p)
    ranked = [adjusted[i] for i in np.argsort(p, kind="stable")]
    assert ranked == sorted(ranked)
    assert all(raw <= got <= min(1.0, raw * len(p)) for raw, got in zip(p, adjusted, strict=True))
    assert adjusted[int(np.argmin(p))] == min(1.0, min(p) * len(p))


@pytest.mark.parametrize("bad", [[], [math.nan], [0.1, 1.2], [-0.1]])
def test_holm_refuses_what_is_no_p_value(bad: list[float]) -> None:
    with pytest.raises(UsageError):
        holm(bad)


def planted(n: int, only_a: int, only_b: int) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.ones(n), np.ones(n)
    b[:only_a], a[only_a : only_a + only_b] = 0, 0
    return a, b


@pytest.mark.parametrize(
    ("n", "only_a", "only_b", "verdict"),
    [
        (4000, 40, 40, "equivalent"),  # se 0.0022: +-0.0037 lies inside
        (4000, 40, 10, "equivalent"),  # real (+0.0075) yet surely under the margin: rule 1 first
        (4000, 400, 200, "better"),  # +0.05
        (4000, 200, 400, "worse"),
        (400, 40, 36, "undecided"),  # se 0.022: neither
        (148, 0, 0, "undecided"),  # agreement on so few proves nothing
        (149, 0, 0, "equivalent"),  # 0.98^149 < 0.05
        (100, 5, 0, "undecided"),  # exact p is 0.0625, though the percentile interval excludes 0
        (100, 6, 0, "better"),  # exact p is 0.03125
    ],
)
def test_tost_verdicts(n: int, only_a: int, only_b: int, verdict: str) -> None:
    got = tost_paired(*planted(n, only_a, only_b))
    assert got.verdict == verdict
    assert got.difference == pytest.approx((only_a - only_b) / n)


def test_tost_reports_the_90_percent_interval_of_the_same_draws() -> None:
    a, b = arms(500)
    ids = np.arange(500) // 2
    got = tost_paired(a, b, clusters=ids, seed=4)
    wanted = paired_bootstrap(a, b, ids, level=0.9, seed=4)
    assert (got.low, got.high) == pytest.approx((wanted.low, wanted.high), abs=1e-12)  # 1 - 2*0.05


def test_n_needed_is_the_size_with_80_percent_power() -> None:
    got = tost_paired(*planted(1000, 50, 50), margin=0.02)
    variance = 0.1 * 1000 / 999  # of +-1 on a tenth of the questions, by hand
    assert got.n_needed == math.ceil(variance * ((1.6449 + 1.2816) / 0.02) ** 2)
    assert tost_paired(*planted(1000, 0, 0)).n_needed == 149  # no variance: the rule of unseen
    # simulate at that size, normal theory: sd 0.02 over 400 sets, 0.06 = 3 sd
    rng = np.random.default_rng(0)
    means = rng.multinomial(got.n_needed, [0.05, 0.05, 0.9], 400) @ [1, -1, 0] / got.n_needed
    half = 1.6449 * math.sqrt(0.1 / got.n_needed)
    assert np.mean(np.abs(means) + half < 0.02) == pytest.approx(0.8, abs=0.06)


def test_n_needed_counts_questions_not_clusters() -> None:
    a, b = planted(1000, 50, 50)
    alone = tost_paired(a, b)
    copied = tost_paired(np.repeat(a, 3), np.repeat(b, 3), clusters=np.repeat(np.arange(1000), 3))
    # three copies a cluster carry the evidence of one; 1 each for the rounding up
    assert abs(copied.n_needed - 3 * alone.n_needed) <= 3
    assert copied.verdict == alone.verdict


@pytest.mark.parametrize("options", [{"margin": 0.0}, {"margin": 2.0}, {"level": 0.5}])
def test_tost_refuses_a_margin_that_is_no_fraction(options: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        tost_paired([1, 0, 1], [1, 0, 1], **options)
