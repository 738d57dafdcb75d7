"""Stack samples to stages, and marks to steps."""

from __future__ import annotations

import pytest
from bench.overhead import STEPS, steps
from bench.stages import REST, stage_of, stages

FEED = "_fill (/x/src/proctor/worker/feed.py)"
WRITER = "append (/x/src/proctor/store/writer.py)"
LOOP = "_run_once (/usr/lib/python3.11/asyncio/base_events.py)"
DUMPS = "dumps (/usr/lib/python3.11/json/__init__.py)"


@pytest.mark.parametrize(
    ("frames", "stage"),
    [
        ([LOOP], REST),
        (["main (/x/src/proctor/worker/__main__.py)", LOOP], REST),
        ([LOOP, FEED], "worker: feed, session, events"),
        ([LOOP, FEED, WRITER], "journal"),
        ([LOOP, FEED, WRITER, DUMPS], "journal"),
        (["run (/x/src/proctor/infer/client.py)", "post (/x/src/proctor/infer/origin.py)"], "HTTP library"),
    ],
)
def test_a_sample_belongs_to_the_innermost_stage_on_its_stack(frames: list[str], stage: str) -> None:
    assert stage_of(frames) == stage


def test_shares_are_of_what_was_sampled_without_waiting_threads() -> None:
    found = stages(
        [
            f"process 1:x;thread (7);{LOOP};{FEED} 3",
            f"{LOOP};{WRITER};{DUMPS} 1",
            "_bootstrap (/usr/lib/threading.py);_worker (/usr/lib/concurrent/futures/thread.py) 50",
            "not a sample",
        ]
    )
    assert [(one.name, one.share) for one in found] == [("worker: feed, session, events", 0.75), ("journal", 0.25)]
    assert found[1].busiest == (("dumps (__init__.py)", 0.25),)


def test_steps_add_up_to_the_whole_command() -> None:
    at = {
        "began": 10.0,
        "imported": 11.0,
        "recording the tasks": 11.5,
        "planned": 13.0,
        "worker starting": 12.0,
        "worker asking": 12.5,  # begun ahead of the plan
        "worker done": 20.0,
        "scoring": 20.5,
        "scored": 22.0,
    }
    found = steps(at, 22.5)
    assert tuple(found) == STEPS
    assert sum(found.values()) == pytest.approx(12.5)
    assert found["start the worker"] == 0.0
    assert found["ask and journal"] == 7.0
