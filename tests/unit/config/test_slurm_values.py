"""Slurm's times and options, as far as a configuration may state them."""

from __future__ import annotations

import pytest

from proctor.config.slurm_values import RESERVED, clock, option, seconds


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0", None),
        ("30", 1_800),
        ("90:15", 5_415),
        ("1:30:00", 5_400),
        ("100:00:00", 360_000),
        ("2-12", 216_000),
        ("1-0:30", 88_200),
        ("1-02:03:04", 93_784),
        (" 45 ", 2_700),
        (45, 2_700),
    ],
)
def test_times(text: str | int, expected: int | None) -> None:
    assert seconds(text) == expected


@pytest.mark.parametrize(
    "text", ["", "auto", "1h", "-5", "1:2:3:4", "1-", "-1-2", "1.5", "1-2-3", "UNLIMITED", "1:", "٣", True]
)
def test_no_times(text: str) -> None:
    with pytest.raises(ValueError, match="Slurm's form of a time"):
        seconds(text)


@pytest.mark.parametrize(
    ("limit", "text"), [(1, "00:01:00"), (61, "00:02:00"), (3_600, "01:00:00"), (86_400.5, "1-00:01:00")]
)
def test_clock_rounds_up_to_minutes(limit: float, text: str) -> None:
    assert clock(limit) == text
    assert (seconds(text) or 0) >= limit


@pytest.mark.parametrize(
    "name", ["reservation", "--constraint", "mem", "mem-per-gpu", "exclusive", "time-min", "switches", "ACCTG_freq"]
)
def test_options_that_may_be_given(name: str) -> None:
    assert option(name) == name.lstrip("-").replace("_", "-").lower()


@pytest.mark.parametrize(
    "name",
    [*sorted(RESERVED), "--job-name", "cpus_per_task", "p", "parti", "gpu", "arr", "", "no such", "x\ny", "node"],
)
def test_options_that_are_proctors(name: str) -> None:
    with pytest.raises(ValueError, match=r"Proctor|no long option"):
        option(name)
