"""What is in flight, and who looks after it: time-outs, second copies of stragglers, the servers' own word.

One task sweeps over all requests; none of them carries a timer of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import statistics
import time
from collections import deque
from collections.abc import Callable, Hashable
from typing import Any, Final

from proctor.infer.concurrency import ServerWord
from proctor.infer.origin import FAULTS, refused
from proctor.infer.outcome import Read, Reply
from proctor.infer.routing import Route, Router
from proctor.infer.server_metrics import read_metrics

SWEEP_S: Final = 1.0
"""The longest pause between two sweeps; a tenth of the time-out if that is less."""
TAIL_SWEEP_S: Final = 0.02
HEDGE_AFTER: Final = 2.0
"""A straggler has taken so many times the median of its like."""
HEDGE_LEAST_S: Final = 0.1
HEDGE_KNOWN: Final = 5
"""So many answers make a median."""
GONE: Final = "gone"
"""The verdict over what is open at a server that nobody runs any more."""
REMEMBERED: Final = 128
KINDS: Final = 256
"""Of so many kinds of requests the latencies are kept; with more, begun anew."""
POLL_FIRST_S: Final = 0.05
"""Until the first look at a busy server's metrics: where it has no queue, much more can be in flight at once."""
GLIMPSE_S: Final = 0.25
"""What a server says so soon after the look before may be older than what it was asked since."""
POLL_S: Final = 1.0
"""Between two looks later on."""
POLL_LONGEST_S: Final = 60.0
POLL_TIMEOUT_S: Final = 2.0
GONE_S: Final = 60.0
"""Nobody has listened for so long where requests are open: a server that was told to end may leave them without a word.
One that is about to end, and still answers what it has, is given that time."""
POLL_REFUSED_S: Final = 5.0
"""The longest pause between two looks while nobody listens."""
NO_METRICS: Final = frozenset({401, 403, 404, 405, 501})
"""The server has none, or not for us: it is not asked again."""


class Flight:
    """One request on its way: what is sent, and the attempt at hand."""

    __slots__ = (
        "_cancelling",
        "_task",
        "attempts",
        "copied",
        "copy",
        "data",
        "hedge",
        "kind",
        "named",
        "path",
        "read",
        "route",
        "started",
        "verdict",
    )

    def __init__(self, path: str, data: bytes, *, named: bool, kind: Hashable, read: Read | None = None) -> None:
        """`data` is the body, if `named` without its beginning: a server's name for the model is put there.

        `kind` is what it can be compared with: a straggler takes longer than its like.
        """
        self.path = path
        self.data = data
        self.named = named
        self.kind = kind
        self.read = read
        self.attempts = 0
        self.hedge = False
        """Whether a copy may be sent."""
        self.copy: asyncio.Task[None] | None = None
        self.copied: Reply | None = None
        """The copy's answer."""
        self.verdict = ""
        """Why `end` was called."""

    def begin(self, route: Route) -> None:
        """In the task that sends it: an attempt begins."""
        task = asyncio.current_task()
        assert task is not None
        self._task: asyncio.Task[Any] = task
        self._cancelling = task.cancelling()
        self.route = route
        self.verdict = ""
        self.started = time.monotonic()

    def age_s(self) -> float:
        """Seconds since the attempt began."""
        return time.monotonic() - self.started

    def end(self, verdict: str) -> None:
        """Interrupt the attempt: its task sees CancelledError, and finds the verdict here."""
        if not self.verdict:
            self.verdict = verdict
            self._task.cancel()

    def ended(self) -> bool:
        """In the task, after a CancelledError: whether it is ours alone; it is taken back then."""
        return bool(self.verdict) and self._task.uncancel() <= self._cancelling

    def twin(self) -> Flight:
        """The same request, for another attempt at the same time."""
        twin = Flight(self.path, self.data, named=self.named, kind=self.kind, read=self.read)
        twin.attempts = self.attempts - 1
        return twin


