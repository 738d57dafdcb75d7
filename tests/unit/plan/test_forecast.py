"""Formulas of the forecast."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proctor.errors import ConfigError
from proctor.plan import (
    CostModel,
    Spent,
    plan_against_actual,
    recommended_workers,
    scaling,
    time_limit,
)


@given(st.floats(1, 1e6), st.floats(0, 600), st.floats(0.1, 10), st.floats(0, 1000))
def test_the_recommended_number_is_the_largest_that_pays(
    work: float, startup: float, least: float, longest: float
) -> None:
    found = recommended_workers(work, startup_s=startup, floor_s=least, longest_s=longest)
    at = {s.workers: s for s in found.counts}
    assert found.workers >= 1
    assert found.workers == 1 or at[found.workers].efficiency >= 0.75 - 1e-9
    more = scaling(work, found.workers + 2, startup_s=startup, floor_s=least, longest_s=longest)
    limited = longest * (found.workers + 2) >= work or least * (found.workers + 1) >= work or found.workers == 1024
    assert limited or startup * (found.workers + 1) + least * (found.workers + 1) / 2 > work / 3 - 1e-6
    assert more.makespan_s <= at[found.workers].makespan_s + least


def test_published_static_shards_stop_paying_where_ours_says() -> None:
    # 10.1 GPU-hours on 1 and 13.9 on 32: each worker costs about 440 s that are no work.
    work = 10.1 * 3600
    each = (13.9 - 10.1) * 3600 / 31
    found = recommended_workers(work, startup_s=each, floor_s=0.0)
    assert 16 <= found.workers <= 32
    assert "start-up" in found.reason


def test_reasons_name_what_limits() -> None:
    assert recommended_workers(100, startup_s=0, floor_s=1, longest_s=50).workers == 2
    assert "longest request" in recommended_workers(100, startup_s=0, floor_s=1, longest_s=50).reason
    assert recommended_workers(1, startup_s=600, floor_s=2).workers == 1
    assert recommended_workers(1e9, startup_s=1, floor_s=1, most=7).workers == 7
    with pytest.raises(ValueError, match="efficiency"):
        recommended_workers(1, startup_s=1, floor_s=1, efficiency=1)


def test_limits_are_rounded_up_and_written_as_slurm_reads_them() -> None:
    limit = time_limit(36_000, 10, startup_s=100)
    # 150 + 1.5 * 3600 + 120 = 5670 s, in tens of minutes
    assert (limit.seconds, limit.attempts) == (6000, 1)
    assert time_limit(1, 1, startup_s=1).seconds == 1800
    assert time_limit(40 * 3600, 1, startup_s=0).seconds == 2 * 86400 + 12 * 3600 + 600


def test_more_than_the_limit_takes_several_attempts_and_smaller_shards() -> None:
    limit = time_limit(36_000, 1, startup_s=100, longest_s=60, most_s=3600)
    assert limit.seconds == 3600
    assert limit.max_shard_s == pytest.approx((3600 - 150 - 120) / 1.5)
    assert limit.attempts * (3600 - 150 - 120) >= 1.5 * 36_000


def test_what_cannot_fit_is_refused_with_the_numbers() -> None:
    with pytest.raises(ConfigError, match=r"limit of 600 s.*starting takes 300 s.*longest request 200 s"):
        time_limit(1000, 4, startup_s=300, longest_s=200, most_s=600)


def test_rates_are_scaled_to_what_was_measured() -> None:
    model = CostModel(prefill_tokens_s=100, decode_tokens_s=10, request_s=0)
    busy = Spent(seconds=40, requests=1, prompt_tokens=1000, completion_tokens=100)
    found = model.calibrated([busy])  # 20 s expected, 40 s measured
    assert (found.prefill_tokens_s, found.decode_tokens_s) == (50, 5)
    assert model.calibrated([]) == model.calibrated(
        [Spent(seconds=0.1, requests=1, prompt_tokens=9, completion_tokens=9)]
    )
    assert model.calibrated([]) == model


def test_plan_against_actual_adds_workers_and_extrapolates() -> None:
    planned = [("m", Spent(requests=100, seconds=50, completion_tokens=1000)), ("n", Spent(requests=10, seconds=1))]
    half = Spent(requests=25, seconds=20, completion_tokens=500)
    m, n = plan_against_actual(planned, [("m", half), ("m", half), ("gone", half)])
    assert (m.done, m.expected_s, m.seconds_ratio, m.tokens_ratio) == (0.5, 80, 1.6, 2)
    assert (n.done, n.expected_s, n.seconds_ratio, n.tokens_ratio) == (0, None, None, None)
