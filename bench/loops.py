"""One client library in a loop, as bare as it goes: post bytes, read bytes, no JSON. A program of its own per run.

`python -m bench.loops --client aiohttp --url URL --route chat --in-flight 256 --requests 20000` prints one line of
JSON: requests a second, and the milliseconds of CPU that this whole process, all threads, spent on each request.
Connections are opened and code is warmed up before the clock starts.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, Final, cast
from urllib.parse import urlsplit

from bench.load import request_body
from bench.mock_server import CHAT, COMPLETIONS, content_length, cpu_seconds

Post = Callable[[str, bytes], Awaitable[int]]
"""Posts a body to a URL, reads the answer, returns its status."""
HEADERS: Final = {"Content-Type": "application/json"}
VARIETY: Final = 256
"""Different bodies that the loop sends in turn."""


@asynccontextmanager
async def aiohttp_post(in_flight: int) -> AsyncGenerator[Post]:
    """aiohttp as a careful user has it, with all off that costs and is not needed: what `proctor.infer.origin` does."""
    import aiohttp
    from yarl import URL

    del in_flight
    urls: dict[str, URL] = {}
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=3.0),
        cookie_jar=aiohttp.DummyCookieJar(),
        headers=HEADERS | {"Accept": "*/*", "Accept-Encoding": "identity", "User-Agent": "bench"},
        timeout=aiohttp.ClientTimeout(total=None, connect=10.0),
    ) as session:

        async def post(url: str, data: bytes) -> int:
            if url not in urls:
                urls[url] = URL(url)
            response = await session.post(urls[url], data=data, allow_redirects=False)
            await response.read()
            return response.status

        yield post


@asynccontextmanager
async def aiohttp_plain_post(in_flight: int) -> AsyncGenerator[Post]:
    """aiohttp as its documentation shows it."""
    import aiohttp

    del in_flight
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def post(url: str, data: bytes) -> int:
            async with session.post(url, data=data, headers=HEADERS) as response:
                await response.read()
            return response.status

        yield post


@asynccontextmanager
async def httpx_post(in_flight: int) -> AsyncGenerator[Post]:
    import httpx

    limits = httpx.Limits(max_connections=in_flight, max_keepalive_connections=in_flight)
    async with httpx.AsyncClient(limits=limits, timeout=600.0) as client:

        async def post(url: str, data: bytes) -> int:
            return (await client.post(url, content=data, headers=HEADERS)).status_code

        yield post


@asynccontextmanager
async def pyreqwest_post(in_flight: int) -> AsyncGenerator[Post]:
    from pyreqwest.client import ClientBuilder

    builder = ClientBuilder().max_connections(in_flight).pool_max_idle_per_host(in_flight)
    async with builder.default_headers(HEADERS).build() as client:

        async def post(url: str, data: bytes) -> int:
            response = await client.post(url).body_bytes(data).build().send()
            await response.bytes()
            return response.status

        yield post


@asynccontextmanager
async def primp_post(in_flight: int) -> AsyncGenerator[Post]:
    import primp

    del in_flight
    async with primp.AsyncClient(headers=HEADERS, timeout=600) as client:

        async def post(url: str, data: bytes) -> int:
            response = await client.post(url, content=data)
            _ = response.content
            return response.status_code

        yield post


@asynccontextmanager
async def wreq_post(in_flight: int) -> AsyncGenerator[Post]:
    import wreq

    client = wreq.Client(pool_max_idle_per_host=in_flight)

    async def post(url: str, data: bytes) -> int:
        response = await client.post(url, body=data, headers=HEADERS)
        await response.bytes()
        return response.status.as_int()

    yield post


@asynccontextmanager
async def openai_post(in_flight: int) -> AsyncGenerator[Post]:
    """The openai SDK over aiohttp, the fastest of its transports at every concurrency that was tried."""
    import openai

    del in_flight
    known: dict[bytes, dict[str, Any]] = {}
    async with openai.AsyncOpenAI(
        base_url="http://unused/v1",
        api_key="none",
        max_retries=0,
        timeout=600.0,
        http_client=openai.DefaultAioHttpClient(),
    ) as client:

        async def post(url: str, data: bytes) -> int:
            if data not in known:
                fields = json.loads(data)
                fields["extra_body"] = {"return_token_ids": fields.pop("return_token_ids")}
                known[data] = fields
            client.base_url = url[: url.index("/v1") + 3]
            if url.endswith(CHAT):
                await client.chat.completions.create(**known[data])
            else:
                await client.completions.create(**known[data])
            return 200  # it raises for anything else

        yield post


class PooledConnection(asyncio.Protocol):
    """A connection of the hand-written client: one request at a time, its answer through a future."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self.answer: asyncio.Future[bytes] | None = None
        self._buffer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        self._buffer = self._buffer + data if self._buffer else data
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0 or len(self._buffer) < end + 4 + (content_length(self._buffer[:end]) or 0):
            return
        assert self.answer is not None
        self.answer.set_result(self._buffer)
        self._buffer = b""

    def connection_lost(self, exc: Exception | None) -> None:
        if self.answer is not None and not self.answer.done():
            self.answer.set_exception(exc or ConnectionError("the server closed a connection"))


