"""How many requests are in flight: grown while throughput grows, cut back when the server says that it is too much."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from typing import Final

START: Final = 8
GROWTH: Final = 1.5
GAIN: Final = 1.05
"""A wider window is kept growing only if throughput rose by this factor."""
CUT: Final = 0.7
PATIENCE: Final = 4
"""Windows without gain before growth is tried once more: short windows are noisy."""
CUT_PAUSE_S: Final = 1.0
"""One burst of refusals is one cut."""


class AdaptiveLimiter:
    """A semaphore whose size finds itself between 1 and `maximum`.

    Throughput is measured over as many completions as are allowed in flight; a measurement counts only if the
    limit was reached, so that an idle feeder does not look like a slow server.
    """

    def __init__(self, maximum: int) -> None:
        self.maximum = maximum
        self.limit = min(START, maximum)
        self.in_flight = 0
        self._waiters: deque[asyncio.Future[None]] = deque()
        self._completed = 0
        self._saturated = False
        self._since = time.monotonic()
        self._best = 0.0
        self._flat = 0
        self._cut_at = 0.0

    async def acquire(self) -> None:
        """Wait for a slot. Order of arrival; cancellation gives the place back."""
        if self.in_flight < self.limit and not self._waiters:
            self.in_flight += 1
            return
        self._saturated = True
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.append(future)
        try:
            await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled():
                self._leave()
            raise

    def release(self, *, overloaded: bool = False) -> None:
        """Give a slot back; `overloaded` if the server refused or timed out."""
        if overloaded:
            self._shrink()
        else:
            self._count()
        self._leave()

    def _leave(self) -> None:
        self.in_flight -= 1
        self._wake()

    def _wake(self) -> None:
        while self._waiters and self.in_flight < self.limit:
            future = self._waiters.popleft()
            if not future.done():
                self.in_flight += 1
                future.set_result(None)

    def _shrink(self) -> None:
        now = time.monotonic()
        if now - self._cut_at >= CUT_PAUSE_S:
            self._cut_at = now
            self.limit = max(1, int(self.limit * CUT))
            self._best = 0.0
        self._restart(now)

    def _count(self) -> None:
        self._completed += 1
        if self._completed < max(self.limit, START):
            return
        now = time.monotonic()
        if self._saturated and self.limit < self.maximum:
            rate = self._completed / max(now - self._since, 1e-6)
            if rate > self._best * GAIN:
                self._best, self._flat = rate, 0
                self._grow()
            else:
                self._flat += 1
                if self._flat >= PATIENCE:
                    self._flat, self._best = 0, rate
                    self._grow()
        self._restart(now)

    def _grow(self) -> None:
        self.limit = min(self.maximum, int(self.limit * GROWTH) + 1)
        self._wake()

    def _restart(self, now: float) -> None:
        self._completed, self._since, self._saturated = 0, now, bool(self._waiters)
