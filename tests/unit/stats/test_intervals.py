"""Intervals against values worked out by hand or taken from printed tables."""

from __future__ import annotations

import math
from statistics import fmean, stdev

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proctor.stats import intervals
from proctor.stats.bootstrap import bootstrap

finite = st.floats(-1e3, 1e3)


def test_mean_stderr_by_hand() -> None:
    # Deviations of 1, 2, 4 from 7/3: squares add up to 42/9; variance 21/9; over n: 7/9.
    assert intervals.mean_stderr([1, 2, 4]) == pytest.approx(math.sqrt(7 / 9))
    assert intervals.mean_stderr([1.0]) is None


@given(st.lists(finite, min_size=2, max_size=50))
def test_mean_stderr_is_sample_sd_over_root_n(values: list[float]) -> None:
    assert intervals.mean_stderr(values) == pytest.approx(stdev(values) / math.sqrt(len(values)), abs=1e-9)


def test_clustered_stderr_by_hand() -> None:
    # Mean 0.5; cluster sums of deviations: +1 (two hits) and -1 (two misses); √(2/1 · 2)/4 = 0.5.
    assert intervals.clustered_stderr([1, 1, 0, 0], ["a", "a", "b", "b"]) == pytest.approx(0.5)
    # In clusters that cancel, there is nothing left to vary.
    assert intervals.clustered_stderr([1, 0, 1, 0], ["a", "a", "b", "b"]) == pytest.approx(0.0)
    assert intervals.clustered_stderr([1, 0], ["a", "a"]) is None
    with pytest.raises(ValueError, match="shorter"):
        intervals.clustered_stderr([1, 0], ["a"])


@given(st.lists(finite, min_size=2, max_size=50))
def test_clusters_of_one_are_no_clusters(values: list[float]) -> None:
    clustered = intervals.clustered_stderr(values, range(len(values)))
    assert clustered == pytest.approx(intervals.mean_stderr(values), abs=1e-9)


def test_wilson_known_values() -> None:
    # R: binom::binom.wilson(8, 10) and (0, 20).
    assert intervals.wilson_interval(8, 10) == pytest.approx((0.4901625, 0.9433178), abs=1e-7)
    assert intervals.wilson_interval(0, 20) == pytest.approx((0.0, 0.1611252), abs=1e-7)
    assert intervals.wilson_interval(0, 0) is None


@given(st.integers(1, 5000), st.data())
def test_wilson_holds_the_proportion_and_mirrors(n: int, data: st.DataObject) -> None:
    hits = data.draw(st.integers(0, n))
    found = intervals.wilson_interval(hits, n)
    mirrored = intervals.wilson_interval(n - hits, n)
    assert found is not None and mirrored is not None
    assert 0 <= found[0] <= hits / n + 1e-12 and hits / n - 1e-12 <= found[1] <= 1
    assert found == pytest.approx((1 - mirrored[1], 1 - mirrored[0]), abs=1e-9)


@pytest.mark.parametrize(
    ("p", "df", "quantile"),
    # Printed tables of Student's t.
    [
        (0.975, 1, 12.706),
        (0.975, 2, 4.303),
        (0.975, 10, 2.228),
        (0.975, 30, 2.042),
        (0.95, 5, 2.015),
        (0.025, 4, -2.776),
    ],
)
def test_t_quantile_table(p: float, df: int, quantile: float) -> None:
    assert intervals.t_quantile(p, df) == pytest.approx(quantile, abs=5e-4)


def test_t_tends_to_the_normal_and_refuses_nonsense() -> None:
    assert intervals.t_quantile(0.975, 1e7) == pytest.approx(1.959964, abs=1e-6)
    for p, df in ((0, 3), (1, 3), (0.5, 0)):
        with pytest.raises(ValueError, match="no quantile"):
            intervals.t_quantile(p, df)


@given(st.floats(0.01, 0.99), st.integers(1, 200))
def test_t_quantile_inverts_the_distribution(p: float, df: int) -> None:
    assert intervals.t_distribution(intervals.t_quantile(p, df), df) == pytest.approx(p, abs=1e-9)