@asynccontextmanager
async def protocol_post(in_flight: int) -> AsyncGenerator[Post]:
    """What a client written for this one purpose could reach: no proxies, no TLS, no chunks, no redirects."""
    del in_flight
    loop = asyncio.get_running_loop()
    idle: deque[PooledConnection] = deque()
    opened: list[PooledConnection] = []

    async def post(url: str, data: bytes) -> int:
        scheme, host, path = _parts(url)
        del scheme
        if idle:
            connection = idle.pop()
        else:
            name, _, port = host.partition(":")
            _, connection = await loop.create_connection(PooledConnection, name, int(port))
            opened.append(connection)
        assert connection.transport is not None
        connection.answer = loop.create_future()
        head = f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: {len(data)}"
        connection.transport.write(head.encode() + b"\r\n\r\n" + data)
        answer = await connection.answer
        idle.append(connection)
        return int(answer[9:12])

    yield post
    for connection in opened:
        assert connection.transport is not None
        connection.transport.close()


_known: dict[str, tuple[str, str, str]] = {}


def _parts(url: str) -> tuple[str, str, str]:
    if url not in _known:
        parts = urlsplit(url)
        _known[url] = (parts.scheme, parts.netloc, parts.path)
    return _known[url]


CLIENTS: Final[dict[str, Callable[[int], Any]]] = {
    "aiohttp": aiohttp_post,
    "aiohttp-plain": aiohttp_plain_post,
    "httpx": httpx_post,
    "pyreqwest": pyreqwest_post,
    "primp": primp_post,
    "wreq": wreq_post,
    "protocol": protocol_post,
    "openai": openai_post,
}


async def ask_all(post: Post, url: str, bodies: list[bytes], requests: int, in_flight: int) -> int:
    """Ask `requests` times with `in_flight` askers; how many were not answered with 200."""
    numbers = iter(range(requests))
    failed = 0

    async def asker() -> None:
        nonlocal failed
        for number in numbers:
            failed += await post(url, bodies[number % VARIETY]) != 200

    async with asyncio.TaskGroup() as group:
        for _ in range(in_flight):
            group.create_task(asker())
    return failed


async def measure(client: str, url: str, route: str, requests: int, in_flight: int) -> dict[str, float]:
    """Rates of one run. Raises SystemExit when a request fails: a failed request is cheap."""
    path = CHAT if route == "chat" else COMPLETIONS
    bodies = [json.dumps(request_body(path, number)).encode() for number in range(VARIETY)]
    async with CLIENTS[client](in_flight) as post:
        await ask_all(post, url + path, bodies, 2 * in_flight, in_flight)
        used, start = cpu_seconds(), time.perf_counter()
        failed = await ask_all(post, url + path, bodies, requests, in_flight)
        took, used = time.perf_counter() - start, cpu_seconds() - used
    if failed:
        raise SystemExit(f"{failed} of {requests} requests were not answered with 200")
    return {"requests_per_s": requests / took, "cpu_ms": 1000 * used / requests}


def main() -> None:
    """Parse, measure, print JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--client", choices=tuple(CLIENTS), default="aiohttp")
    parser.add_argument("--uvloop", action="store_true", help="run on uvloop")
    parser.add_argument("--url", required=True)
    parser.add_argument("--route", choices=("chat", "completions"), default="chat")
    parser.add_argument("--in-flight", type=int, default=256)
    parser.add_argument("--requests", type=int, default=20_000)
    options = parser.parse_args()
    factory = None
    if options.uvloop:
        import uvloop

        factory = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        found = runner.run(measure(options.client, options.url, options.route, options.requests, options.in_flight))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
