"""The HTTP client: routing, the one layer of retries, and a decision for every class of fault whether a retry helps."""

from __future__ import annotations

import asyncio
import random
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, Self, cast

import orjson

from proctor.errors import ServerError
from proctor.infer.concurrency import START
from proctor.infer.flights import GONE, Flight, Watch
from proctor.infer.origin import FAULTS, dumped, refused, told
from proctor.infer.outcome import BUSY_STATUS, MOVED_STATUS, Broken, Read, Reply, faulty, read_answer, read_refusal
from proctor.infer.routing import Affinity, Route, Router
from proctor.infer.server import Backend, Load
from proctor.records import Boundary


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeouts:
    """Seconds."""

    request: float = 600.0
    """From sending to the last byte: without streaming, a long generation is silent until it is done."""
    connect: float = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Retries:
    """How often and how patiently a request is sent again."""

    attempts: int = 5
    """Retries after the first attempt."""
    base_s: float = 0.25
    cap_s: float = 20.0
    retry_after_cap_s: float = 120.0
    """The longest Retry-After that is honoured in full."""
    unreachable_s: float = 15.0
    """How long all servers may be gone before the engine is given up, for the worker to restart them."""


BUSY_SHARE: Final = 0.25
"""What a 429 costs of a request's retries: "later" is not "no", and a busy hour must not cost answers."""
KEY_STATUS: Final = frozenset({401, 403})
"""No request to this server can succeed."""
LOST_STATUS: Final = frozenset({404, 405}) | MOVED_STATUS
"""No request to this path can succeed."""

DARK_PAUSE_S: Final = 2.0
"""The longest pause while no server works: one that is back must not wait for those who wait for it."""
ONCE_S: Final = 10.0
"""The longest that a question may take which need not be answered."""

_REPLICAS: Final = 16
"""Servers for which connections are allowed for; with more, or where the system allows fewer, they are shared."""
_OTHER_FILES: Final = 256
"""File descriptors for everything that is no connection."""


