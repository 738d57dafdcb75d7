"""The HTTP client: routing, the one layer of retries, and a decision for every class of fault whether a retry helps."""

from __future__ import annotations

import asyncio
import email.utils
import random
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Final, Self, cast

import aiohttp
import orjson

from proctor.errors import ServerError
from proctor.infer.concurrency import AdaptiveLimiter
from proctor.infer.routing import Route, Router
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """A JSON object that a server answered with 200, and that is no error."""

    value: dict[str, Any]
    latency_s: float
    """Of the attempt that succeeded."""
    attempts: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Broken:
    """No answer: which boundary broke, and whether asking again later can help."""

    boundary: Boundary
    message: str
    retryable: bool
    attempts: int = 1
    status: int | None = None
    retry_after_s: float | None = None
    overloaded: bool = False
    gone: bool = False
    """Nobody listens there."""


RETRY_STATUS: Final = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
OVERLOAD_STATUS: Final = frozenset({429, 503, 529})
BUSY_STATUS: Final = 429
"""The server works, and has too much to do: counted against it where others could do it."""
KEY_STATUS: Final = frozenset({401, 403})
"""No request to this server can succeed."""
LOST_STATUS: Final = frozenset({404, 405})
"""No request to this path can succeed."""

DARK_PAUSE_S: Final = 2.0
"""The longest pause while no server works: one that is back must not wait for those who wait for it."""

_CONTEXT: Final = re.compile(
    r"context[ _]?(length|size|window)|maximum (model|input|prompt) length|max_model_len|too (long|many tokens)"
    r"|longer than the (maximum|model)|exceed_context",
    re.IGNORECASE,
)
_EXCERPT: Final = 300


class Client:
    """An async context manager around one session to several backends. Keys travel in headers and are never logged."""

    def __init__(
        self,
        backends: Callable[[], Sequence[Backend]],
        *,
        timeouts: Timeouts = Timeouts(),
        retries: Retries = Retries(),
        max_in_flight: int = 64,
    ) -> None:
        self.limiter = AdaptiveLimiter(max_in_flight)
        self._backends = backends
        self._timeout = aiohttp.ClientTimeout(total=timeouts.request, sock_connect=timeouts.connect)
        self._retries = retries
        self._session: aiohttp.ClientSession | None = None
        self._router: Router | None = None
        self._ending = False

    async def __aenter__(self) -> Self:
        # The limiter bounds the connections; the connector need not queue as well.
        self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=self._timeout)
        self._router = Router(self._session, self._backends, unreachable_s=self._retries.unreachable_s)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._router is not None:
            await self._router.close()
        if self._session is not None:
            await self._session.close()
        self._session = self._router = None

    @property
    def limit(self) -> int:
        """How many requests the client would have in flight now, over all backends."""
        return self.limiter.limit

    def tail(self, ending: bool = True) -> None:
        """Say whether the source is exhausted: nothing comes any more but what is under way. False: more may come.

        From then on a request that takes much longer than others is asked of a second backend too, if `post` was told
        that it may be.
        """
        self._ending = ending

    async def post(
        self, path: str, body: Mapping[str, Any], *, named: bool = True, required: bool = True, hedge: bool = False
    ) -> Reply | Broken:
        """POST `body` until it is answered, refused for good, or out of retries.

        `named` adds the served model's name. `hedge`: the answer is the same whoever gives it, so two may be asked.
        Raises ServerError when no server can be reached any more, or when the
        server would refuse every request (wrong key; wrong path or model name, unless the path is not `required`).
        """
        attempts, counted, last = 0, 0, None
        while True:
            route = await self._pick(last)
            outcome = await self._attempt(route, path, body, named=named)
            attempts += 1
            if isinstance(outcome, Reply):
                return replace(outcome, attempts=attempts)
            if outcome.status in KEY_STATUS or (required and outcome.status in LOST_STATUS):
                raise _lost(route, path, outcome)
            # While no server works, that is what ends the asking, not this request's share of bad luck.
            counted += not (_faulty(outcome) and self._dark())
            if not outcome.retryable or counted > self._retries.attempts:
                return replace(outcome, attempts=attempts)
            last = route
            pause_s = self._delay(attempts, outcome.retry_after_s)
            await asyncio.sleep(min(pause_s, DARK_PAUSE_S) if self._dark() else pause_s)

    async def get(self, path: str) -> dict[str, Any] | None:
        """One GET of one server: its JSON object, or None for anything else. Not retried."""
        route = await self._pick(None)
        assert self._session is not None
        try:
            async with self._session.get(route.backend.url + path, headers=route.headers) as response:
                value = orjson.loads(await response.read()) if response.status == 200 else None
        except (aiohttp.ClientError, OSError, TimeoutError, orjson.JSONDecodeError):
            return None
        return cast("dict[str, Any]", value) if isinstance(value, dict) else None

    async def get_text(self, path: str) -> str | None:
        """One GET of one server: its text, or None for anything but a 200. Not retried."""
        route = await self._pick(None)
        assert self._session is not None
        try:
            async with self._session.get(route.backend.url + path, headers=route.headers) as response:
                return await response.text() if response.status == 200 else None
        except (aiohttp.ClientError, OSError, TimeoutError, UnicodeDecodeError):
            return None

    async def try_post(self, path: str, body: Mapping[str, Any], *, named: bool = True) -> dict[str, Any] | None:
        """POST to find out what a server can do: its JSON object, or None if it refuses, whatever the reason."""
        outcome = await self.post(path, body, named=named, required=False)
        return outcome.value if isinstance(outcome, Reply) else None

    def load(self) -> dict[str, Load]:
        """What each backend has now, by URL."""
        routes = () if self._router is None else self._router.routes
        return {r.backend.url: Load(in_flight=r.in_flight, answered=r.answered) for r in routes}

    def _dark(self) -> bool:
        return self._router is not None and self._router.dark

    async def _pick(self, avoid: Route | None) -> Route:
        assert self._router is not None, "the client is not entered"
        return await self._router.pick(avoid)

    async def _attempt(self, route: Route, path: str, body: Mapping[str, Any], *, named: bool) -> Reply | Broken:
        assert self._router is not None
        whole = {"model": route.backend.served_model, **body} if named else body
        data = orjson.dumps(whole)
        await self.limiter.acquire()
        route.in_flight += 1
        overloaded = False
        try:
            outcome = await self._send(route, path, data)
            overloaded = isinstance(outcome, Broken) and outcome.overloaded
        finally:
            route.in_flight -= 1
            self.limiter.release(overloaded=overloaded)
        if isinstance(outcome, Reply) or outcome.boundary is not Boundary.TRANSPORT:
            route.answered += 1
        if isinstance(outcome, Broken) and (_faulty(outcome) or outcome.status == BUSY_STATUS):
            self._router.failed(route, outcome.message, gone=outcome.gone, busy=not _faulty(outcome))
        else:
            self._router.succeeded(route)
        return outcome

    async def _send(self, route: Route, path: str, data: bytes) -> Reply | Broken:
        assert self._session is not None
        started = time.monotonic()
        try:
            async with self._session.post(route.backend.url + path, data=data, headers=route.headers) as response:
                raw = await response.read()
        except TimeoutError as error:
            message = f"no answer from {route.backend.url} within {time.monotonic() - started:.0f} s"
            connected = not isinstance(error, aiohttp.ConnectionTimeoutError)
            return Broken(boundary=Boundary.TRANSPORT, message=message, retryable=True, overloaded=connected)
        except (aiohttp.ClientError, OSError) as error:
            message = f"{type(error).__name__}: {error}"
            refused = isinstance(getattr(error, "os_error", error), ConnectionRefusedError)
            return Broken(boundary=Boundary.TRANSPORT, message=message, retryable=True, gone=refused)
        if response.status != 200:
            return _refusal(response.status, raw, response.headers)
        return _read(raw, time.monotonic() - started)

    def _delay(self, attempts: int, retry_after_s: float | None) -> float:
        # Full jitter: many requests refused together must not come back together.
        backoff = random.uniform(0.0, min(self._retries.cap_s, self._retries.base_s * 2.0**attempts))
        if retry_after_s is None:
            return backoff
        return min(retry_after_s, self._retries.retry_after_cap_s) + backoff * 0.1


