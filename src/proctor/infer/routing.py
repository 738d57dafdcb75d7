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

EJECT_AFTER: Final = 10
"""Consecutive failures (transport faults, 5xx, 429) after which a server is not asked while others work."""
PROBE_FIRST_S: Final = 1.0
PROBE_LONGEST_S: Final = 60.0
"""Between two looks at an ejected server: soon at first, since most are back soon."""
PROBE_TIMEOUT: Final = aiohttp.ClientTimeout(total=5.0)
_NOBODY_POLL_S: Final = 0.25
"""A restarted server shows up as another backend, not as an event."""


@dataclass(slots=True, kw_only=True)
class Route:
    """One backend as the client sees it."""

    backend: Backend
    headers: dict[str, str]
    in_flight: int = 0
    answered: int = 0
    """Answers of any status, ever."""
    faults: int = 0
    """Consecutive."""
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
        self._dark_since: float | None = None

    @property
    def routes(self) -> tuple[Route, ...]:
        """As of the last pick."""
        return tuple(self._routes)

    @property
    def dark(self) -> bool:
        """Whether no server works: a failure then says nothing about the request."""
        return self._dark_since is not None

    async def pick(self, avoid: Route | None = None) -> Route:
        """The route for the next attempt: fewest in flight, of equal ones the first, and not `avoid` if others work.

        When all are ejected the least loaded of all, for as long as the budget lasts: then ServerError. Waits while
        there is no backend at all.
        """
        while True:
            self._refresh()
            admitted = [r for r in self._routes if not r.ejected]
            if admitted:
                self._dark_since = None
                others = [r for r in admitted if r is not avoid] or admitted
                return min(others, key=lambda r: r.in_flight)
            self._check_budget()
            if self._routes:
                return min(self._routes, key=lambda r: r.in_flight)
            await asyncio.sleep(min(_NOBODY_POLL_S, self._unreachable_s))

    def succeeded(self, route: Route) -> None:
        """An answer below 500 came, that is no 429: the server works."""
        route.faults = 0
        self._admit(route)

    def failed(self, route: Route, reason: str, *, gone: bool = False, busy: bool = False) -> None:
        """A transport fault, a 5xx or a 429. `gone`: nobody listens there. `busy`: it works, and only says so."""
        route.faults = max(route.faults + 1, EJECT_AFTER if gone else 0)
        route.last_fault = reason
        if busy:
            self._dark_since = None
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

    def _check_budget(self) -> None:
        now = time.monotonic()
        if self._dark_since is None:
            self._dark_since = now
        if now - self._dark_since >= self._unreachable_s:
            raise self._unreachable()

    def _unreachable(self) -> ServerError:
        if not self._routes:
            return ServerError("there is no server to ask", hint="check that the server was started")
        seen = "; ".join(f"{r.backend.url}: {r.last_fault or 'no answer'}" for r in self._routes)
        return ServerError(f"no server answered for {self._unreachable_s:.0f} s ({seen})")

    async def _probe(self, route: Route) -> None:
        delay = PROBE_FIRST_S
        while True:
            await asyncio.sleep(delay)
            delay = min(delay * 2, PROBE_LONGEST_S)
            if await self._alive(route):
                # On probation: a server whose health is fine but whose answers are not must not take ten more
                # requests after each probe, being the least loaded.
                route.ejected, route.faults, route.probe = False, EJECT_AFTER - 1, None
                return

    def _admit(self, route: Route) -> None:
        if not route.ejected:
            return
        route.ejected = False
        if route.probe is not None:
            route.probe.cancel()
            route.probe = None

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
