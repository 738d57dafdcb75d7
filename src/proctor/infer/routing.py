"""Which of several servers is asked: the one with the fewest requests in flight, among those that work."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

import aiohttp

from proctor.errors import ServerError
from proctor.infer.server import Backend

EJECT_AFTER: Final = 3
"""Consecutive transport faults or 5xx answers."""
PROBE_FIRST_S: Final = 0.1
PROBE_CAP_S: Final = 2.0
PROBE_TIMEOUT: Final = aiohttp.ClientTimeout(total=5.0)


@dataclass(slots=True, kw_only=True)
class Route:
    """One backend as the client sees it."""

    backend: Backend
    headers: dict[str, str]
    in_flight: int = 0
    faults: int = 0
    ejected: bool = False
    last_fault: str = ""
    probe: asyncio.Task[None] | None = field(default=None, repr=False)


class Router:
    """Picks a route for each attempt; ejects what fails repeatedly and re-admits it when it answers again."""

    def __init__(
        self, session: aiohttp.ClientSession, backends: Callable[[], Sequence[Backend]], *, unreachable_s: float
    ) -> None:
        self._session = session
        self._backends = backends
        self._unreachable_s = unreachable_s
        self._known: tuple[Backend, ...] = ()
        self._routes: list[Route] = []
        self._changed = asyncio.Event()
        self._dark_since: float | None = None

    async def pick(self, avoid: Route | None = None) -> Route:
        """The route for the next attempt, another one than `avoid` where there is a choice.

        Waits while all are ejected. Raises ServerError when that lasts longer than the budget.
        """
        while True:
            self._refresh()
            admitted = [r for r in self._routes if not r.ejected]
            if admitted:
                self._dark_since = None
                others = [r for r in admitted if r is not avoid] or admitted
                return min(others, key=lambda r: r.in_flight)
            await self._wait_for_light()

    def succeeded(self, route: Route) -> None:
        """An answer came, whatever its status below 500."""
        route.faults = 0

    def failed(self, route: Route, reason: str) -> None:
        """A transport fault or a 5xx."""
        route.faults += 1
        route.last_fault = reason
        if route.faults >= EJECT_AFTER and not route.ejected:
            route.ejected = True
            route.probe = asyncio.create_task(self._probe(route))

    async def close(self) -> None:
        """End the probing."""
        probes = [r.probe for r in self._routes if r.probe is not None]
        for probe in probes:
            probe.cancel()
        for probe in probes:
            with contextlib.suppress(asyncio.CancelledError):
                await probe

    def _refresh(self) -> None:
        current = tuple(self._backends())
        if current == self._known:
            return
        kept = {r.backend: r for r in self._routes}
        for backend, route in kept.items():
            if backend not in current and route.probe is not None:
                route.probe.cancel()
        self._routes = [kept.get(b) or Route(backend=b, headers=_headers(b)) for b in current]
        self._known = current

    async def _wait_for_light(self) -> None:
        now = time.monotonic()
        if self._dark_since is None:
            self._dark_since = now
        left = self._dark_since + self._unreachable_s - now
        if left <= 0:
            raise self._unreachable()
        self._changed.clear()
        # Also wakes by itself: a restarted server shows up as another backend, not as an event.
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._changed.wait(), timeout=min(left, 0.25))

    def _unreachable(self) -> ServerError:
        if not self._routes:
            return ServerError("there is no server to ask", hint="check that the server was started")
        seen = "; ".join(f"{r.backend.url}: {r.last_fault or 'no answer'}" for r in self._routes)
        return ServerError(f"no server answered for {self._unreachable_s:.0f} s ({seen})")

    async def _probe(self, route: Route) -> None:
        delay = PROBE_FIRST_S
        while True:
            await asyncio.sleep(delay)
            delay = min(delay * 2, PROBE_CAP_S)
            if await self._alive(route):
                route.ejected, route.faults, route.probe = False, EJECT_AFTER - 1, None
                self._changed.set()
                return

    async def _alive(self, route: Route) -> bool:
        for path in ("/health", "/v1/models"):
            try:
                async with self._session.get(
                    route.backend.url + path, headers=route.headers, timeout=PROBE_TIMEOUT
                ) as response:
                    if response.status < 400:
                        return True
                    if response.status >= 500:
                        return False
            except (aiohttp.ClientError, OSError, TimeoutError):
                return False
        return False


def _headers(backend: Backend) -> dict[str, str]:
    headers = {"Content-Type": "application/json"}
    if backend.api_key:
        headers["Authorization"] = f"Bearer {backend.api_key}"
    return headers
