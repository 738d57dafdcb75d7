"""Medians, paired ratios and their intervals."""

from __future__ import annotations

import pytest
from bench.spread import bootstrap, ratio, spread


def test_a_spread_has_the_median_and_the_extremes() -> None:
    found = spread([3.0, 1.0, 10.0, 2.0])
    assert (found.median, found.low, found.high, found.runs) == (2.5, 1.0, 10.0, 4)


def test_no_runs_have_no_spread() -> None:
    with pytest.raises(ValueError, match="no runs"):
        spread([])


def test_a_ratio_is_taken_pair_by_pair() -> None:
    # Unpaired medians would give 20 / 20; in each pair the first is twice the second.
    found = ratio([20.0, 2.0, 200.0], [10.0, 1.0, 100.0])
    assert (found.median, found.low, found.high, found.lower, found.upper) == (2.0, 2.0, 2.0, 2.0, 2.0)


def test_the_interval_lies_within_the_extremes_and_holds_the_median() -> None:
    found = ratio([1.0, 1.1, 0.9, 1.2, 1.05, 0.95, 1.0], [1.0] * 7)
    assert found.low <= found.lower < found.median < found.upper <= found.high
    assert found == ratio([1.0, 1.1, 0.9, 1.2, 1.05, 0.95, 1.0], [1.0] * 7), "the same runs, another interval"


def test_an_outlier_moves_the_extreme_and_not_the_interval() -> None:
    values = [1.0, 1.01, 0.99, 1.02, 0.98, 1.0, 1.01, 0.99, 1.0, 9.0, 1.0, 1.0, 1.0]
    lower, upper = bootstrap(values, lambda drawn: sorted(drawn)[len(drawn) // 2])
    assert 0.98 <= lower <= upper < 1.1


def test_runs_that_cannot_be_paired_are_refused() -> None:
    with pytest.raises(ValueError, match="2 runs cannot be paired with 1"):
        ratio([1.0, 2.0], [1.0])
