"""What a submission makes of a plan, given what the cluster said; nothing is sent."""

from __future__ import annotations

import asyncio
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import pytest

from proctor import api
from proctor.api import submitting
from proctor.api.context import RunContext
from proctor.api.progress import Progress
from proctor.api.sent import job_prefix
from proctor.api.submitting import Site, SubmitOutcome
from proctor.errors import ProctorError
from proctor.launch.slurm.cluster import Node, Partition
from proctor.launch.slurm.records import parse_queue
from proctor.launch.slurm.scheduler import SlurmScheduler
from proctor.worker.events import Event

from .conftest import Desk, Room, says

NODE = Node(name="n1", state="idle", cpus=8, memory_mb=1000, gpus=0, gpus_used=0, gpu_types=())
MAIN = Partition(
    name="main",
    default=True,
    state="UP",
    max_time_s=None,
    default_time_s=None,
    max_nodes=None,
    preempt_mode="OFF",
    nodes=(NODE,),
)


@pytest.fixture(autouse=True)
def cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty cluster of one node without limits."""

    async def look(progress: Progress) -> Site:
        return Site(scheduler=cast("SlurmScheduler", None), queue=(), partitions=(MAIN,))

    monkeypatch.setattr(submitting, "look", look)


def long_run(room: Room, plan: dict[str, Any], minutes: int) -> Path:
    """A task of 200 requests of 10 s each, under a limit of so many minutes."""
    task = room.task("t", [str(n) for n in range(200)], generation={"max_gen_toks": 14_286})
    launch = {"type": "slurm", "cluster": "generic", "workers": 2, "time_limit": minutes}
    return room.run([{"native": task}], plan=plan, launch=launch)


def dry(config: Path) -> SubmitOutcome:
    return asyncio.run(api.submit(config, dry_run=True))


def test_a_task_that_does_not_fit_its_job_is_cut(room: Room) -> None:
    found = dry(long_run(room, {"strategy": "naive"}, 20))
    (model,) = found.plan.models
    assert model.cost_s == pytest.approx(2000, rel=0.01)
    assert len(model.shards) == 2  # of what 20 minutes leave
    assert model.largest_shard_s < 1200
    (warning,) = found.warnings
    assert "plan.strategy naive: shards of 2002 s do not fit the time limit" in warning


@pytest.mark.parametrize("strategy", ["naive", "size"])
def test_a_task_that_fits_stays_whole(room: Room, strategy: str) -> None:
    found = dry(long_run(room, {"strategy": strategy}, 120))
    assert len(found.plan.models[0].shards) == 1
    assert found.warnings == ()


def limited(room: Room, minutes: int | str, **launch: Any) -> Path:
    """A task of one request of 700 s, by the rates that are assumed of an unknown model, under a limit."""
    task = room.task("t", ["a"], generation={"max_gen_toks": 1_000_000})
    terms = {"type": "slurm", "cluster": "generic", "workers": 1, "time_limit": minutes} | launch
    return room.run([{"native": task}], plan={"strategy": "naive"}, launch=terms)


def seen_before(config: Path, startup_s: float) -> None:
    """A worker has asked for a second, after so long a start, and generated 500 tokens."""
    context = RunContext.open(config)
    context.write_configuration()
    said = [("starting", 0.0, 0), ("asking", startup_s, 0), ("done", startup_s + 1, 1)]
    events = [Event(worker="w", model="m", phase=p, time=t, requests=n, completion_tokens=480 * n) for p, t, n in said]
    context.directory.events.mkdir(parents=True, exist_ok=True)
    (context.directory.events / "w.jsonl").write_text("".join(json.dumps(asdict(e)) + "\n" for e in events))


def test_a_limit_that_is_too_short_by_guesses_alone_is_a_warning(room: Room) -> None:
    found = dry(limited(room, 10))
    (warning,) = found.warnings
    assert "time limit 00:10:00 may be too short" in warning
    assert "start-up (1 s: prior), the longest request (700 s: prior)" in warning
    assert [a.missing for a in found.arrays] == [1]
    assert dry(limited(room, 30)).warnings == ()


def test_a_limit_that_is_too_short_by_measurement_is_refused(room: Room) -> None:
    config = limited(room, 10)
    seen_before(config, 40.0)
    with pytest.raises(ProctorError, match=r"too short.*start-up \(40 s: measured on 1 start\(s\)\).*measured on 1 w"):
        dry(config)


def test_a_limit_below_the_time_that_an_attempt_takes_to_end_is_refused(room: Room) -> None:
    with pytest.raises(ProctorError, match=r"00:02:00 is too short.*signal_lead_s"):
        dry(limited(room, 2))
    assert "may be too short" in dry(limited(room, 2, signal_lead_s=30)).warnings[0]


def test_a_partition_that_allows_less_than_guessed_is_used_with_a_warning(
    room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def look(progress: Progress) -> Site:
        return Site(scheduler=cast("SlurmScheduler", None), queue=(), partitions=(replace(MAIN, max_time_s=600),))

    monkeypatch.setattr(submitting, "look", look)
    config = limited(room, "auto")
    found = dry(config)
    assert [a.time_limit_s for a in found.arrays] == [600]
    assert "may be too short" in found.warnings[-1]
    seen_before(config, 40.0)
    with pytest.raises(ProctorError, match="does not fit the work"):
        dry(config)


@pytest.mark.parametrize("dry_run", [False, True])
def test_what_slurm_holds_is_cancelled_where_nothing_is_owed(
    room: Room, monkeypatch: pytest.MonkeyPatch, *, dry_run: bool
) -> None:
    """A start that failed because the work was done by a copy that the controller forgot."""
    config = room.run([{"native": room.task("t", ["a"])}], launch={"type": "slurm", "cluster": "generic"})
    Desk.open(config).answer(says("a"))
    name = job_prefix(RunContext.open(config)) + "x"
    line = "7|7|1|PENDING|1|0|N/A|N/A|N/A||u|(null)|(null)|main|{reason}|{name}|\n"
    held = parse_queue(
        line.format(name=name, reason="launch failed requeued held")
        + line.format(name="other", reason="launch failed requeued held").replace("7|7", "8|8", 1)
        + line.format(name=name, reason="Priority").replace("7|7", "9|9", 1)
    )
    cancelled: list[str] = []

    class Controller:
        commands = None

        async def cancel(self, ids: list[str]) -> None:
            cancelled.extend(ids)

    async def connected(*_: object) -> Controller:
        return Controller()

    monkeypatch.setattr(SlurmScheduler, "open", connected)
    monkeypatch.setattr(submitting, "read_queue", lambda _: held)
    found = asyncio.run(api.submit(config, dry_run=dry_run))
    assert found.plan.owed == 0
    assert (cancelled, len(found.warnings)) == (([], 0) if dry_run else (["7_1"], 1))
