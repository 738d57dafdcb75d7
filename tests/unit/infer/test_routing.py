"""Which server is asked, when one is given up, and when it is asked again: eval-hive's policy, and what differs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from proctor.errors import ServerError
from proctor.infer import routing
from proctor.infer.client import Broken, Client, Reply, Retries, allow_connections
from proctor.infer.routing import EJECT_AFTER, PROBE_LONGEST_S, Router
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
