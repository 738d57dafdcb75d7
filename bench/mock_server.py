"""An OpenAI-compatible server that costs almost nothing: canned bodies behind a hand-written HTTP/1.1 protocol.

`python -m bench.mock_server --port 0 --latency-ms 50` prints its URL and serves until it is ended. uvloop and orjson
are used where the interpreter has them. It says `owned_by: vllm`, and answers as vLLM does: `usage`,
`finish_reason`, and `token_ids` where they are asked for. Every answer is the same; `bench.load` measures the ceiling.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib
import json
import os
import resource
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

ROOT: Final = Path(__file__).resolve().parent.parent
PEERS: Final = ROOT / ".venvs" / "peers" / "bin" / "python"
MODEL: Final = "mock"
TEXT: Final = " The quick brown fox jumps over the lazy dog and runs away."
TOKEN_IDS: Final = tuple(range(1000, 1016))
PROMPT_TOKENS: Final = 100
"""What every answer claims about its prompt."""
CHAT: Final = "/v1/chat/completions"
COMPLETIONS: Final = "/v1/completions"
BACKLOG: Final = 4096
"""Connections that may wait to be accepted: a client opens a thousand at once."""


def chat_body(*, ids: bool) -> dict[str, Any]:
    """The answer of /v1/chat/completions, with token ids or without."""
    choice: dict[str, Any] = {
        "index": 0,
        "message": {"role": "assistant", "content": TEXT},
        "logprobs": None,
        "finish_reason": "stop",
    }
    return _answer("chatcmpl-mock", "chat.completion", [choice | ({"token_ids": TOKEN_IDS} if ids else {})])


def completion_body(count: int, *, ids: bool) -> dict[str, Any]:
    """The answer of /v1/completions to `count` prompts."""
    choice: dict[str, Any] = {"text": TEXT, "logprobs": None, "finish_reason": "stop"}
    if ids:
        choice["token_ids"] = TOKEN_IDS
    return _answer("cmpl-mock", "text_completion", [{"index": i} | choice for i in range(count)])


def _answer(name: str, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
    prompt, generated = PROMPT_TOKENS * len(choices), len(TOKEN_IDS) * len(choices)
    return {
        "id": name,
        "object": kind,
        "created": 1_800_000_000,
        "model": MODEL,
        "choices": choices,
        "usage": {"prompt_tokens": prompt, "completion_tokens": generated, "total_tokens": prompt + generated},
    }


def _http(status: int, value: object) -> bytes:
    body = json.dumps(value, separators=(",", ":")).encode()
    reason = {200: "OK", 400: "Bad Request", 404: "Not Found", 411: "Length Required"}[status]
    head = f"HTTP/1.1 {status} {reason}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


_CANNED: Final = {
    (CHAT, False): _http(200, chat_body(ids=False)),
    (CHAT, True): _http(200, chat_body(ids=True)),
    (COMPLETIONS, False): _http(200, completion_body(1, ids=False)),
    (COMPLETIONS, True): _http(200, completion_body(1, ids=True)),
}
_MODELS: Final = _http(
    200,
    {"object": "list", "data": [{"id": MODEL, "object": "model", "owned_by": "vllm", "max_model_len": 32_768}]},
)
_HEALTHY: Final = _http(200, {"status": "ok"})
_VERSION: Final = _http(200, {"version": "mock"})
_NO_LENGTH: Final = _http(411, {"error": {"message": "send a Content-Length"}})
_NO_STREAM: Final = _http(400, {"error": {"message": "the mock does not stream"}})
_LOST: Final = _http(404, {"error": {"message": "no such path"}})


class Answers:
    """Decides what is answered, and when: answers wait in one queue, since all wait equally long."""

    def __init__(self, latency_s: float) -> None:
        self.answered = 0
        self._latency_s = latency_s
        self._waiting: deque[tuple[float, asyncio.Transport, bytes]] = deque()

    def answer(self, transport: asyncio.Transport, head: bytes, body: bytes) -> None:
        """Write the answer to one request, now or when it is due."""
        path = head.split(b" ", 2)[1].decode("latin-1")
        data = self._completion(path, body) if path in (CHAT, COMPLETIONS) else self._other(path)
        if self._latency_s == 0 or path not in (CHAT, COMPLETIONS):
            transport.write(data)
            return
        loop = asyncio.get_running_loop()
        self._waiting.append((loop.time() + self._latency_s, transport, data))
        if len(self._waiting) == 1:
            loop.call_later(self._latency_s, self._due)

    def _due(self) -> None:
        loop = asyncio.get_running_loop()
        # A timer for each answer would cost more than the answer; those within a millisecond go together.
        until = loop.time() + 0.001
        while self._waiting and self._waiting[0][0] <= until:
            _, transport, data = self._waiting.popleft()
            transport.write(data)
        if self._waiting:
            loop.call_later(max(0.0, self._waiting[0][0] - loop.time()), self._due)

    def _completion(self, path: str, body: bytes) -> bytes:
        self.answered += 1
        if b'"stream":true' in body or b'"stream": true' in body:
            return _NO_STREAM
        ids = b'"return_token_ids":true' in body or b'"return_token_ids": true' in body
        count = _prompts(body) if path == COMPLETIONS else 1
        return _CANNED[path, ids] if count == 1 else _http(200, completion_body(count, ids=ids))

    def _other(self, path: str) -> bytes:
        match path:
            case "/v1/models":
                return _MODELS
            case "/health":
                return _HEALTHY
            case "/version":
                return _VERSION
            case "/stats":
                return _http(200, {"answered": self.answered, "cpu_s": cpu_seconds()})
            case _:
                return _LOST


def _prompts(body: bytes) -> int:
    """How many prompts a completion has; parsed only where the text says that it is a list of prompts."""
    at = body.find(b'"prompt":')
    after = body[at + 9 : at + 13].lstrip()
    if not after.startswith(b"[") or after[1:].lstrip()[:1] not in (b"[", b'"'):
        return 1
    return len(cast("dict[str, list[object]]", json.loads(body))["prompt"])


class MockProtocol(asyncio.Protocol):
    """One connection: requests with a Content-Length, kept alive, pipelined or not."""

    def __init__(self, answers: Answers) -> None:
        self._answers = answers
        self._buffer = b""
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        assert self._transport is not None
        self._buffer = self._buffer + data if self._buffer else data
        while self._buffer:
            end = self._buffer.find(b"\r\n\r\n")
            if end < 0:
                return
            head = self._buffer[:end]
            length = content_length(head)
            if length is None:
                self._transport.write(_NO_LENGTH)
                self._transport.close()
                return
            stop = end + 4 + length
            if len(self._buffer) < stop:
                return
            body = self._buffer[end + 4 : stop]
            self._buffer = self._buffer[stop:]
            self._answers.answer(self._transport, head, body)


def content_length(head: bytes) -> int | None:
    """Of a request or an answer; 0 where it says nothing about a body, None for a chunked one."""
    lower = head.lower()
    at = lower.find(b"\r\ncontent-length:")
    if at < 0:
        return None if b"\r\ntransfer-encoding:" in lower else 0
    end = lower.find(b"\r\n", at + 2)
    return int(lower[at + 17 : end if end >= 0 else None])


def cpu_seconds() -> float:
    """User and system seconds of this process so far, all threads."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def fastest_loop() -> Callable[[], asyncio.AbstractEventLoop]:
    """uvloop's where it is installed, else asyncio's own."""
    try:
        return cast("Callable[[], asyncio.AbstractEventLoop]", importlib.import_module("uvloop").new_event_loop)
    except ImportError:
        return asyncio.new_event_loop


