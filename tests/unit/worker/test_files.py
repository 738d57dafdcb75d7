"""The worker's files: job, run directory, events; and what reads them when they are broken."""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from proctor.config.spec import FakeEngine, OpenAIEngine, VllmServer
from proctor.errors import MissingTool, ServerError, StoreError
from proctor.infer.fake import FakeEngine as Fake
from proctor.records import Boundary, Failure, Response, Shard
from proctor.worker import events as event_log
from proctor.worker.build import engine_for, server_for
from proctor.worker.events import Event, EventLog, read_events
from proctor.worker.job import Job
from proctor.worker.run_directory import RunDirectory

JOB = Job(
    run="r",
    run_directory="runs/r",
    store="store",
    model="m",
    display_name="M",
    weights="w",
    resolution="0" * 16,
    engine={"type": "fake"},
    path="/models/m",
    served_model="default",
    urls=("http://a", "http://b"),
)


def test_a_job_survives_its_file(tmp_path: Path, hostile_name: str) -> None:
    job = replace(JOB, model=hostile_name, path=hostile_name, run=hostile_name)
    job.write(tmp_path / "job.json")
    assert Job.read(tmp_path / "job.json") == job
    assert "/" not in job.job_id
    assert "\n" not in job.job_id


def test_models_that_look_alike_have_different_files() -> None:
    names = ["a b", "a_b", "a/b", "A b", "a  b"]
    assert len({replace(JOB, model=n).job_id.lower() for n in names}) == len(names)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"run": "r"}', "\x00"])
def test_a_broken_job_file_is_an_error_with_a_hint(tmp_path: Path, text: str) -> None:
    (tmp_path / "job.json").write_text(text)
    with pytest.raises(StoreError, match=r"job\.json") as caught:
        Job.read(tmp_path / "job.json")
    assert caught.value.hint


def test_the_fake_engine_needs_no_server() -> None:
    assert server_for(JOB, worker="m-0") is None
    assert isinstance(engine_for(JOB, None, worker="m-0"), Fake)


def test_an_api_key_that_is_not_set_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MY_KEY", raising=False)
    engine = OpenAIEngine(server=VllmServer()).model_dump(mode="json")
    with pytest.raises(MissingTool, match="MY_KEY"):
        server_for(replace(JOB, engine=engine, run_directory=str(tmp_path), api_key_env="MY_KEY"), worker="m-0")


# --- the run directory ---


def test_shards_come_back_in_order_and_only_the_model_s_own(tmp_path: Path, hostile_name: str) -> None:
    directory = RunDirectory(tmp_path / hostile_name.replace("/", "-"))
    directory.create()
    mine = [
        Shard(id="a", model=hostile_name, cost_s=2.0, items=(("t", 5), ("u", 1), ("t", 0))),
        Shard(id="b", model=hostile_name, cost_s=1.0, items=(("t", 3),)),
    ]
    other = Shard(id="a", model="other", cost_s=9.0, items=(("t", 5),))
    directory.write_shards([*mine, other])
    assert directory.read_shards(hostile_name) == mine
    assert directory.read_shards("other") == [other]
    assert directory.read_shards("nobody") == []
    directory.write_shards([])
    assert directory.read_shards("other") == []


