"""A worker's history without what came between: phases, times and counters as in the whole of it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from proctor.api.measuring import measured
from proctor.worker.events import Event, EventLog, read_events, read_turns

PHASES = ("starting", "asking", "draining", "waiting", "done", "failed")
stretches = st.lists(st.tuples(st.sampled_from(PHASES), st.integers(1, 4), st.booleans()), max_size=12)


def lines(found: list[tuple[str, int, bool]]) -> list[str]:
    """Events of one worker; a stretch that is `torn` loses the end of its last line."""
    out: list[str] = []
    for phase, count, torn in found:
        for _ in range(count):
            n = len(out)
            event = Event(worker="w", model="m", phase=phase, time=float(n * n), requests=n, message='"phase": "done"')
            out.append(json.dumps(asdict(event)) + "\n")
        if torn:
            out[-1] = out[-1][:40] + "\n"
    return out


@given(stretches)
def test_nothing_that_counts_is_passed_over(tmp_path_factory: object, found: list[tuple[str, int, bool]]) -> None:
    path = tmp_path_factory.mktemp("events") / "w.jsonl"  # type: ignore[attr-defined]
    path.write_text("".join(lines(found)) + '{"worker": "w", "half')
    every, turns = read_events(path)[0], read_turns(path)
    assert [e for e in every if e in turns] == turns
    assert {e.phase for e in every} == {e.phase for e in turns}
    if every:
        assert turns[-1] == every[-1]
    whole, short = measured(every), measured(turns)
    assert whole == short


def test_a_long_stretch_is_two_events(tmp_path: Path) -> None:
    path = tmp_path / "w.jsonl"
    path.write_text("".join(lines([("starting", 1, False), ("asking", 5000, False), ("done", 1, False)])))
    assert [(e.phase, e.requests) for e in read_turns(path)] == [
        ("starting", 0),
        ("asking", 1),
        ("asking", 5000),
        ("done", 5001),
    ]
    assert read_turns(tmp_path / "none.jsonl") == []


def test_what_a_log_writes_is_understood(tmp_path: Path) -> None:
    with EventLog(tmp_path / "w.jsonl", worker="w", model="m") as log:
        for phase in ("asking", "asking", "asking", "waiting", "done"):
            log.phase(phase)
    found = [e.phase for e in read_turns(tmp_path / "w.jsonl")]
    assert found == ["starting", "asking", "asking", "waiting", "done"]