@dataclass(frozen=True, slots=True, kw_only=True)
class Mock:
    """A mock that runs as a program of its own."""

    url: str
    pid: int


@contextlib.contextmanager
def started(latency_ms: float = 0.0) -> Generator[Mock]:
    """Run the mock until the block ends, under the interpreter that has uvloop if there is one."""
    python = str(PEERS) if PEERS.exists() else sys.executable
    command = [python, "-m", "bench.mock_server", "--port", "0", "--latency-ms", str(latency_ms)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        if not url:
            raise SystemExit(f"the mock server ended with {process.wait()} before it said where it listens")
        yield Mock(url=url, pid=process.pid)
    finally:
        process.terminate()
        process.wait()


async def serve(host: str, port: int, latency_s: float, announce: Callable[[str], None]) -> None:
    """Listen until cancelled; `announce` is told the URL."""
    answers = Answers(latency_s)
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: MockProtocol(answers), host, port, backlog=BACKLOG)
    announce(f"http://{host}:{server.sockets[0].getsockname()[1]}")
    async with server:
        await server.serve_forever()


def main() -> None:
    """Parse and serve."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="0: any free one")
    parser.add_argument("--latency-ms", type=float, default=0.0, help="what every completion waits")
    options = parser.parse_args()
    with contextlib.suppress(KeyboardInterrupt, asyncio.CancelledError):
        with asyncio.Runner(loop_factory=fastest_loop()) as runner:
            runner.run(_serve_until_orphaned(options.host, options.port, options.latency_ms / 1000))


async def _serve_until_orphaned(host: str, port: int, latency_s: float) -> None:
    """A benchmark that is killed must not leave its server."""
    serving, parent = asyncio.current_task(), os.getppid()
    loop = asyncio.get_running_loop()

    def look() -> None:
        if os.getppid() == parent:
            loop.call_later(1.0, look)
        elif serving is not None:
            serving.cancel()

    look()
    await serve(host, port, latency_s, lambda url: print(url, flush=True))


if __name__ == "__main__":
    main()
