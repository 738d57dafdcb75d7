"""One kind of request at a time, for servers on which kinds spoil each other's answers."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager


class Turns:
    """Any number of one kind may be under way; another kind waits until they have ended. In order of arrival."""

    def __init__(self) -> None:
        self._kind = ""
        self._count = 0
        self._waiting: deque[tuple[str, asyncio.Future[None]]] = deque()

    @asynccontextmanager
    async def of(self, kind: str) -> AsyncGenerator[None]:
        """Hold a place among the requests of `kind`."""
        if self._waiting or (self._count and self._kind != kind):
            future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.append((kind, future))
            try:
                await future
            except asyncio.CancelledError:
                if future.done() and not future.cancelled():
                    self._leave()
                raise
        else:
            self._kind, self._count = kind, self._count + 1
        try:
            yield
        finally:
            self._leave()

    def _leave(self) -> None:
        self._count -= 1
        while self._waiting and (not self._count or self._waiting[0][0] == self._kind):
            kind, future = self._waiting.popleft()
            if not future.done():
                self._kind, self._count = kind, self._count + 1
                future.set_result(None)
