"""Asking a server whether it is up, and watching one that starts."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Final, cast

import aiohttp

from proctor.errors import ServerError
from proctor.infer.origin import told
from proctor.infer.servers.hints import find_cause, killed_hint
from proctor.processes.group import ProcessGroup, last_words

_POLL_FIRST_S: Final = 0.05
_POLL_LONGEST_S: Final = 0.4
"""What a server that is up may wait for its first request."""
_QUIET_S: Final = 60.0
"""A start-up that shows no sign of life for so long is called stalled when its time is up."""
_AGAIN_S: Final = 0.5
"""After this pause a server that did not answer is asked again what it is."""


class StartState(StrEnum):
    """Where a server stands that is not ready; part of every start-up error."""

    STARTING = "starting"
    """Still writing to its log or computing when its time was up."""
    STALLED = "stalled"
    """Alive, but neither writing nor computing."""
    FAILED = "failed"
    """Ended by itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StartLimits:
    """How long a start-up may take (seconds)."""

    whole_s: float = 600.0
    stalled_s: float = 300.0
    """Without any output and less than a hundredth of a core: given up early."""
    request_s: float = 5.0
    """One health question; a server that loads may be slow to answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """What one GET brought. `status` 0: no HTTP answer, and `error` says why."""

    status: int
    text: str = ""
    error: str = ""
    refused: bool = False
    """Nobody listens there."""

    @property
    def ok(self) -> bool:
        return 200 <= self.status < 300

    def field(self, name: str) -> Any:
        """One field of the body, where that is a JSON object; else None."""
        return field_of(self._json(), name) if self.ok else None

    def _json(self) -> Any:
        try:
            return json.loads(self.text)
        except ValueError:
            return None


class Probe:
    """Short questions to one base URL. Never raises for what the other side does."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        url: str,
        api_key: str | None,
        timeout_s: float,
        *,
        proxy: str | None = None,
    ) -> None:
        self._session = session
        self._proxy = proxy
        self._headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        self._timeout = aiohttp.ClientTimeout(total=timeout_s)
        self.url: Final = url

    async def get(self, path: str) -> Reply:
        """GET `path` (with its leading slash)."""
        try:
            async with self._session.get(
                self.url + path, headers=self._headers, timeout=self._timeout, proxy=self._proxy
            ) as response:
                body = await response.read()
                return Reply(status=response.status, text=body.decode("utf-8", errors="replace"))
        except aiohttp.ClientConnectorError as error:
            return Reply(status=0, error=str(error), refused=isinstance(error.os_error, ConnectionRefusedError))
        except TimeoutError:
            return Reply(status=0, error=f"no answer within {self._timeout.total:g} s")
        except (aiohttp.ClientError, ValueError) as error:
            return Reply(status=0, error=told(error))

    async def learn(self, path: str) -> Reply:
        """`get`, once more if nothing answered: for what a server says of itself, which its answers are kept with."""
        reply = await self.get(path)
        if reply.status == 0:
            await asyncio.sleep(_AGAIN_S)
            reply = await self.get(path)
        return reply


def listed_names(reply: Reply) -> list[str] | None:
    """The model ids in an answer of /v1/models; None if it is no such answer."""
    entries = reply.field("data")
    if not isinstance(entries, list):
        return None
    names = [field_of(entry, "id") for entry in cast(list[Any], entries)]
    return [name for name in names if isinstance(name, str)]


def field_of(value: Any, name: str) -> Any:
    """`value[name]` if `value` is a JSON object that has it; else None."""
    return cast(dict[str, Any], value).get(name) if isinstance(value, dict) else None


class LifeSigns:
    """Notices whether a process group still does something: log growth or CPU time."""

    def __init__(self, group: ProcessGroup) -> None:
        self._group = group
        self._size: int = -1
        self._cpu_s: float = 0.0
        self._looked = self.last = time.monotonic()

    def quiet_s(self) -> float:
        """Seconds since the last sign of life. Looks at most once a second."""
        now = time.monotonic()
        if now - self._looked >= 1.0 or self._size < 0:
            size, cpu_s = _log_size(self._group.log), self._group.cpu_seconds()
            busy = abs(cpu_s - self._cpu_s) > 0.01 * (now - self._looked)
            if size != self._size or busy:
                self.last = now
            self._size, self._cpu_s, self._looked = size, cpu_s, now
        return now - self.last


async def wait_until_healthy(
    group: ProcessGroup, probe: Probe, *, what: str, health: str, port: int | None, limits: StartLimits
) -> None:
    """Poll `health` until it answers 2xx; with `port`, until one of the group's own processes listens there.

    Raises ServerError with the state, a hint, the log's path and its last lines when the server ends, shows
    no sign of life for too long, or takes longer than its time.
    """
    signs, deadline, pause = LifeSigns(group), time.monotonic() + limits.whole_s, _POLL_FIRST_S
    answer = "has not answered"
    while True:
        if group.returncode is not None:
            raise start_error(what, StartState.FAILED, group, f"ended with exit status {group.returncode}")
        reply = await _ask_while_it_lives(group, probe, health)
        if reply.ok:
            # Somebody else may have taken the port first and be answering in our server's place.
            if port is None or group.listens_on(port) is not False:
                return
            answer = f"another process answers on port {port}"
        elif reply.status:
            answer = f"{health} answers HTTP {reply.status}"
        elif not reply.refused:
            answer = reply.error
        quiet_s = signs.quiet_s()
        if quiet_s > limits.stalled_s:
            raise start_error(
                what, StartState.STALLED, group, f"no output and no computing for {quiet_s:.0f} s; {answer}"
            )
        if time.monotonic() > deadline:
            state = StartState.STALLED if quiet_s > _QUIET_S else StartState.STARTING
            raise start_error(what, state, group, f"not up after {limits.whole_s:g} s; {answer}")
        await asyncio.sleep(pause)
        pause = min(pause * 1.5, _POLL_LONGEST_S)


async def _ask_while_it_lives(group: ProcessGroup, probe: Probe, path: str) -> Reply:
    """One question, given up as soon as the group ends: who answers slowly then is somebody else."""
    asking, living = asyncio.ensure_future(probe.get(path)), asyncio.ensure_future(group.wait())
    try:
        await asyncio.wait([asking, living], return_when=asyncio.FIRST_COMPLETED)
    finally:
        living.cancel()
        asking.cancel()
        await asyncio.wait([asking, living])
    return Reply(status=0, error="it ended") if asking.cancelled() else asking.result()


_STATE_HINTS: Final = {
    StartState.STARTING: "it was still busy: raise `engine.server.start_timeout_s` if it only needs longer",
    StartState.STALLED: "it hangs: a download without network, a lock of another process, or a port that it "
    "does not listen on",
    StartState.FAILED: "see the log",
}


def start_error(what: str, state: StartState, group: ProcessGroup, happened: str) -> ServerError:
    """The error of a server that did not come up: state, what the log says about the cause, its last lines."""
    cause = find_cause(group.log)
    hint = cause.hint if cause else killed_hint(group.returncode) or _STATE_HINTS[state]
    named = f" ({cause.name})" if cause else ""
    message = f"{what} {state}: {happened}{named}{describe_log(group.log)}"
    return ServerError(message, hint=hint, state=state.value, log=str(group.log))


def describe_log(log: Path) -> str:
    """Lines to append to an error: the log's path and its end."""
    text = last_words(log)
    shown = "\n".join("    " + line for line in text.splitlines()) if text else "    (empty)"
    return f"\n  log: {log}\n{shown}"


def _log_size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