class Watch:
    """Looks after the flights of one client while entered."""

    def __init__(
        self, router: Router, launch: Callable[[Flight, Route], asyncio.Task[None]], *, request_s: float
    ) -> None:
        """`launch` sends a copy of a flight to a route whose place is taken."""
        self.flights: set[Flight] = set()
        self._router = router
        self._launch = launch
        self._request_s = request_s
        self._ending = False
        self._nudge = asyncio.Event()
        self._latencies: dict[Hashable, deque[float]] = {}
        self._polls: dict[Route, _Poll] = {}
        self._copies: set[asyncio.Task[None]] = set()
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Begin to look."""
        self._tasks = [asyncio.create_task(self._sweep()), asyncio.create_task(self._poll())]

    async def close(self) -> None:
        """End every task."""
        tasks = [*self._tasks, *self._copies, *(p.task for p in self._polls.values() if p.task is not None)]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def tail(self, ending: bool) -> None:
        """Whether nothing comes any more."""
        self._ending = ending
        self._nudge.set()

    def landed(self, kind: Hashable, latency_s: float) -> None:
        """A request of that kind was answered."""
        known = self._latencies.get(kind)
        if known is None:
            if len(self._latencies) >= KINDS:
                self._latencies.clear()
            known = self._latencies[kind] = deque(maxlen=REMEMBERED)
        known.append(latency_s)

    # --- time-outs and stragglers ---

    async def _sweep(self) -> None:
        calm_s = min(SWEEP_S, self._request_s / 10)
        while True:
            hedging = self._ending and self.flights and len(self._router.routes) > 1
            pause_s = min(calm_s, TAIL_SWEEP_S) if hedging else calm_s
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._nudge.wait(), pause_s)
            self._nudge.clear()
            now = time.monotonic()
            for flight in tuple(self.flights):
                if now - flight.started >= self._request_s:
                    flight.end("time-out")
            if hedging:
                self._hedge(now)

    def _hedge(self, now: float) -> None:
        # Only while nothing waits, and to a server that is half idle: a copy takes nothing from anyone.
        if self._router.waiting:
            return
        able = [f for f in self.flights if f.hedge and f.copy is None and not f.verdict]
        for flight in sorted(able, key=lambda f: f.started):
            usual = self._usual(flight.kind)
            if usual is None or now - flight.started < max(HEDGE_LEAST_S, HEDGE_AFTER * usual):
                continue
            route = self._router.spare(flight.route)
            if route is None:
                continue
            flight.copy = self._launch(flight, route)
            self._copies.add(flight.copy)
            flight.copy.add_done_callback(self._copies.discard)

    def _usual(self, kind: Hashable) -> float | None:
        known = self._latencies.get(kind, ())
        return statistics.median(known) if len(known) >= HEDGE_KNOWN else None

    # --- the servers' own word ---

    async def _poll(self) -> None:
        pause_s = POLL_FIRST_S
        while True:
            await asyncio.sleep(pause_s)
            now = time.monotonic()
            routes = self._router.routes
            self._polls = {r: p for r, p in self._polls.items() if r in routes or p.task is not None}
            for route in routes:
                poll = self._polls.setdefault(route, _Poll())
                if route.window.in_flight and poll.task is None and now >= poll.next:
                    poll.task = asyncio.create_task(self._look(route, poll))
            # Where client and server share cores, every beat takes something from the server.
            soonest = min((0.0 if p.task is not None else p.next for p in self._polls.values()), default=0.0)
            pause_s = min(max(POLL_FIRST_S, soonest - now), max(POLL_FIRST_S, GLIMPSE_S))

    async def _look(self, route: Route, poll: _Poll) -> None:
        try:
            answer = await route.origin.get("/metrics", POLL_TIMEOUT_S)
            poll.refused_since = None
            word = read_metrics(answer.body) if answer.status == 200 else None
            if word is not None:
                if not route.ejected:
                    self._hear(word, route, poll)
            elif answer.status in NO_METRICS:
                poll.pause = float("inf")
            else:
                poll.pause = min(poll.pause * 2, POLL_LONGEST_S)
        except FAULTS as error:
            poll.pause = min(poll.pause * 2, POLL_LONGEST_S)
            if not refused(error):
                poll.refused_since = None
            elif self._gone(route, poll):
                poll.pause = POLL_FIRST_S
            else:
                poll.pause = min(poll.pause, POLL_REFUSED_S)
        finally:
            poll.task = None
            # A tenth less, so that the next beat is not missed by a hair.
            poll.next = time.monotonic() + 0.9 * poll.pause

    def _gone(self, route: Route, poll: _Poll) -> bool:
        """Nobody listens there: what has been open since then, for long enough, is ended."""
        now = time.monotonic()
        if poll.refused_since is None:
            poll.refused_since = now
        if now - poll.refused_since < GONE_S:
            return False
        for flight in tuple(self.flights):
            if flight.route is route and flight.started < poll.refused_since:
                flight.end(GONE)
        poll.refused_since = None
        return True

    def _hear(self, word: ServerWord, route: Route, poll: _Poll) -> None:
        if poll.pause < GLIMPSE_S:
            grown = route.window.glimpsed(word, time.monotonic())
            # What has grown may grow again as soon as that is seen.
            poll.pause = POLL_FIRST_S if grown else min(poll.pause * 2, POLL_S)
        else:
            route.window.told(word, time.monotonic())
            poll.pause = min(poll.pause * 2, POLL_S)
        self._router.wake()


class _Poll:
    """How one server is asked for its metrics."""

    __slots__ = ("next", "pause", "refused_since", "task")

    def __init__(self) -> None:
        self.next = 0.0
        self.pause = POLL_FIRST_S
        self.refused_since: float | None = None
        self.task: asyncio.Task[None] | None = None