class Client:
    """An async context manager around connections to several backends. Keys travel in headers and are never logged."""

    def __init__(
        self,
        backends: Callable[[], Sequence[Backend]],
        *,
        timeouts: Timeouts = Timeouts(),
        retries: Retries = Retries(),
        max_in_flight: int = 1024,
    ) -> None:
        """`max_in_flight` bounds what each backend gets at a time."""
        self._backends = backends
        self._timeouts = timeouts
        self._retries = retries
        self._maximum = max_in_flight
        self._allowed = max_in_flight
        self._entered: tuple[Router, Watch] | None = None
        self._resting = 0
        """Requests between two attempts."""

    async def __aenter__(self) -> Self:
        router = Router(
            self._backends,
            unreachable_s=self._retries.unreachable_s,
            max_in_flight=self._allowed,
            connections=allow_connections(self._maximum * _REPLICAS),
            connect_s=self._timeouts.connect,
        )
        watch = Watch(router, self._launch, request_s=self._timeouts.request)
        watch.start()
        self._entered = router, watch
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._entered is not None:
            router, watch = self._entered
            self._entered = None
            await watch.close()
            await router.close()

    def wanted(self) -> int:
        """How many requests to have here at a time: those that may be in flight, and those that wait to be repeated."""
        limit = min(START, self._allowed) if self._entered is None else self._entered[0].limit
        return limit + self._resting

    def allow(self, in_flight: int) -> None:
        """From now on each backend gets at most so many at a time, and never more than `max_in_flight`."""
        self._allowed = min(in_flight, self._maximum)
        if self._entered is not None:
            self._entered[0].allow(self._allowed)

    def tail(self, ending: bool = True) -> None:
        """Say whether the source is exhausted: nothing comes any more but what is under way. False: more may come.

        From then on a request that takes much longer than its like is asked of a second backend too, if `post` was
        told that it may be and that backend is half idle: the first good answer counts.
        """
        self._inside()[1].tail(ending)

    async def post(
        self,
        path: str,
        body: Mapping[str, Any],
        *,
        read: Read | None = None,
        named: bool = True,
        required: bool = True,
        hedge: bool = False,
        near: Affinity | None = None,
    ) -> Reply | Broken:
        """POST `body` until it is answered, refused for good, or out of retries.

        `read` makes the reply's value; an answer that it cannot read is asked for again. `named` adds the served
        model's name. `hedge`: the answer is the same whoever gives it, so two may be asked. `near`: go where the others
        with this affinity went, which has what they share in its prefix cache.
        Raises ServerError when no server can be reached any more, or when the server would refuse every request (wrong
        key; wrong path or model name, unless the path is not `required`).
        """
        router, watch = self._inside()
        data = dumped(body)
        if named:
            # A server's own name for the model is put before it: the rest is made once.
            data = b"," + data[1:] if body else b"}"
        flight = Flight(path, data, named=named, kind=(path, body.get("max_tokens")), read=read)
        counted, last = 0.0, None
        try:
            while True:
                route = router.take(last, near) or await router.wait(last, near)
                flight.hedge = hedge and flight.copy is None and counted < self._retries.attempts
                try:
                    outcome = await self._attempt(router, watch, route, flight)
                    if flight.copy is not None and isinstance(outcome, Broken) and outcome.retryable:
                        await asyncio.wait([flight.copy])
                        outcome = flight.copied or outcome
                finally:
                    router.release(route)
                if isinstance(outcome, Reply):
                    return outcome
                if outcome.status in KEY_STATUS or (required and outcome.status in LOST_STATUS):
                    raise _lost(route, path, outcome)
                # While no server works, that is what ends the asking, not this request's share of bad luck.
                if not (router.dark and faulty(outcome)):
                    counted += BUSY_SHARE if outcome.status == BUSY_STATUS else 1.0
                if not outcome.retryable or counted > self._retries.attempts:
                    return outcome
                last = route
                pause_s = self._delay(flight.attempts, outcome.retry_after_s)
                await self._rest(min(pause_s, DARK_PAUSE_S) if router.dark else pause_s)
        finally:
            if flight.copy is not None:
                flight.copy.cancel()

    async def _rest(self, seconds: float) -> None:
        self._resting += 1
        try:
            await asyncio.sleep(seconds)
        finally:
            self._resting -= 1

    async def get(self, path: str) -> dict[str, Any] | None:
        """One GET of one server: its JSON object, or None for anything else. Not retried."""
        raw = await self._get(path)
        try:
            value = None if raw is None else orjson.loads(raw)
        except orjson.JSONDecodeError:
            return None
        return cast("dict[str, Any]", value) if isinstance(value, dict) else None

    async def get_text(self, path: str) -> str | None:
        """One GET of one server: its text, or None for anything but 200. Not retried."""
        raw = await self._get(path)
        return None if raw is None else raw.decode("utf-8", errors="replace")

    async def _get(self, path: str) -> bytes | None:
        router, _ = self._inside()
        route = await router.wait()
        try:
            answer = await route.origin.get(path, self._timeouts.request)
        except FAULTS:
            return None
        finally:
            router.release(route)
        return answer.body if answer.status == 200 else None

    async def post_once(self, path: str, body: Mapping[str, Any], *, named: bool = True) -> dict[str, Any] | None:
        """One POST to one server, of something that it may not know: its JSON object, or None for anything else.

        Not retried, and no reason to think ill of the server.
        """
        router, _ = self._inside()
        route = await router.wait()
        whole = {"model": route.backend.served_model, **body} if named else body
        try:
            async with asyncio.timeout(min(ONCE_S, self._timeouts.request)):
                answer = await route.origin.post(path, dumped(whole))
        except FAULTS:
            return None
        finally:
            router.release(route)
        outcome = read_answer(answer.body, 0.0, 1) if answer.status == 200 else None
        return outcome.value if isinstance(outcome, Reply) else None

    async def try_post(self, path: str, body: Mapping[str, Any], *, named: bool = True) -> dict[str, Any] | None:
        """POST to find out what a server can do: its JSON object, or None if it refuses, whatever the reason."""
        outcome = await self.post(path, body, named=named, required=False)
        return outcome.value if isinstance(outcome, Reply) else None

    def load(self) -> dict[str, Load]:
        """What each backend has now, by URL."""
        routes = () if self._entered is None else self._entered[0].routes
        return {
            r.backend.url: Load(
                in_flight=r.window.in_flight,
                answered=r.answered,
                limit=r.window.limit,
                why="ejected: " + r.last_fault if r.ejected else r.window.why,
                waiting=r.window.waiting,
                hedged=r.hedged,
            )
            for r in routes
        }

    def _inside(self) -> tuple[Router, Watch]:
        assert self._entered is not None, "the client is not entered"
        return self._entered

    async def _attempt(self, router: Router, watch: Watch, route: Route, flight: Flight) -> Reply | Broken:
        """One request to `route`, whose place the caller holds."""
        flight.attempts += 1
        flight.begin(route)
        watch.flights.add(flight)
        outcome: Reply | Broken
        try:
            data = route.opening + flight.data if flight.named else flight.data
            answer = await route.origin.post(flight.path, data)
            now = time.monotonic()
            if answer.status == 200:
                outcome = read_answer(answer.body, now - flight.started, flight.attempts, flight.read)
            else:
                outcome = read_refusal(answer, flight.attempts)
        except FAULTS as error:
            now = time.monotonic()
            outcome = _fault(told(error), flight, gone=refused(error))
        except asyncio.CancelledError:
            if not flight.ended():
                raise
            if flight.copied is not None:
                return flight.copied
            now = time.monotonic()
            gone = flight.verdict == GONE
            message = f"no answer from {route.backend.url} within {flight.age_s():.0f} s"
            if gone:
                message += ", and nobody listens there any more"
            outcome = _fault(message, flight, gone=gone, overloaded=not gone)
        finally:
            watch.flights.discard(flight)
        if isinstance(outcome, Reply):
            route.answered += 1
            route.window.answered(now)
            router.succeeded(route)
            watch.landed(flight.kind, outcome.latency_s)
        else:
            self._broke(router, route, outcome, now)
        return outcome

    @staticmethod
    def _broke(router: Router, route: Route, outcome: Broken, now: float) -> None:
        """What no answer says of the server."""
        if outcome.overloaded:
            route.window.refused(now, "time-outs" if outcome.status is None else f"HTTP {outcome.status}")
        if outcome.boundary is not Boundary.TRANSPORT:
            route.answered += 1
        at_fault = faulty(outcome)
        if at_fault or outcome.status == BUSY_STATUS:
            router.failed(route, outcome.message, gone=outcome.gone, busy=not at_fault)
        else:
            router.succeeded(route)

    def _launch(self, flight: Flight, route: Route) -> asyncio.Task[None]:
        """Send a copy of a flight to `route`, whose place is taken and given back at its end."""
        router, watch = self._inside()
        flight.attempts += 1
        route.hedged += 1
        task = asyncio.create_task(self._copy(router, watch, route, flight))
        task.add_done_callback(lambda _: router.release(route))
        return task

    async def _copy(self, router: Router, watch: Watch, route: Route, flight: Flight) -> None:
        twin = flight.twin()
        outcome = await self._attempt(router, watch, route, twin)
        if isinstance(outcome, Reply):
            flight.copied = outcome
            if flight in watch.flights:
                flight.end("a copy was faster")

    def _delay(self, attempts: int, retry_after_s: float | None) -> float:
        # Full jitter: many requests refused together must not come back together.
        backoff = random.uniform(0.0, min(self._retries.cap_s, self._retries.base_s * 2.0**attempts))
        if retry_after_s is None:
            return backoff
        return min(retry_after_s, self._retries.retry_after_cap_s) + backoff * 0.1


