"""Several servers: a slow one, one that stalls, one that dies and comes back; and second copies of stragglers."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from contextlib import AsyncExitStack

import pytest

from proctor.infer import flights, routing
from proctor.infer.client import Broken, Client, Reply, Retries, Timeouts
from proctor.infer.concurrency import START
from proctor.testing import FakeServer, Faults, Latency, ServerOptions, prompt_digest

QUICK = Retries(attempts=5, base_s=0.002, cap_s=0.02)


def body(number: int) -> dict[str, object]:
    return {"prompt": f"Question {number}:", "max_tokens": 8, "temperature": 0}


def asked(number: int, servers: Sequence[FakeServer]) -> int:
    """How often a prompt arrived, over all servers."""
    return sum(server.stats.prompts[prompt_digest(f"Question {number}:")] for server in servers)


async def ask_all(client: Client, numbers: Sequence[int], *, hedge: bool) -> list[Reply | Broken]:
    async def ask(number: int) -> Reply | Broken:
        return await client.post("/v1/completions", body(number), hedge=hedge)

    return await asyncio.gather(*(ask(n) for n in numbers))


async def right_answers(count: int) -> list[object]:
    async with FakeServer() as server, Client(lambda: [server.backend]) as client:
        return [r.value["choices"] for r in await ask_all(client, range(count), hedge=False) if isinstance(r, Reply)]


async def test_a_slow_server_gets_only_what_it_can_do() -> None:
    options = ServerOptions(latency=Latency(fixed_s=0.02, slots=4), metrics="vllm")
    async with FakeServer(options) as fast, FakeServer(options) as slow:
        slow.slowness = 8.0
        backends = [slow.backend, fast.backend]
        async with Client(lambda: backends, max_in_flight=8) as client:
            replies = await ask_all(client, range(400), hedge=False)
            load = client.load()
    assert all(isinstance(r, Reply) for r in replies)
    assert fast.stats.answered + slow.stats.answered == 400
    assert fast.stats.answered > 3 * slow.stats.answered
    assert load[fast.url].limit <= 8


@pytest.mark.parametrize("early", [True, False], ids=["before it is entered", "while it asks"])
async def test_a_client_may_be_allowed_less_for_a_while_and_never_more_than_its_maximum(early: bool) -> None:
    async with FakeServer(ServerOptions(latency=Latency(fixed_s=0.01))) as server:
        client = Client(lambda: [server.backend], max_in_flight=6)
        if early:
            client.allow(2)
        async with client:
            if not early:
                await ask_all(client, range(10), hedge=False)
                server.stats.max_in_flight = 0
                client.allow(2)
            await ask_all(client, range(100, 140), hedge=False)
            assert server.stats.max_in_flight == 2
            client.allow(100)
            await ask_all(client, range(200, 900), hedge=False)
            assert server.stats.max_in_flight == 6


async def test_requests_wait_in_order_of_arrival() -> None:
    order: list[int] = []
    async with (
        FakeServer(ServerOptions(latency=Latency(fixed_s=0.005))) as server,
        Client(lambda: [server.backend], max_in_flight=1) as client,
    ):

        async def ask(number: int) -> None:
            await client.post("/v1/completions", body(number))
            order.append(number)

        await asyncio.gather(*(ask(n) for n in range(12)))
    assert order == list(range(12))


async def test_who_stops_waiting_leaves_its_place() -> None:
    async with (
        FakeServer(ServerOptions(latency=Latency(fixed_s=0.05))) as server,
        Client(lambda: [server.backend], max_in_flight=1) as client,
    ):
        tasks = [asyncio.create_task(client.post("/v1/completions", body(n))) for n in range(5)]
        await asyncio.sleep(0.01)
        for task in tasks[:4]:
            task.cancel()
        assert isinstance(await tasks[4], Reply)
        await asyncio.gather(*tasks, return_exceptions=True)
        assert client.load()[server.url].in_flight == 0


async def test_the_limit_is_the_sum_over_the_servers_that_work() -> None:
    async with FakeServer() as one, FakeServer(ServerOptions(faults=Faults(reset=1.0))) as two:
        client = Client(lambda: [one.backend, two.backend], retries=QUICK, max_in_flight=100)
        assert client.wanted() == START
        async with client:
            assert client.wanted() == 2 * START
            await ask_all(client, range(40), hedge=False)
            assert client.load()[two.url].why.startswith("ejected: ")
            assert client.wanted() == client.load()[one.url].limit


@pytest.mark.parametrize("hedge", [True, False])
async def test_a_straggler_at_the_end_is_asked_elsewhere_if_it_may_be(hedge: bool) -> None:
    """One of the servers stalls for a minute, now and then; the time-out is ten."""
    stalling = ServerOptions(faults=Faults(stall=0.2, stall_s=2.0, seed=2), latency=Latency(fixed_s=0.01))
    expected = await right_answers(60)
    async with FakeServer(stalling) as one, FakeServer(ServerOptions(latency=Latency(fixed_s=0.01))) as two:
        backends = [one.backend, two.backend]
        async with Client(lambda: backends, retries=QUICK) as client:
            asking = asyncio.create_task(ask_all(client, range(60), hedge=hedge))
            await asyncio.sleep(0)
            client.tail()
            replies = await asking
            load = client.load()
        assert [r.value["choices"] for r in replies if isinstance(r, Reply)] == expected
        stalled = one.stats.faults["stall"]
        assert stalled > 0
        # On a busy machine others may look like stragglers too.
        assert load[two.url].hedged >= stalled if hedge else load[two.url].hedged == 0
        assert sum(r.attempts == 2 for r in replies) == (load[one.url].hedged + load[two.url].hedged)
        assert max(asked(n, [one, two]) for n in range(60)) == (2 if hedge else 1)
        assert {entry.in_flight for entry in load.values()} == {0}


async def test_nothing_is_asked_twice_before_the_end_or_of_one_server_alone() -> None:
    stalling = ServerOptions(faults=Faults(stall=0.2, stall_s=0.6, seed=2))
    async with FakeServer(stalling) as one, FakeServer() as two:
        for backends, ending in (([one.backend, two.backend], False), ([one.backend], True)):
            async with Client(lambda found=backends: found) as client:
                asking = asyncio.create_task(ask_all(client, range(30), hedge=True))
                await asyncio.sleep(0)
                client.tail(ending)
                assert all(isinstance(r, Reply) for r in await asking)
                assert {entry.hedged for entry in client.load().values()} == {0}


async def test_a_copy_that_fails_leaves_the_first_to_answer() -> None:
    stalling = ServerOptions(faults=Faults(stall=1.0, stall_s=0.5))
    broken = ServerOptions(faults=Faults(truncated=1.0))
    async with FakeServer(stalling) as one, FakeServer(broken) as two:
        async with Client(lambda: [one.backend, two.backend], retries=QUICK) as client:
            router, watch = client._entered or pytest.fail("entered")  # type: ignore[misc]
            await router.wait()  # the second copy must not be the first choice
            router.release(router.routes[0])
            for _ in range(flights.HEDGE_KNOWN):
                watch.landed(("/v1/completions", 8), 0.01)
            client.tail()
            reply = await client.post("/v1/completions", body(0), hedge=True)
            assert isinstance(reply, Reply)
            assert client.load()[two.url].hedged == 1
            assert (one.stats.requests, two.stats.requests) == (1, 1)


async def test_an_abandoned_request_takes_its_copy_with_it() -> None:
    stalling = ServerOptions(faults=Faults(stall=1.0))
    async with FakeServer(stalling) as one, FakeServer(stalling) as two:
        async with Client(lambda: [one.backend, two.backend]) as client:
            _, watch = client._entered or pytest.fail("entered")  # type: ignore[misc]
            for _ in range(flights.HEDGE_KNOWN):
                watch.landed(("/v1/completions", 8), 0.01)
            client.tail()
            asking = asyncio.create_task(client.post("/v1/completions", body(0), hedge=True))
            while two.stats.requests == 0:
                await asyncio.sleep(0.01)
            asking.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asking
            while any(entry.in_flight for entry in client.load().values()):
                await asyncio.sleep(0.01)
            assert watch.flights == set()


async def test_a_request_that_runs_out_of_time_is_cut_off_and_sent_elsewhere() -> None:
    async with FakeServer(ServerOptions(faults=Faults(stall=1.0, stall_s=60.0))) as one, FakeServer() as two:
        async with Client(lambda: [one.backend, two.backend], retries=QUICK, timeouts=Timeouts(request=0.2)) as client:
            reply = await client.post("/v1/completions", body(0))
            assert isinstance(reply, Reply)
            assert reply.attempts == 2
            assert client.load()[one.url].why == "cut: time-outs"


async def test_one_of_two_becomes_slow_then_dies_then_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routing, "PROBE_FIRST_S", 0.05)
    count = 900
    expected = await right_answers(count)
    options = ServerOptions(latency=Latency(fixed_s=0.02, slots=8), metrics="vllm")
    servers: list[FakeServer] = []

    async def show(client: Client) -> None:
        async with AsyncExitStack() as second:
            servers.append(await second.enter_async_context(FakeServer(options, port=port)))
            await answered(0.25)
            servers[-1].slowness = 5.0
            await answered(0.5)
        before = servers[0].stats.answered
        while servers[0].stats.answered < before + 50:
            await asyncio.sleep(0.01)
        async with FakeServer(options, port=port) as again:
            servers.append(again)
            await finished.wait()

    async def answered(share: float) -> None:
        while sum(s.stats.answered for s in servers) < share * count:
            await asyncio.sleep(0.005)

    finished = asyncio.Event()
    async with FakeServer(options) as placeholder:
        port = int(placeholder.url.rpartition(":")[2])
        other = placeholder.backend
    async with FakeServer(options) as one:
        servers.append(one)
        async with Client(lambda: [one.backend, other], retries=QUICK) as client:
            showing = asyncio.create_task(show(client))
            replies = await ask_all(client, range(count), hedge=True)
            finished.set()
            await showing
    assert [r.value["choices"] for r in replies if isinstance(r, Reply)] == expected
    assert max(asked(n, servers) for n in range(count)) <= 1 + QUICK.attempts
    assert sum(r.attempts for r in replies) <= count + 200, "what was in flight when it died, and little else"
    assert servers[1].stats.answered > 100
    assert servers[2].stats.answered > 20, "it is asked again"


@pytest.mark.parametrize("seed", range(3))
async def test_no_place_is_lost_whatever_happens(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Faults of all kinds, copies, callers that give up: at the end nothing is in flight and nobody waits."""
    monkeypatch.setattr(routing, "PROBE_FIRST_S", 0.02)
    monkeypatch.setattr(flights, "HEDGE_LEAST_S", 0.0)
    drawn = random.Random(seed)
    faults = Faults(
        rate_limited=0.1, server_error=0.1, reset=0.1, truncated=0.1, stall=0.02, retry_after_s=0.01, seed=seed
    )
    latency = Latency(lognormal_s=0.01, sigma=1.0, slots=4)
    async with AsyncExitStack() as stack:
        servers = [
            await stack.enter_async_context(FakeServer(ServerOptions(faults=faults, latency=latency))) for _ in range(3)
        ]
        client = Client(
            lambda: [s.backend for s in servers], retries=QUICK, timeouts=Timeouts(request=0.3), max_in_flight=8
        )
        async with client:
            router, watch = client._entered or pytest.fail("entered")  # type: ignore[misc]

            async def ask(number: int) -> Reply | Broken:
                await asyncio.sleep(drawn.uniform(0, 0.2))
                return await client.post("/v1/completions", body(number), hedge=drawn.random() < 0.7)

            tasks = [asyncio.create_task(ask(n)) for n in range(300)]
            client.tail()
            for task in drawn.sample(tasks, 60):
                await asyncio.sleep(drawn.uniform(0, 0.02))
                task.cancel()
            outcomes = await asyncio.gather(*tasks, return_exceptions=True)
            while any(entry.in_flight for entry in client.load().values()):
                await asyncio.sleep(0.01)
            assert router.waiting == 0
            assert watch.flights == set()
    kinds = {type(outcome) for outcome in outcomes}
    assert kinds <= {Reply, Broken, asyncio.CancelledError}
    assert sum(isinstance(outcome, Reply) for outcome in outcomes) > 150
    assert max(asked(n, servers) for n in range(300)) <= 1 + 4 * QUICK.attempts
