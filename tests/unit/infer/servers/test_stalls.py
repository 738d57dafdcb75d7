"""When a living server counts as stalled."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest

from proctor.config.spec import CommandServer
from proctor.errors import ServerError
from proctor.infer.server import Load, ServedModel, ServerPaths
from proctor.infer.servers.build import build_server
from proctor.infer.servers.launched import LaunchedServer
from proctor.infer.servers.stalls import Activity, StallWatch


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def watch(clock: Clock) -> StallWatch:
    return StallWatch(clock)


WAITING = Load(in_flight=3)


def waited(watch: StallWatch, clock: Clock, seconds: int, load: Load, activity: Activity | None = Activity()) -> float:  # noqa: B008
    """What it says after so many looks, one a second."""
    said = 0.0
    for _ in range(seconds):
        clock.now += 1
        said = watch.waiting_s(load)
        watch.sees(activity)
    return said


def test_requests_without_answers_and_without_work(watch: StallWatch, clock: Clock) -> None:
    assert waited(watch, clock, 100, WAITING) == 100
    # Retries pause: for a moment nothing is in flight.
    clock.now += 5
    assert watch.waiting_s(Load()) == 105
    clock.now += 1
    assert watch.waiting_s(WAITING) == 106


def test_an_answer_starts_anew(watch: StallWatch, clock: Clock) -> None:
    waited(watch, clock, 100, WAITING)
    assert waited(watch, clock, 1, Load(in_flight=3, answered=1)) == 0


def test_an_idle_server_is_not_stalled(watch: StallWatch, clock: Clock) -> None:
    waited(watch, clock, 100, WAITING)
    assert waited(watch, clock, 1000, Load()) == 0
    assert waited(watch, clock, 1, WAITING) <= 1


def test_a_long_generation_that_computes_is_never_touched(watch: StallWatch, clock: Clock) -> None:
    for second in range(2000):
        clock.now += 1
        assert watch.waiting_s(WAITING) <= 2
        watch.sees(Activity(cpu_s=second * 0.5))


def test_answering_for_its_health_is_no_work(watch: StallWatch, clock: Clock) -> None:
    for second in range(100):
        clock.now += 1
        watch.waiting_s(WAITING)
        watch.sees(Activity(cpu_s=second * 0.02))
    assert watch.waiting_s(WAITING) == 100


def test_a_gpu_is_a_better_witness_than_a_spinning_thread(watch: StallWatch, clock: Clock) -> None:
    assert waited(watch, clock, 50, WAITING, Activity(cpu_s=1.0, gpu_percent=80.0)) <= 1
    for second in range(100):
        clock.now += 1
        watch.waiting_s(WAITING)
        watch.sees(Activity(cpu_s=float(second), gpu_percent=0.0))
    assert watch.waiting_s(WAITING) >= 100


def test_who_cannot_be_seen_is_not_accused(watch: StallWatch, clock: Clock) -> None:
    assert waited(watch, clock, 1000, WAITING, None) <= 1


async def test_a_stalled_server_is_restarted_within_its_budget(tmp_path: Path) -> None:
    argv = (sys.executable, "-W", "ignore", "-m", "proctor.testing.server", "--port", "{port}")
    spec = CommandServer(argv=argv, stall_s=1.0, restarts=1)
    paths = ServerPaths(logs=tmp_path / "logs", scratch=tmp_path / "scratch")
    async with build_server(spec, ServedModel(path="/m"), paths=paths) as server:
        assert isinstance(server, LaunchedServer)
        load = Load()
        server.observe(lambda: {backend.url: load for backend in server.backends})
        first = server.backends
        for _ in range(15):
            await asyncio.sleep(0.1)
            await server.ensure()
        assert server.backends == first, "nobody waits for an answer"
        load = Load(in_flight=1)
        while server.backends == first:
            await server.ensure()
            await asyncio.sleep(0.1)
        with pytest.raises(ServerError, match="it stalled: requests wait") as caught:
            while True:
                await server.ensure()
                await asyncio.sleep(0.1)
        assert caught.value.state == "died"


def test_one_look_is_no_proof_and_the_same_look_again_is_none(watch: StallWatch, clock: Clock) -> None:
    """Looks at other nodes are seldom: what was found is handed over again until the next one."""
    clock.now = 100
    watch.waiting_s(WAITING)
    found = Activity(cpu_s=5.0)
    for _ in range(5):
        clock.now += 1
        watch.sees(found)
    assert watch.watched_s == 0
    watch.sees(Activity(cpu_s=5.05))
    assert watch.watched_s == 4
    clock.now += 5
    watch.sees(Activity(cpu_s=9.0))
    assert watch.watched_s == 0
    assert watch.waiting_s(WAITING) == 0
