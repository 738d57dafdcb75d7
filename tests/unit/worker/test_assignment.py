"""Which worker begins with which model."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proctor.errors import StoreError
from proctor.worker.assignment import Assignment, SlurmTerms, start_position


def test_in_proportion_to_the_work() -> None:
    begun = Counter(start_position([100.0, 300.0, 600.0], index=i, workers=10) for i in range(10))
    assert begun == {0: 1, 1: 3, 2: 6}


def test_one_worker_begins_in_the_middle_of_the_work_and_takes_all() -> None:
    assignment = Assignment(shape="s", jobs=("a", "b", "c"), costs=(1.0, 1.0, 1.0))
    assert assignment.order(0) == ["b", "c", "a"]


def test_without_swap_one_model_only() -> None:
    assignment = Assignment(shape="s", jobs=("a", "b"), costs=(1.0, 9.0), workers=2, swap=False)
    assert [assignment.order(i) for i in range(2)] == [["b"], ["b"]]


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=20), st.integers(1, 50), st.integers(0, 500))
def test_every_worker_has_a_place(costs: list[float], workers: int, index: int) -> None:
    jobs = tuple(map(str, range(len(costs))))
    assignment = Assignment(shape="s", jobs=jobs, costs=tuple(costs), workers=workers)
    assert sorted(assignment.order(index)) == sorted(jobs)


def test_written_and_read(tmp_path: Path) -> None:
    assignment = Assignment(
        shape="s",
        jobs=("a.json",),
        costs=(2.5,),
        linger_s=3.0,
        slurm=SlurmTerms(script="#!/bin/bash\n", max_attempts=3),
    )
    assignment.write(tmp_path / "s.json")
    assert Assignment.read(tmp_path / "s.json") == assignment
    (tmp_path / "s.json").write_text('{"shape": 1')
    with pytest.raises(StoreError, match=r"s\.json"):
        Assignment.read(tmp_path / "s.json")