def test_pooled_stderr_by_hand() -> None:
    # (9·10·0.1² + 19·20·0.2²) / 28 = 0.575; / 30; root.
    assert intervals.pooled_stderr([0.1, 0.2], [10, 20]) == pytest.approx(math.sqrt((0.9 + 15.2) / 28 / 30))
    assert intervals.pooled_stderr([0.0], [1]) is None


@given(st.lists(st.lists(st.floats(0, 1), min_size=2, max_size=20), min_size=1, max_size=6))
def test_pooled_stderr_of_equal_means_is_that_of_all_documents_but_for_the_lost_degrees(
    groups: list[list[float]],
) -> None:
    centred = [[v - fmean(g) for v in g] for g in groups]
    pooled = intervals.pooled_stderr([intervals.mean_stderr(g) or 0.0 for g in centred], [len(g) for g in centred])
    whole = [v for g in centred for v in g]
    n, k = len(whole), len(groups)
    direct = intervals.mean_stderr(whole)
    assert pooled is not None and direct is not None
    assert pooled == pytest.approx(direct * math.sqrt((n - 1) / (n - k)), abs=1e-9)


def test_weighted_and_unweighted_means() -> None:
    assert intervals.weighted_mean([0.5, 1.0], [30, 10]) == pytest.approx(0.625)
    assert intervals.unweighted_mean_stderr([0.3, 0.4]) == pytest.approx(0.25)
    assert intervals.unweighted_mean_stderr([]) is None
    for values, sizes in (([], []), ([1.0], [0])):
        with pytest.raises(ValueError, match="no documents"):
            intervals.weighted_mean(values, sizes)


@given(st.lists(st.booleans(), min_size=2, max_size=300))
def test_hits_and_misses_are_recognised(hits: list[bool]) -> None:
    values = [float(h) for h in hits]
    stderr = intervals.mean_stderr(values)
    assert stderr is not None
    assert intervals.is_proportion(fmean(values), stderr, len(values))


def test_other_scores_are_no_proportions() -> None:
    halves = [0.5, 1.0, 0.0, 0.5]
    assert not intervals.is_proportion(fmean(halves), intervals.mean_stderr(halves) or 0.0, 4)
    assert not intervals.is_proportion(7.0, 0.1, 10)
    assert not intervals.is_proportion(0.5, 0.1, 1)


def test_interval_chooses() -> None:
    assert intervals.interval(0.8, math.sqrt(0.16 / 9), 10) == intervals.wilson_interval(8, 10)
    assert intervals.interval(0.5, 0.1, 11) == intervals.t_interval(0.5, 0.1, 11)
    low, high = intervals.interval(20.0, 15.0, 5, "word_perplexity,none") or (0.0, 0.0)
    assert 0 < low < 20 < high and low * high == pytest.approx(400)
    assert intervals.interval(None, 0.1, 5) is intervals.interval(0.5, None, 5) is None
    assert intervals.interval(math.inf, 1.0, 5) is intervals.interval(0.5, math.nan, 5) is None
    assert intervals.normal_interval(1.0, 1.0) == pytest.approx((-0.959964, 2.959964), abs=1e-6)


def test_bootstrap_is_seeded_and_right_for_a_mean() -> None:
    values = np.random.default_rng(3).normal(size=400)
    first = bootstrap(lambda x: float(x.mean()), values.tolist(), iterations=2000, seed=5)
    again = bootstrap(lambda x: float(x.mean()), values.tolist(), iterations=2000, seed=5)
    other = bootstrap(lambda x: float(x.mean()), values.tolist(), iterations=2000, seed=6)
    assert first == again != other and first is not None
    assert first.stderr == pytest.approx(intervals.mean_stderr(values.tolist()), rel=0.06)
    assert first.low < values.mean() < first.high


def test_bootstrap_of_pairs_and_of_too_little() -> None:
    ratio = bootstrap(lambda x: float(x[:, 0].sum() / x[:, 1].sum()), [(2.0, 1.0), (4.0, 2.0), (6.0, 3.0)])
    assert ratio is not None and ratio.stderr == pytest.approx(0.0, abs=1e-12) and ratio.low == ratio.high == 2.0
    assert bootstrap(lambda x: float(x.mean()), [1.0]) is None
    with pytest.raises(ValueError, match="spread"):
        bootstrap(lambda x: float(x.mean()), [1.0, 2.0], iterations=1)
