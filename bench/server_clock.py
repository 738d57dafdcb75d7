"""Middleware for vLLM (`--middleware bench.server_clock.ServerClock`): from when to when completions were at work.

It runs in the server's own process, so it imports nothing but the standard library. GET /__clock answers with the
seconds from the first request to the last answer since the last look, and how many there were; then it begins anew.
"""

from __future__ import annotations

import json
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Final

Message = MutableMapping[str, Any]
App = Callable[[Message, Callable[[], Awaitable[Message]], Callable[[Message], Awaitable[None]]], Awaitable[None]]

PATH: Final = "/__clock"
_WATCHED: Final = ("/v1/completions", "/v1/chat/completions")


class ServerClock:
    """An ASGI application around another one."""

    def __init__(self, app: App) -> None:
        self._app = app
        self._first: float | None = None
        self._last = 0.0
        self._requests = 0

    async def __call__(
        self, scope: Message, receive: Callable[[], Awaitable[Message]], send: Callable[[Message], Awaitable[None]]
    ) -> None:
        path = scope.get("path")
        if path == PATH:
            await self._tell(send)
        elif path in _WATCHED:
            if self._first is None:
                self._first = time.monotonic()
            self._requests += 1
            try:
                await self._app(scope, receive, send)
            finally:
                self._last = time.monotonic()
        else:
            await self._app(scope, receive, send)

    async def _tell(self, send: Callable[[Message], Awaitable[None]]) -> None:
        seconds = 0.0 if self._first is None else self._last - self._first
        body = json.dumps({"seconds": seconds, "requests": self._requests}).encode()
        self._first, self._requests = None, 0
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]})
        await send({"type": "http.response.body", "body": body})
