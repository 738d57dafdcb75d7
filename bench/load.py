"""What the mock server can do at most: raw requests over kept connections, nothing parsed but the answer's length.

`python -m bench.load` starts a mock of its own (or asks --url) and prints requests a second, and the CPU that the
generator and the server spend on each request. A client measured against the mock is bound by the server only where
it comes near these numbers.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from pathlib import Path
from typing import Any, Final, cast
from urllib.parse import urlsplit
from urllib.request import urlopen

from bench.mock_server import CHAT, COMPLETIONS, MODEL, content_length, cpu_seconds, fastest_loop, started

WORDS: Final = "The capital of France is Paris, the capital of Italy is Rome, the capital of Spain is Madrid. " * 4


def request_body(route: str, number: int, *, ids: bool = True) -> dict[str, Any]:
    """A request of about a hundred tokens, different for each number, with the fields that Proctor sends."""
    prompt = f"Question {number}. {WORDS}Answer:"
    asked = {"messages": [{"role": "user", "content": prompt}]} if route == CHAT else {"prompt": prompt}
    fields: dict[str, Any] = {"model": MODEL, "max_tokens": 16, "temperature": 0.0, "top_p": 1.0, "stop": ["\n\n"]}
    fields |= {"presence_penalty": 0.0, "frequency_penalty": 0.0, "n": 1, "stream": False}
    return fields | asked | ({"return_token_ids": True} if ids else {})


class Asker(asyncio.Protocol):
    """One connection that asks again as soon as it is answered."""

    def __init__(self, work: Work) -> None:
        self._work = work
        self._buffer = b""
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._ask()

    def data_received(self, data: bytes) -> None:
        self._buffer = self._buffer + data if self._buffer else data
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0 or len(self._buffer) < end + 4 + (content_length(self._buffer[:end]) or 0):
            return
        self._work.answered(self._buffer.startswith(b"HTTP/1.1 200"))
        self._buffer = b""
        self._ask()

    def connection_lost(self, exc: Exception | None) -> None:
        self._work.lost(exc)

    def _ask(self) -> None:
        assert self._transport is not None
        data = self._work.next()
        if data is None:
            self._transport.close()
        else:
            self._transport.write(data)


class Work:
    """What is left to ask, over all connections."""

    def __init__(self, url: str, route: str, requests: int) -> None:
        self._left = requests
        self._open = requests
        self.failed = 0
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        body = json.dumps(request_body(route, 0)).encode()
        host = urlsplit(url).netloc
        head = f"POST {route} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        self._request = head.encode() + b"Content-Length: %d\r\n\r\n" % len(body) + body

    def next(self) -> bytes | None:
        """The next request, or None when all are sent."""
        if self._left == 0:
            return None
        self._left -= 1
        return self._request

    def answered(self, good: bool) -> None:
        self._open -= 1
        self.failed += not good
        if self._open == 0 and not self.done.done():
            self.done.set_result(None)

    def lost(self, error: Exception | None) -> None:
        if self._open and (error is not None or self._left) and not self.done.done():
            self.done.set_exception(error or ConnectionError("the server closed a connection"))


async def hammer(url: str, route: str, requests: int, in_flight: int) -> dict[str, float]:
    """Ask `requests` times over `in_flight` connections; rates, and milliseconds of CPU a request of both sides."""
    host, port = urlsplit(url).hostname or "", urlsplit(url).port or 80
    loop = asyncio.get_running_loop()
    work = Work(url, route, requests)
    before = await asyncio.to_thread(server_stats, url)
    mine, start = cpu_seconds(), time.perf_counter()
    for _ in range(in_flight):
        await loop.create_connection(lambda: Asker(work), host, port)
    await work.done
    took = time.perf_counter() - start
    used, after = cpu_seconds() - mine, await asyncio.to_thread(server_stats, url)
    if work.failed or after["answered"] - before["answered"] != requests:
        raise SystemExit(f"{work.failed} of {requests} requests were not answered with 200")
    return {
        "requests_per_s": requests / took,
        "client_ms": 1000 * used / requests,
        "server_ms": 1000 * (after["cpu_s"] - before["cpu_s"]) / requests,
    }


def server_stats(url: str) -> dict[str, float]:
    """What the mock has answered, and the CPU seconds that it took."""
    with urlopen(f"{url}/stats") as answer:
        return cast("dict[str, float]", json.load(answer))


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--url", help="a mock that runs already (default: start one)")
    parser.add_argument("--requests", type=int, default=50_000)
    parser.add_argument("--in-flight", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--route", choices=("chat", "completions"), nargs="+", default=["chat", "completions"])
    parser.add_argument("--json", type=Path, help="write the numbers here")
    options = parser.parse_args()
    results: dict[str, dict[str, float]] = {}
    with started() as mock, asyncio.Runner(loop_factory=fastest_loop()) as runner:
        for route in options.route:
            path = CHAT if route == "chat" else COMPLETIONS
            for in_flight in options.in_flight:
                found = runner.run(hammer(options.url or mock.url, path, options.requests, in_flight))
                results[f"{route} {in_flight}"] = found
                print(f"{route:12}{in_flight:6}  " + "  ".join(f"{k} {v:,.3f}" for k, v in found.items()), flush=True)
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
