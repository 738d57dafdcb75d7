"""Which of several servers is asked: of those that work and have room, the one with the fewest requests in flight.

Requests that share what a server has computed go to one server, and wait for it, while others have enough to do.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

from proctor.errors import ServerError
from proctor.infer.concurrency import START, Window
from proctor.infer.origin import FAULTS, Origin, dumped
from proctor.infer.server import Backend

EJECT_AFTER: Final = 10
"""Consecutive failures (transport faults, 5xx, 429) after which a server is not asked while others work."""
PROBE_FIRST_S: Final = 1.0
PROBE_LONGEST_S: Final = 60.0
"""Between two looks at an ejected server: soon at first, since most are back soon."""
PROBE_GROWTH: Final = 1.1
"""A server that was away for a while is found again after a tenth of that at most: looking costs nothing, its idleness
does."""
PROBE_TIMEOUT_S: Final = 5.0
REFRESH_S: Final = 0.05
"""How old the list of backends may be when a server is picked; after a failure it is read anew."""
_NOBODY_POLL_S: Final = 0.25
"""A restarted server shows up as another backend, not as an event."""


@dataclass(slots=True, kw_only=True, eq=False)
class Route:
    """One backend as the client sees it."""

    backend: Backend
    opening: bytes
    """How a body that names the model begins."""
    origin: Origin
    window: Window
    answered: int = 0
    """Answers of any status, ever."""
    hedged: int = 0
    """Second copies of slow requests that were sent here, ever."""
    faults: int = 0
    """Consecutive."""
    ejected: bool = False
    last_fault: str = ""
    probe: asyncio.Task[None] | None = field(default=None, repr=False)
    waiters: deque[_Waiter] = field(default_factory=deque["_Waiter"], repr=False)
    """Who waits for this one."""

    @property
    def room(self) -> bool:
        """Whether one more may be in flight."""
        return self.window.in_flight < self.window.limit

    @property
    def half_idle(self) -> bool:
        """Whether what is given to it takes nothing from anyone."""
        return self.window.in_flight < (self.window.limit + 1) // 2


class Affinity:
    """Requests that go where the first of them went, while that server works: it has computed what they share."""

    __slots__ = ("route",)

    def __init__(self) -> None:
        self.route: Route | None = None
        """None before the first."""


class Router:
    """Picks a route for each attempt; ejects what fails repeatedly and re-admits it when it answers again.

    A route that was taken holds one place of its window until `release`. Who finds no room waits, in order of arrival;
    a retry has arrived before all that wait, and who waits for one route before those who would take any.
    """

    def __init__(
        self,
        backends: Callable[[], Sequence[Backend]],
        *,
        unreachable_s: float,
        max_in_flight: int = 1024,
        connections: int = 1 << 20,
        connect_s: float = 10.0,
    ) -> None:
        """`max_in_flight` bounds each window, `connections` all of them together: they get equal shares."""
        self._backends = backends
        self._unreachable_s = unreachable_s
        self._maximum = max_in_flight
        self._connections = connections
        self._connect_s = connect_s
        self._known: tuple[Backend, ...] = ()
        self._routes: list[Route] = []
        self._gone: list[Route] = []
        """Of servers that are not there any more."""
        self._refresh_at = 0.0
        self._dark_since: float | None = None
        self._waiters: deque[_Waiter] = deque()

    @property
    def routes(self) -> tuple[Route, ...]:
        """As of the last pick."""
        return tuple(self._routes)

    @property
    def dark(self) -> bool:
        """Whether no server works: a failure then says nothing about the request."""
        return self._dark_since is not None

    def allow(self, max_in_flight: int) -> None:
        """Another bound of each window."""
        self._maximum = max_in_flight
        self._bound()

    @property
    def waiting(self) -> int:
        """How many wait for room."""
        return len(self._waiters) + sum([len(r.waiters) for r in self._routes])

    @property
    def limit(self) -> int:
        """How many requests may be in flight now, over the servers that work, or over all if none does."""
        if not self._routes:
            self._refresh(time.monotonic())
        routes = self._routes
        if len(routes) == 1:
            return routes[0].window.limit
        limit = sum([r.window.limit for r in routes if not r.ejected])
        return limit or sum([r.window.limit for r in self._routes]) or min(START, self._maximum)

    def take(self, avoid: Route | None = None, near: Affinity | None = None) -> Route | None:
        """The route for the next attempt, or None if it has to be waited for. Raises ServerError as `wait`."""
        if avoid is None and (self._waiters or (near is not None and near.route is not None and near.route.waiters)):
            return None
        now = time.monotonic()
        if now >= self._refresh_at:
            self._refresh(now)
        if near is not None:
            return self._give(avoid, near)
        route = self._choose(avoid)
        if route is not None:
            route.window.in_flight += 1
        return route

    async def wait(self, avoid: Route | None = None, near: Affinity | None = None) -> Route:
        """The route for the next attempt: fewest in flight, of equal ones the first, and not `avoid` if others work.

        With `near` the route that its other requests took, if that works; another one only if it is half idle.
        When all are ejected the least loaded of all, for as long as the budget lasts: then ServerError. Waits while
        there is no room, or no backend at all.
        """
        while True:
            route = self.take(avoid, near)
            if route is not None:
                return route
            if self._routes:
                return await self._queue(avoid, near)
            await asyncio.sleep(min(_NOBODY_POLL_S, self._unreachable_s))

    def release(self, route: Route) -> None:
        """Give a place back."""
        route.window.in_flight -= 1
        if self._waiters or route.waiters or (len(self._routes) > 1 and route.half_idle and self.waiting):
            self.wake()

    def spare(self, other: Route) -> Route | None:
        """The place of a route that is half idle, taken, for a second copy of what `other` is slow with; or None."""
        route = self._half_idle(other)
        if route is not None:
            route.window.in_flight += 1
        return route

    def wake(self) -> None:
        """Let those go on for whom there is room."""
        now = time.monotonic()
        if now >= self._refresh_at:
            self._refresh(now)
        for route in self._routes:
            if route.ejected:
                self._disperse(route)
            while route.waiters and route.room:
                route.waiters.popleft().get(route)
        held: list[_Waiter] = []
        while self._waiters:
            waiter = self._waiters.popleft()
            if waiter.route.done():
                continue
            try:
                route = self._give(waiter.avoid, waiter.near)
            except ServerError as error:
                waiter.route.set_exception(error)
                continue
            if route is not None:
                waiter.route.set_result(route)
            elif (home := self._home(waiter.avoid, waiter.near)) is not None:
                home.waiters.append(waiter)
            else:
                held.append(waiter)
                if waiter.avoid is None:
                    break
        self._waiters.extendleft(reversed(held))
        if not self._waiters:
            self._help()

    def succeeded(self, route: Route) -> None:
        """An answer below 500 came, that is no 429: the server works."""
        route.faults = 0
        if route.ejected:
            self._admit(route)

    def failed(self, route: Route, reason: str, *, gone: bool = False, busy: bool = False) -> None:
        """A transport fault, a 5xx or a 429. `gone`: nobody listens there. `busy`: it works, and only says so."""
        route.faults = max(route.faults + 1, EJECT_AFTER if gone else 0)
        route.last_fault = reason
        self._refresh_at = 0.0
        if busy:
            self._dark_since = None
        if route.faults >= EJECT_AFTER and not route.ejected and route in self._routes:
            route.ejected = True
            route.probe = asyncio.create_task(self._probe(route))
            self.wake()

    async def close(self) -> None:
        """End the probing and every connection."""
        probes = [r.probe for r in self._routes if r.probe is not None]
        for probe in probes:
            probe.cancel()
        for probe in probes:
            with contextlib.suppress(asyncio.CancelledError):
                await probe
        for route in (*self._routes, *self._gone):
            await route.origin.aclose()
        # A cut connection gives its socket back at the loop's next turn, which might never come.
        await asyncio.sleep(0)

    def _give(self, avoid: Route | None, near: Affinity | None) -> Route | None:
        """A place, taken, or None. Raises ServerError if none has worked for too long."""
        home = self._home(avoid, near)
        if home is not None:
            self._dark_since = None
            route = home if home.room else self._half_idle(avoid)
        else:
            route = self._choose(avoid)
            if near is not None and route is not None:
                near.route = route
        if route is not None:
            route.window.in_flight += 1
        return route

    def _half_idle(self, other: Route | None) -> Route | None:
        """Of the sound routes whose places nobody needs, the idlest."""
        able = [r for r in self._routes if r is not other and not r.ejected and not r.faults and r.half_idle]
        return min(able, key=lambda r: r.window.in_flight, default=None)

    def _home(self, avoid: Route | None, near: Affinity | None) -> Route | None:
        """The route that has what requests of an affinity share, if it works."""
        route = None if near is None else near.route
        works = route is not None and route is not avoid and not route.ejected and route in self._routes
        return route if works else None

    def _help(self) -> None:
        """Who is half idle takes from the longest line at another: what is shared is computed once more then."""
        for route in self._routes:
            while not route.ejected and route.half_idle:
                longest = max(self._routes, key=lambda r: len(r.waiters))
                if not longest.waiters:
                    return
                longest.waiters.popleft().get(route)

    def _disperse(self, route: Route) -> None:
        """Who waited for it takes any."""
        self._waiters.extendleft(reversed(route.waiters))
        route.waiters.clear()

    def _choose(self, avoid: Route | None) -> Route | None:
        """The best route with room. Raises ServerError if none has worked for too long."""
        best: Window | None = None
        chosen: Route | None = None
        for route in self._routes:
            if route.ejected or route is avoid:
                continue
            window = route.window
            if window.in_flight < window.limit and (best is None or window.in_flight < best.in_flight):
                best, chosen = window, route
        if chosen is not None:
            self._dark_since = None
            return chosen
        sound = [r for r in self._routes if not r.ejected]
        if sound:
            self._dark_since = None
            return avoid if avoid is not None and sound == [avoid] and avoid.room else None
        self._check_budget()
        roomy = [r for r in self._routes if r.room]
        return min(roomy, key=lambda r: r.window.in_flight) if roomy else None

    async def _queue(self, avoid: Route | None, near: Affinity | None) -> Route:
        waiter = _Waiter(avoid, near, asyncio.get_running_loop().create_future())
        home = self._home(avoid, near)
        if avoid is not None:
            self._waiters.appendleft(waiter)
        elif home is not None:
            home.waiters.append(waiter)
        else:
            self._waiters.append(waiter)
        try:
            return await waiter.route
        except asyncio.CancelledError:
            if waiter.route.done() and not waiter.route.cancelled() and waiter.route.exception() is None:
                self.release(waiter.route.result())
            raise

    def _refresh(self, now: float) -> None:
        self._refresh_at = now + REFRESH_S
        current = tuple(self._backends())
        if current == self._known:
            return
        kept = {r.backend: r for r in self._routes}
        for backend, route in kept.items():
            if backend not in current:
                self._disperse(route)
                if route.probe is not None:
                    route.probe.cancel()
        self._routes = [kept.get(b) or self._route(b, now) for b in current]
        self._gone += [route for backend, route in kept.items() if backend not in current]
        self._known = current
        self._bound()

    def _bound(self) -> None:
        share = max(1, self._connections // max(1, len(self._routes)))
        for route in self._routes:
            route.window.allow(min(self._maximum, share))

    def _route(self, backend: Backend, now: float) -> Route:
        try:
            origin = Origin(backend.url, api_key=backend.api_key, connect_s=self._connect_s, proxy=backend.proxy)
        except ValueError as error:
            raise ServerError(str(error)) from None
        opening = b'{"model":' + dumped(backend.served_model)
        return Route(backend=backend, opening=opening, origin=origin, window=Window(self._maximum, now))

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
        for pause in pauses():
            await asyncio.sleep(pause)
            if await self._alive(route):
                # On probation: a server whose health is fine but whose answers are not must not take ten more
                # requests after each probe, being the least loaded.
                route.ejected, route.faults, route.probe = False, EJECT_AFTER - 1, None
                self.wake()
                return

    def _admit(self, route: Route) -> None:
        route.ejected = False
        if route.probe is not None:
            route.probe.cancel()
            route.probe = None
        self.wake()

    async def _alive(self, route: Route) -> bool:
        for path in ("/health", "/v1/models"):
            try:
                answer = await route.origin.get(path, PROBE_TIMEOUT_S)
            except FAULTS:
                return False
            if answer.status < 400:
                return True
            if answer.status >= 500:
                return False
        return False


@dataclass(slots=True, eq=False)
class _Waiter:
    """Someone without a place."""

    avoid: Route | None
    near: Affinity | None
    route: asyncio.Future[Route]

    def get(self, route: Route) -> None:
        """A place of `route`, unless nobody waits any more."""
        if not self.route.done():
            route.window.in_flight += 1
            self.route.set_result(route)


def pauses() -> Iterator[float]:
    """Seconds between two looks at a server that is away, without an end."""
    pause = PROBE_FIRST_S
    while True:
        yield pause
        pause = min(pause * PROBE_GROWTH, PROBE_LONGEST_S)
