"""A server's own metrics steer its window while it is busy; whatever goes wrong with them costs nothing."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence

import pytest
from aiohttp import web

from proctor.infer import flights
from proctor.infer.client import Client, Reply, Retries
from proctor.infer.concurrency import START
from proctor.infer.server import Load
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
        assert client.wanted > 0
        await asyncio.sleep(0.3)
        assert server.gets["/metrics"] == 0