def _read(raw: bytes, latency_s: float) -> Reply | Broken:
    try:
        value = orjson.loads(raw)
    except orjson.JSONDecodeError:
        return _malformed("the answer is no whole JSON text", raw)
    if isinstance(value, list):
        # llama.cpp answers a list of prompts with a list.
        value = {"answers": cast("list[Any]", value)}
    if not isinstance(value, dict):
        return _malformed("the answer is no JSON object", raw)
    answer = cast("dict[str, Any]", value)
    if answer.get("error") or answer.get("object") == "error":
        return _malformed("the answer is an error with status 200", raw)
    return Reply(value=answer, latency_s=latency_s, attempts=1)


def _malformed(what: str, raw: bytes) -> Broken:
    return Broken(boundary=Boundary.SERVER, message=f"{what}: {_excerpt(raw)}", retryable=True, status=200)


def _refusal(status: int, raw: bytes, headers: Mapping[str, str]) -> Broken:
    message = f"HTTP {status}: {_excerpt(raw)}"
    if status in RETRY_STATUS or status >= 500:
        if status >= 500 and _CONTEXT.search(message):
            # Some servers answer 500 to a prompt that is too long.
            return Broken(boundary=Boundary.CONTEXT, message=message, retryable=False, status=status)
        return Broken(
            boundary=Boundary.SERVER,
            message=message,
            retryable=True,
            status=status,
            retry_after_s=_retry_after(headers.get("Retry-After")),
            overloaded=status in OVERLOAD_STATUS,
        )
    boundary = Boundary.CONTEXT if status == 413 or _CONTEXT.search(message) else Boundary.REFUSED
    return Broken(boundary=boundary, message=message, retryable=False, status=status)


def _faulty(outcome: Broken) -> bool:
    """Whether the outcome speaks against the server rather than for its being busy or the request being bad."""
    if outcome.boundary is Boundary.TRANSPORT:
        return True
    return outcome.status is not None and outcome.status >= 500 and outcome.boundary is Boundary.SERVER


def _retry_after(value: str | None) -> float | None:
    """Seconds from a Retry-After header: a number or an HTTP date (RFC 9110, 10.2.3)."""
    if value is None:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return None


def _excerpt(raw: bytes) -> str:
    text = raw[: 4 * _EXCERPT].decode("utf-8", errors="replace")
    try:
        value = orjson.loads(raw)
    except orjson.JSONDecodeError:
        return text[:_EXCERPT]
    if isinstance(value, dict):
        inner = cast("dict[str, Any]", value)
        error = inner.get("error", inner)
        if isinstance(error, dict):
            details = cast("dict[str, Any]", error)
            text = str(details.get("message") or details)
        else:
            text = str(error)
    return text[:_EXCERPT]


def _lost(route: Route, path: str, outcome: Broken) -> ServerError:
    hints = {
        401: "check the API key (api_key_env of the model)",
        403: "check the API key (api_key_env of the model)",
        404: f"check the URL and the served model name {route.backend.served_model!r} (served_model of the model)",
        405: "check the URL: it must be the server's base, without /v1",
    }
    return ServerError(
        f"{route.backend.url}{path} refuses every request: {outcome.message}", hint=hints.get(outcome.status or 0)
    )
