"""Rates and start-up from what workers said."""

import json
from dataclasses import asdict, replace
from pathlib import Path

from proctor import api
from proctor.api.measuring import measured, weight_bytes
from proctor.worker.events import Event

from .conftest import Desk, Room


def event(phase: str, time: float, requests: int = 0, worker: str = "w") -> Event:
    return Event(
        worker=worker, model="m", phase=phase, time=time, requests=requests,
        prompt_tokens=10 * requests, completion_tokens=2 * requests,
    )  # fmt: skip


def test_only_time_at_work_counts_and_lives_are_added() -> None:
    life = [event("starting", 0), event("asking", 30), event("asking", 40, 5), event("waiting", 50, 9)]
    again = [event("starting", 500), event("asking", 510), event("draining", 512, 1), event("done", 514, 2)]
    found = measured([*life, event("done", 90, 9), *again])["m"]
    assert found.startups_s == [30, 10]
    assert [(b.seconds, b.requests) for b in found.busy] == [(20, 9), (4, 2)]
    assert (found.spent.seconds, found.spent.requests, found.spent.prompt_tokens) == (24, 11, 110)


def test_a_worker_that_never_asked_has_started_and_no_more() -> None:
    found = measured([event("starting", 0), event("failed", 5)])["m"]
    assert (found.busy, found.startups_s, found.starts, found.starting_s) == ([], [], 1, 5)
    assert measured([]) == {}


def test_starts_are_counted_over_all_lives_and_workers() -> None:
    first = [event("starting", 0), event("asking", 30), event("done", 40)]
    again = [event("starting", 100), event("failed", 107)]
    other = [event("starting", 3, worker="v"), event("asking", 8, worker="v")]
    found = measured([*first, *again, *other])["m"]
    assert (found.starts, found.starting_s, sorted(found.startups_s)) == (3, 42, [5, 30])


def test_a_worker_that_is_ready_and_waits_for_its_plan_has_started() -> None:
    life = [event("starting", 0), event("serving", 20), event("asking", 300), event("done", 310, 4)]
    found = measured(life)["m"]
    assert (found.startups_s, found.starting_s, found.spent.seconds) == ([20], 20, 10)
    early = measured([event("starting", 0), event("serving", 20), event("done", 25)])["m"]
    assert (early.startups_s, early.busy) == ([20], [])


def test_what_a_worker_says_while_it_starts_is_no_second_start() -> None:
    staged = replace(event("starting", 60), message="the weights are read from /local/x")
    found = measured([event("starting", 0), staged, event("asking", 90)])["m"]
    assert (found.starts, found.startups_s) == (1, [90])


def test_a_reload_is_no_start() -> None:
    life = [
        event("starting", 0),
        replace(event("serving", 4), reloaded=True),
        replace(event("done", 9, 1), reloaded=True),
    ]
    found = measured([event("starting", 0, worker="v"), event("asking", 60, worker="v"), *life])["m"]
    assert (found.starts, found.starting_s, found.startups_s) == (1, 60, [60])
    assert (found.reloads, found.reloading_s) == (1, 4)


def test_weights_are_counted_where_they_are(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"x" * 100)
    (tmp_path / "config.json").write_text("{}")
    assert weight_bytes(tmp_path) == 100
    assert weight_bytes(tmp_path / "model.safetensors") == 100
    assert weight_bytes(tmp_path / "gone") == 0


def test_status_counts_starts(room: Room) -> None:
    desk = Desk.open(room.run([{"native": room.task("t", ["a", "b"])}]))
    desk.context.write_configuration()
    life = [event("starting", 0), event("asking", 30), event("done", 40, 2), event("starting", 90), event("failed", 94)]
    lines = [json.dumps(asdict(e)) + "\n" for e in life]
    desk.context.directory.events.mkdir(exist_ok=True)
    (desk.context.directory.events / "w.jsonl").write_text("".join(lines))
    (found,) = api.status(desk.context.config).starts
    assert (found.model, found.starts, found.seconds, found.typical_s) == ("m", 2, 34, 30)