def _fault(message: str, flight: Flight, *, gone: bool, overloaded: bool = False) -> Broken:
    """There was no answer."""
    return Broken(
        boundary=Boundary.TRANSPORT,
        message=message,
        retryable=True,
        attempts=flight.attempts,
        overloaded=overloaded,
        gone=gone,
    )


def _lost(route: Route, path: str, outcome: Broken) -> ServerError:
    hints = {
        401: "check the API key (api_key_env of the model)",
        403: "check the API key (api_key_env of the model)",
        404: f"check the URL and the served model name {route.backend.served_model!r} (served_model of the model)",
        405: "check the URL: it must be the server's base, without /v1",
    }
    hint = "give the URL that it names" if outcome.status in MOVED_STATUS else hints.get(outcome.status or 0)
    return ServerError(f"{route.backend.url}{path} refuses every request: {outcome.message}", hint=hint)


def allow_connections(wanted: int) -> int:
    """Make room for so many connections as far as the system lets us; how many there may be."""
    if sys.platform == "win32":
        return wanted
    import resource  # noqa: PLC0415

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = wanted + _OTHER_FILES
    if soft == resource.RLIM_INFINITY or soft >= files:
        return wanted
    most = files if hard == resource.RLIM_INFINITY else max(soft, min(hard, files))
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    except (OSError, ValueError):
        most = soft
    return max(1, most - _OTHER_FILES)