def test_a_missing_or_broken_plan_is_an_error(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    directory.create()
    with pytest.raises(StoreError, match="plan"):
        directory.read_shards("m")
    directory.plan.write_bytes(b"PAR1 no")
    with pytest.raises(StoreError, match="plan"):
        directory.read_shards("m")


def test_a_plan_with_a_changed_byte_is_an_error(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    directory.create()
    directory.write_shards([Shard(id="a", model="m", cost_s=2.0, items=(("t", 5), ("u", 1)))])
    whole = directory.plan.read_bytes()
    for place in range(len(whole)):
        directory.plan.write_bytes(whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :])
        with pytest.raises(StoreError, match="plan"):
            directory.read_shards("m")
    directory.plan.write_bytes(whole[:-3])
    with pytest.raises(StoreError, match="plan"):
        directory.read_shards("m")


def test_a_run_directory_in_a_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("")
    with pytest.raises(StoreError, match="run directory"):
        RunDirectory(tmp_path / "runs" / "r").create()


def test_a_write_that_fails_leaves_the_old_file_and_no_litter(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    directory.create()
    directory.config.write_text("old")
    directory.suites.mkdir()
    with pytest.raises(StoreError):
        directory.write(directory.suites, "cannot replace a directory")
    directory.write(directory.config, "new")
    assert directory.config.read_text() == "new"
    assert [n for n in os.listdir(tmp_path) if n.startswith(".")] == []


# --- events ---


def _response(**more: int) -> Response:
    return Response(key="0" * 64, physical_key="1" * 64, text="x", **more)


def test_counters_only_grow_and_failures_are_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "events" / "m-0.jsonl"
    with EventLog(path, worker="m-0", model="m") as events:
        events.phase("asking")
        for _ in range(3):
            events.answered([_response(prompt_tokens=5, completion_tokens=2)], in_flight=1)
        events.answered(
            [Failure(key="0" * 64, boundary=Boundary.CONTEXT, message="long", retryable=False)], in_flight=0
        )
        events.aliased()
        events.phase("done")
    found, _ = read_events(path)
    assert found[0].phase == "starting"
    last = found[-1]
    assert (last.phase, last.requests, last.failed, last.aliases) == ("done", 3, 1, 1)
    assert last.failures == {"context_length": 1}
    assert (last.prompt_tokens, last.completion_tokens) == (15, 6)


def test_what_processes_beside_a_worker_did_is_counted_with_its_own(tmp_path: Path) -> None:
    path = tmp_path / "m-0.jsonl"
    said: list[Event] = []
    with EventLog(said.append, worker="m-0.client-1", model="m") as beside:
        beside.answered([_response(prompt_tokens=5, completion_tokens=2)] * 4, in_flight=1)
        beside.answered(
            [Failure(key="0" * 64, boundary=Boundary.CONTEXT, message="long", retryable=False)], in_flight=0
        )
        beside.aliased()
        beside.phase("done")
    with EventLog(path, worker="m-0", model="m") as events:
        events.phase("asking")
        events.answered([_response(prompt_tokens=1, completion_tokens=1)] * 2, in_flight=1)
        events.beside = lambda: said[-1:]
        for _ in range(2):  # what they said is added each time, not once more
            events.phase("asking")
        events.say("one of them ended")
    last = read_events(path)[0][-1]
    assert (last.worker, last.phase, last.message) == ("m-0", "asking", "one of them ended")
    assert (last.requests, last.failed, last.aliases) == (6, 1, 1)
    assert (last.prompt_tokens, last.completion_tokens) == (22, 10)
    assert last.failures == {"context_length": 1}


def test_how_much_of_a_core_the_asking_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=100.0, used=7.0)
    clocks = SimpleNamespace(monotonic=lambda: clock.now, thread_time=lambda: clock.used, time=time.time)
    monkeypatch.setattr(event_log, "time", clocks)
    path = tmp_path / "m-0.jsonl"
    with EventLog(path, worker="m-0", model="m") as events:
        for spent in (0.5, 0.97, 0.2):  # seconds of CPU in a second
            for _ in range(6):
                clock.now += 1.0
                clock.used += spent
                events.answered([_response()], in_flight=1)
        busy = [e.core for e in read_events(path)[0]]
        assert busy[:6] == [0.0] * 6, "five seconds are not over"
        assert max(busy) == pytest.approx(0.97, abs=0.02)
        assert busy[-1] == pytest.approx(0.2, abs=0.2)
        beside: list[Event] = []
        with EventLog(beside.append, worker="m-0.client-1", model="m"):
            events.beside = lambda: [replace(beside[-1], core=0.9)]
            events.phase("asking")
    assert read_events(path)[0][-1].core == 0.9, "of the busiest"


def test_the_end_of_a_failed_worker_names_its_error(tmp_path: Path) -> None:
    path = tmp_path / "m-0.jsonl"
    with EventLog(path, worker="m-0", model="m") as events:
        events.failed(ServerError("it died", hint="look at the log"))
    event = read_events(path)[0][-1]
    assert (event.phase, event.message, event.error, event.hint) == (
        "failed",
        "it died",
        "ServerError",
        "look at the log",
    )


def test_reading_goes_on_where_it_stopped_and_skips_what_is_torn(tmp_path: Path) -> None:
    path = tmp_path / "m-0.jsonl"
    assert read_events(path) == ([], 0)
    with EventLog(path, worker="m-0", model="m"):
        pass
    first, offset = read_events(path)
    assert len(first) == 1
    with path.open("a") as file:
        file.write('{"worker": "m-0", "mod')
    assert read_events(path, offset) == ([], offset)
    with path.open("a") as file:
        file.write("\n" + json.dumps({"worker": "m-0", "model": "m", "phase": "done", "time": 1.0}) + "\n")
    rest, _ = read_events(path, offset)
    assert [e.phase for e in rest] == ["done"]


def test_engine_specs_come_back_validated() -> None:
    assert JOB.engine_spec == FakeEngine()
