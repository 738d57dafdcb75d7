"""Which server is asked, when one is given up, and when it is asked again: eval-hive's policy, and what differs."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator

import pytest

from proctor.errors import ServerError
from proctor.infer import routing
from proctor.infer.client import Broken, Client, Reply, Retries, allow_connections
from proctor.infer.routing import EJECT_AFTER, PROBE_LONGEST_S, Affinity, Route, Router
from proctor.infer.server import Backend
from proctor.testing import FakeServer, Faults, ServerOptions

BACKENDS = [Backend(url=f"http://127.0.0.1:{port}") for port in (1, 2, 3)]
BODY = {"prompt": "hello", "max_tokens": 4, "temperature": 0}


@pytest.fixture
async def router() -> AsyncIterator[Router]:
    router = Router(lambda: BACKENDS, unreachable_s=60.0)
    yield router
    await router.close()


def test_the_published_numbers() -> None:
    assert (EJECT_AFTER, PROBE_LONGEST_S) == (10, 60.0)


async def test_fewest_in_flight_and_of_equal_ones_the_first(router: Router) -> None:
    picked: list[str] = []
    for _ in range(7):
        picked.append((await router.wait()).backend.url[-1])
    assert "".join(picked) == "1231231"
    router.release(router.routes[1])
    router.release(router.routes[1])
    assert (await router.wait()).backend == BACKENDS[1]


async def test_a_retry_goes_elsewhere(router: Router) -> None:
    first = await router.wait()
    router.release(first)
    assert (await router.wait(first)).backend == BACKENDS[1]


async def test_ten_consecutive_failures_eject_and_a_success_starts_the_count_anew(router: Router) -> None:
    route = await router.wait()
    router.release(route)
    for _ in range(EJECT_AFTER - 1):
        router.failed(route, "HTTP 500")
    router.succeeded(route)
    for _ in range(EJECT_AFTER - 1):
        router.failed(route, "HTTP 429", busy=True)
    assert not route.ejected
    router.failed(route, "HTTP 500")
    assert route.ejected
    assert (await router.wait()).backend == BACKENDS[1]
    router.succeeded(route)  # an answer that was still under way
    assert not route.ejected
    assert (await router.wait()).backend == BACKENDS[0]


async def test_nobody_listens_needs_no_ten_proofs(router: Router) -> None:
    route = await router.wait()
    router.failed(route, "refused", gone=True)
    assert route.ejected


async def test_with_all_down_the_least_loaded_of_all_is_asked(router: Router) -> None:
    await router.wait()
    for route, in_flight in zip(router.routes, (2, 1, 1), strict=True):
        router.failed(route, "refused", gone=True)
        route.window.in_flight = in_flight
    assert (await router.wait()).backend == BACKENDS[1]
    assert router.dark
    router.succeeded(router.routes[2])
    assert (await router.wait()).backend == BACKENDS[2]
    assert not router.dark


@pytest.mark.parametrize("away_s", [0.5, 5, 30, 200, 580])
def test_a_server_that_was_away_is_found_after_a_tenth_of_that_at_most(away_s: float) -> None:
    looks = itertools.accumulate(routing.pauses())
    found_s = next(at for at in looks if at >= away_s)
    assert found_s - away_s <= max(routing.PROBE_FIRST_S, 0.1 * away_s + 1)
    assert sum(1 for _ in itertools.takewhile(lambda at: at < 86_400, itertools.accumulate(routing.pauses()))) < 1_600


async def test_an_ejected_server_that_answers_again_is_on_probation(
    router: Router, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(routing, "PROBE_FIRST_S", 0.01)
    async with FakeServer() as server:
        router = Router(lambda: [server.backend, BACKENDS[1]], unreachable_s=60.0)
        route = await router.wait()
        router.failed(route, "refused", gone=True)
        while route.ejected:
            await asyncio.sleep(0.01)
        router.failed(route, "HTTP 500")
        assert route.ejected, "the first failure after the probe"
        while route.ejected:
            await asyncio.sleep(0.01)
        router.succeeded(route)
        router.failed(route, "HTTP 500")
        assert not route.ejected
        await router.close()


@pytest.mark.parametrize(("fault", "name"), [("server_error", "500"), ("rate_limited", "429")])
async def test_a_server_that_refuses_everything_is_left_alone(fault: str, name: str) -> None:
    """A broken server answers fastest, and would be the least loaded for ever."""
    bad = ServerOptions(faults=Faults(**{fault: 1.0}, retry_after_s=0.001))  # type: ignore[arg-type]
    async with FakeServer(bad) as broken, FakeServer() as sound:
        backends = [broken.backend, sound.backend]
        async with Client(lambda: backends, retries=Retries(base_s=0.001), max_in_flight=4) as client:
            for _ in range(60):
                assert isinstance(await client.post("/v1/completions", BODY), Reply), name
        assert broken.stats.requests == EJECT_AFTER
        assert sound.stats.answered == 60


async def test_an_outage_costs_no_request_its_retries() -> None:
    async with FakeServer() as server:
        gone = server.backend
    retries = Retries(attempts=1, base_s=0.001, unreachable_s=0.3)
    async with Client(lambda: [gone], retries=retries) as client:
        with pytest.raises(ServerError, match="no server answered"):
            await client.post("/v1/completions", BODY)


async def test_too_many_requests_alone_never_count_as_an_outage() -> None:
    busy = ServerOptions(faults=Faults(rate_limited=1.0, retry_after_s=0.02))
    retries = Retries(attempts=5, base_s=0.0001, cap_s=0.001, unreachable_s=0.15)
    async with FakeServer(busy) as server, Client(lambda: [server.backend], retries=retries) as client:
        outcome = await client.post("/v1/completions", BODY)
    assert isinstance(outcome, Broken)
    assert (outcome.status, outcome.attempts) == (429, 21)


async def test_the_client_tells_what_each_server_has() -> None:
    async with FakeServer() as one, FakeServer(ServerOptions(faults=Faults(reset=1.0))) as two:
        retries = Retries(base_s=0.001)
        async with Client(lambda: [two.backend, one.backend], retries=retries) as client:
            for _ in range(3):
                await client.post("/v1/completions", BODY)
            load = client.load()
    assert load[one.url].answered == 3
    assert load[two.url].answered == 0
    assert {entry.in_flight for entry in load.values()} == {0}


async def test_servers_share_what_the_system_allows() -> None:
    backends = BACKENDS[:1]
    router = Router(lambda: tuple(backends), unreachable_s=60.0, max_in_flight=8, connections=12)
    router.release(await router.wait())
    assert [r.window.maximum for r in router.routes] == [8]
    backends[:] = BACKENDS[:2]
    router.failed(router.routes[0], "HTTP 500")  # after a failure the list is read anew
    router.release(await router.wait())
    assert [r.window.maximum for r in router.routes] == [6, 6]
    assert router.limit == 12
    await router.close()


def test_the_system_is_asked_for_connections_once() -> None:
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (512, before[1]))
        assert allow_connections(100) == 100
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == 512
        assert allow_connections(1000) == min(1000, before[1] - 256)
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > 512
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


# --- what shares a prefix ---


def fill(router: Router, *numbers: int) -> None:
    """So many in flight at each."""
    for route, number in zip(router.routes, numbers, strict=True):
        route.window.in_flight = number


async def waits(router: Router, near: Affinity | None = None) -> asyncio.Task[Route]:
    waiting = asyncio.create_task(router.wait(None, near))
    await asyncio.sleep(0)
    assert not waiting.done()
    return waiting


async def test_what_shares_a_prefix_goes_where_the_first_went(router: Router) -> None:
    near = Affinity()
    first = await router.wait(None, near)
    assert [await router.wait(None, near) for _ in range(5)] == [first] * 5
    assert (await router.wait(None, Affinity())) is not first


async def test_it_waits_for_that_server_and_those_that_share_nothing_do_not(router: Router) -> None:
    near = Affinity()
    home = await router.wait(None, near)
    full = home.window.limit
    fill(router, full, full - 1, full)
    waiting = await waits(router, near)
    other = await router.wait()
    assert other is router.routes[1]
    patient = await waits(router)
    router.release(other)
    assert await patient is other
    assert not waiting.done()
    late = await waits(router)
    router.release(home)
    assert await waiting is home
    assert not late.done(), "a place at home is for those who wait for it, whoever came first"
    router.release(home)
    assert await late is home
    assert router.waiting == 0


async def test_who_is_half_idle_helps(router: Router) -> None:
    near = Affinity()
    home = await router.wait(None, near)
    full = home.window.limit
    fill(router, full, full // 2, full)
    waiting = [await waits(router, near) for _ in range(2)]
    router.release(router.routes[1])
    assert await waiting[0] is router.routes[1]
    await asyncio.sleep(0)
    assert not waiting[1].done()
    assert near.route is home
    fill(router, full, 0, full)
    assert await router.wait(None, Affinity()) is router.routes[1]
    router.release(home)
    assert await waiting[1] is home


async def test_it_goes_elsewhere_together_when_its_server_fails(router: Router) -> None:
    near = Affinity()
    home = await router.wait(None, near)
    full = home.window.limit
    fill(router, full, full - 3, full - 1)
    waiting = [await waits(router, near) for _ in range(3)]
    router.failed(home, "refused", gone=True)
    assert [await one for one in waiting] == [router.routes[1]] * 3
    assert near.route is router.routes[1]


async def test_a_retry_takes_the_rest_along(router: Router) -> None:
    near = Affinity()
    home = await router.wait(None, near)
    elsewhere = await router.wait(home, near)
    assert elsewhere is not home
    assert await router.wait(None, near) is elsewhere


async def test_who_waits_for_a_server_that_is_taken_away_takes_any(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routing, "REFRESH_S", 0.0)
    backends = list(BACKENDS)
    router = Router(lambda: tuple(backends), unreachable_s=60.0)
    near = Affinity()
    home = await router.wait(None, near)
    full = home.window.limit
    fill(router, full, full, full)
    waiting = [await waits(router, near), await waits(router)]
    waiting.insert(1, await waits(router, near))
    del backends[0]
    router.release(home)
    fill(router, full - 1, full)
    router.release(router.routes[1])
    assert await waiting[0] is router.routes[0]
    router.release(router.routes[0])
    assert await waiting[1] is router.routes[0]
    assert near.route is router.routes[0]
    router.release(router.routes[1])
    assert await waiting[2] is router.routes[1]
    await router.close()


async def test_who_stops_waiting_for_its_server_is_passed_over(router: Router) -> None:
    near = Affinity()
    home = await router.wait(None, near)
    full = home.window.limit
    fill(router, full, full, full)
    waiting = [await waits(router, near) for _ in range(2)]
    waiting[0].cancel()
    await asyncio.gather(waiting[0], return_exceptions=True)
    router.release(home)
    assert await waiting[1] is home
    assert home.window.in_flight == full
