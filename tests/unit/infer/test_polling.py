"""A server's own metrics steer its window while it is busy; whatever goes wrong with them costs nothing."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from contextlib import AsyncExitStack
from typing import Any

import pytest
from aiohttp import web

from proctor.errors import ServerError
from proctor.infer import flights
from proctor.infer.client import Broken, Client, Reply, Retries
from proctor.infer.concurrency import START
from proctor.infer.server import Backend, Load
from proctor.testing import FakeServer, Latency, ServerOptions
from proctor.testing.options import MetricsOf

SLOTS = 4


class Watched(FakeServer):
    """Counts what is asked beside completions, and answers /metrics as told."""

    def __init__(self, metrics: MetricsOf = "", *, says: web.Response | None = None, stalls: bool = False) -> None:
        super().__init__(ServerOptions(latency=Latency(fixed_s=0.02, slots=SLOTS), metrics=metrics))
        self.gets: Counter[str] = Counter()
        self._says = says
        self._stalls = stalls

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        if request.method == "GET":
            self.gets[request.path] += 1
            if self._stalls:
                await asyncio.sleep(60)
        return await super()._handle(request)

    def _about(self, path: str) -> web.Response:
        if path == "/metrics" and self._says is not None:
            return web.Response(status=self._says.status, body=self._says.body)
        return super()._about(path)


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flights, "POLL_FIRST_S", 0.05)
    monkeypatch.setattr(flights, "POLL_S", 0.05)
    monkeypatch.setattr(flights, "GLIMPSE_S", 0.0)
    monkeypatch.setattr(flights, "POLL_TIMEOUT_S", 0.1)


async def ask(servers: Sequence[FakeServer], count: int) -> dict[str, Load]:
    """Ask all at once; the load when the last but a few was answered."""
    left = count
    load: dict[str, Load] = {}

    async with Client(lambda: [s.backend for s in servers], retries=Retries(base_s=0.001)) as client:

        async def one(number: int) -> None:
            nonlocal left, load
            body = {"prompt": f"Question {number}:", "max_tokens": 4, "temperature": 0}
            assert isinstance(await client.post("/v1/completions", body), Reply)
            left -= 1
            if left == 32:
                load = client.load()

        await asyncio.gather(*(one(n) for n in range(count)))
    return load


class Leaving:
    """Takes requests, then stops listening, and leaves what is open without a word: a vLLM that was told to end."""

    async def __aenter__(self) -> Leaving:
        self._open: list[asyncio.StreamWriter] = []
        self.asked = 0
        self._server = await asyncio.start_server(self._take, "127.0.0.1", 0)
        self.backend = Backend(url=f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}")
        return self

    async def __aexit__(self, *_: object) -> None:
        self.leave()
        for writer in self._open:
            writer.transport.abort()

    def leave(self) -> None:
        self._server.close()

    async def _take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        line = await reader.readline()
        if line.startswith(b"GET"):
            writer.close()
            return
        self._open.append(writer)
        self.asked += 1


async def post(client: Client) -> Reply | Broken:
    return await client.post("/v1/completions", {"prompt": "Hi", "max_tokens": 2, "temperature": 0})


async def test_what_a_server_left_open_is_asked_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flights, "GONE_S", 0.3)
    async with Leaving() as leaving, FakeServer() as other:
        backends = [leaving.backend]
        async with Client(lambda: tuple(backends), retries=Retries(base_s=0.001)) as client:
            asking = [asyncio.create_task(post(client)) for _ in range(5)]
            while leaving.asked < len(asking):
                await asyncio.sleep(0.01)
            backends.append(other.backend)
            leaving.leave()
            replies = await asyncio.wait_for(asyncio.gather(*asking), 10)
    assert [isinstance(r, Reply) and r.attempts for r in replies] == [2] * len(asking)


async def test_a_server_that_nobody_runs_any_more_is_given_up_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flights, "GONE_S", 0.3)
    async with Leaving() as leaving:
        async with Client(lambda: (leaving.backend,), retries=Retries(base_s=0.001, unreachable_s=0.3)) as client:
            asking = asyncio.create_task(post(client))
            while not leaving.asked:
                await asyncio.sleep(0.01)
            leaving.leave()
            with pytest.raises(ServerError, match=r"no server answered.*(refused|Connect|listens)"):
                await asyncio.wait_for(asking, 10)


async def test_a_server_that_is_away_for_a_moment_keeps_what_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """It stops listening, and answers all the same, as servers do that end in good order."""
    monkeypatch.setattr(flights, "GONE_S", 30.0)
    async with FakeServer(ServerOptions(latency=Latency(fixed_s=0.5))) as server:
        async with Client(lambda: (server.backend,)) as client:
            asking = asyncio.create_task(post(client))
            await asyncio.sleep(0.2)
            await server.stop_listening()
            reply = await asking
    assert isinstance(reply, Reply)
    assert reply.attempts == 1


@pytest.mark.parametrize("metrics", ["vllm", "sglang", "llama.cpp"])
async def test_a_server_that_tells_its_queue_gets_little_more_than_it_has_slots(metrics: MetricsOf) -> None:
    async with Watched(metrics) as server:
        load = (await ask([server], 250))[server.url]
        # Without the server's word it would not be below the start so soon.
        assert SLOTS / 2 <= load.limit < START
        assert load.waiting is not None
        assert load.why
        assert server.gets["/metrics"] >= 5


async def test_a_server_with_room_is_full_before_its_first_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flights, "GLIMPSE_S", 0.25)
    latency = Latency(fixed_s=2.0, slots=1024)
    async with FakeServer(ServerOptions(latency=latency, metrics="vllm")) as server:
        async with Client(lambda: [server.backend]) as client, asyncio.TaskGroup() as group:
            body = {"prompt": "Question:", "max_tokens": 4, "temperature": 0}
            asking = [group.create_task(client.post("/v1/completions", body)) for _ in range(300)]
            in_flight = 0
            while in_flight < 256:
                await asyncio.sleep(0.02)
                in_flight = client.load()[server.url].in_flight
                assert not any(one.done() for one in asking)


async def test_a_server_without_metrics_is_asked_for_them_once() -> None:
    async with Watched(says=web.Response(status=404)) as server:
        await ask([server], 100)
        assert server.gets["/metrics"] == 1


@pytest.mark.parametrize(
    "says",
    [
        web.Response(status=500),
        web.Response(body=b"\xff\xfe{"),
        web.Response(body=b"vllm:num_requests_waiting{} many\n"),
    ],
    ids=["500", "garbage", "no number"],
)
async def test_useless_metrics_are_asked_for_less_and_less(says: web.Response) -> None:
    async with Watched(says=says) as server:
        load = (await ask([server], 150))[server.url]
        assert load.waiting is None
        assert 1 <= server.gets["/metrics"] <= 8, "after 0.05, 0.1, 0.2, ... seconds"
        assert server.stats.answered == 150


async def test_metrics_that_never_come_hold_nothing_up() -> None:
    async with Watched("vllm", stalls=True) as server:
        await ask([server], 100)
        assert server.stats.answered == 100
        assert server.gets["/metrics"] >= 1


async def test_an_idle_server_is_not_asked() -> None:
    async with Watched("vllm") as server, Client(lambda: [server.backend]) as client:
        assert client.wanted() > 0
        await asyncio.sleep(0.3)
        assert server.gets["/metrics"] == 0


@pytest.mark.parametrize(("servers", "least", "most"), [(1, 0, 5), (2, 6, 100)])
async def test_stragglers_are_looked_for_only_where_another_server_could_be_asked(
    monkeypatch: pytest.MonkeyPatch, servers: int, least: int, most: int
) -> None:
    """With one server nothing could be done about them, and each look takes something from whoever shares the core."""
    looks = 0
    wait_for = asyncio.wait_for

    async def counted(awaitable: Any, timeout: float) -> Any:
        nonlocal looks
        looks += 1
        return await wait_for(awaitable, timeout)

    slow = [FakeServer(ServerOptions(latency=Latency(fixed_s=0.5))) for _ in range(servers)]
    async with AsyncExitStack() as stack:
        for server in slow:
            await stack.enter_async_context(server)
        client = await stack.enter_async_context(Client(lambda: [s.backend for s in slow]))
        asking = asyncio.create_task(client.post("/v1/completions", {"prompt": "Question:", "max_tokens": 4}))
        await asyncio.sleep(0.05)
        client.tail()
        monkeypatch.setattr(flights.asyncio, "wait_for", counted)
        assert isinstance(await asking, Reply)
        assert least <= looks <= most
