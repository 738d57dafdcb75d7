"""The arithmetic of published launchers, against their recorded numbers."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from proctor.plan.arrays import (
    abort_threshold,
    array_range,
    array_rows,
    batch_count,
    effective_batch,
    plan_array,
    task_minutes,
)

VECTORS: dict[str, Any] = json.loads((Path(__file__).parent / "data" / "launcher_arithmetic.json").read_text())


def numbers(name: str) -> list[int]:
    return [int(n) for n in re.findall(r"=(\d+)", name)]


def vectors(beginning: str) -> list[str]:
    found = [name for name in VECTORS if name.startswith(beginning)]
    assert found
    return found


@pytest.mark.parametrize("name", vectors("oellm plan"))
def test_arrays_are_the_published_ones(name: str) -> None:
    evals, remaining = numbers(name)
    plan = plan_array([10] * evals, remaining)
    assert plan is not None
    found = {"array": plan.array, "evals_per_job": plan.evals_per_job, "time": plan.time_limit}
    assert found == VECTORS[name]


@pytest.mark.parametrize("name", vectors("evalhive eff_batch"))
def test_batches_are_the_published_ones(name: str) -> None:
    remaining, parallel, batch = numbers(name)
    assert [effective_batch(remaining, parallel, batch), batch_count(remaining, parallel, batch)] == VECTORS[name]


@pytest.mark.parametrize("name", vectors("evalhive max_consecutive_failures"))
def test_abort_thresholds_are_the_published_ones(name: str) -> None:
    (parallel,) = numbers(name)
    assert abort_threshold(parallel) == VECTORS[name]


def test_a_capped_limit_says_that_it_does_not_fit() -> None:
    plan = plan_array([10] * 20_000, 10)
    assert plan is not None
    assert (plan.hours, plan.hours_needed, plan.fits) == (23, 400, False)
    small = plan_array([10], 1000)
    assert small is not None
    assert small.fits


def test_nothing_owed_or_no_room_is_no_array() -> None:
    assert plan_array([], 10) is None
    assert plan_array([10], 0) is None


def test_minutes_go_by_the_exact_name() -> None:
    assert task_minutes("hellaswag", 1) == 23
    assert task_minutes("Belebele", 10) == 83
    assert task_minutes("belebele_deu_Latn", 10) == 53
    assert task_minutes("arc", 1) == 10


@pytest.mark.parametrize(("count", "array", "each"), [(1000, 128, 8), (129, 128, 2), (5, 2, 3)])
def test_rows_of_an_array_cover_every_row_once(count: int, array: int, each: int) -> None:
    rows = [row for index in range(array) for row in array_rows(index, each, count)]
    assert rows == list(range(1, count + 1))


def test_array_argument() -> None:
    assert array_range(128, 16) == "0-127%16"
    with pytest.raises(ValueError, match="0 elements"):
        array_range(0, 16)
