"""More processes that ask a worker's servers, where one core is not enough for the asking.

Each is `worker.client_process`: with a session and a journal of its own, it claims and asks as any worker does, over
the same store. What it does not have is the server: that is this worker's, who says where it is, and restarts it when
somebody asks for that. A process that dies costs nothing but its speed: its claims end with it, and what it had not
answered is asked by the others.
"""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from types import TracebackType
from typing import Any, Final, Self

from proctor.errors import ProctorError
from proctor.infer.openai import OpenAIEngine
from proctor.infer.server import Load, Server
from proctor.processes.group import ProcessGroup, last_words
from proctor.processes.link import Link
from proctor.worker.events import Event, EventLog
from proctor.worker.run_directory import RunDirectory

MODULE: Final = "proctor.worker.client_process"
GRACE_S: Final = 10.0
"""Between the word to end and SIGKILL: to give back claims and to seal a journal."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Orders:
    """What all client processes of one worker are told."""

    job: str
    """Name of a file in the run's `jobs/`."""
    index: int
    """Of the worker."""
    slurm: bool
    """Whether it works for a Slurm job, whose word on other jobs it asks for."""
    retry_failed: bool = False
    retry_reasons: Sequence[str] = ()


@dataclass(slots=True, eq=False)
class _Client:
    """One process."""

    number: int
    group: ProcessGroup
    link: Link
    said: Event | None = None
    """Its latest event: counters."""
    load: dict[str, Load] = field(default_factory=dict[str, Load])
    slowest_s: float = 0.0
    working: bool = True


class ClientProcesses:
    """All of them. Use as an async context manager: leaving ends those that still work."""

    def __init__(
        self, directory: RunDirectory, orders: Orders, *, max_in_flight: int, worker: str, events: EventLog
    ) -> None:
        """`max_in_flight`: what each server gets at most from all of them and this process. None is started yet."""
        self._directory = directory
        self._orders = orders
        self._max_in_flight = max_in_flight
        self._worker = worker
        self._events = events
        self.engine: OpenAIEngine | None = None
        """Of this process, which asks too."""
        self._asking = True
        self._clients: list[_Client] = []
        self._listening: set[asyncio.Task[None]] = set()
        events.beside = self.said

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for client in self._clients:
            client.link.close()
        # Each ends by itself when its link closes; the group makes sure.
        await asyncio.gather(*(client.group.stop() for client in self._clients))
        for task in self._listening:
            task.cancel()
        await asyncio.gather(*self._listening, return_exceptions=True)

    async def start(self, count: int, server: Server) -> None:
        """Start so many, to ask a server that is up; fewer where the system refuses them."""
        try:
            for number in range(1, count + 1):
                client = await self._start(number)
                client.link.send({"orders": asdict(self._orders), "number": number, **_where(server)})
                self._clients.append(client)
                self._listening.add(asyncio.create_task(self._listen(client, server)))
        except OSError as error:
            self._events.say(f"no client process {len(self._clients) + 1} can be started: {error.strerror}")
        self._deal()

    def _deal(self) -> None:
        """Let each process that asks have as much in flight as the others."""
        working = [client for client in self._clients if client.working]
        share = max(1, self._max_in_flight // max(1, len(working) + self._asking))
        for client in working:
            client.link.send({"allow": share})
        if self.engine is not None:
            self.engine.allow(share)

    async def _start(self, number: int) -> _Client:
        ours, theirs = socket.socketpair()
        link = await Link.over(ours)
        with theirs:
            group = await ProcessGroup.start(
                (sys.executable, "-m", MODULE, str(self._directory.root), str(theirs.fileno())),
                env=os.environ,
                log=self._directory.logs / f"{self._worker}.client-{number}.log",
                grace_s=GRACE_S,
                pass_fds=(theirs.fileno(),),
            )
        return _Client(number, group, link)

    def drain(self) -> None:
        """Let all of them take nothing new."""
        for client in self._clients:
            client.link.send({"drain": True})

    async def finished(self) -> None:
        """Wait until all of them have ended, while this process asks nothing. What one of them has left is owed."""
        self._asking = False
        self._deal()
        if self._listening:
            await asyncio.wait(self._listening)

    @property
    def working(self) -> bool:
        """Whether one of them still works."""
        return any(client.working for client in self._clients)

    def load(self) -> dict[str, Load]:
        """What all have together with each server."""
        total = {} if self.engine is None else self.engine.load()
        for client in self._clients:
            for url, one in client.load.items():
                total[url] = _both(total[url], one) if url in total else one
        return total

    def said(self) -> Sequence[Event]:
        """What each of them said last."""
        return [client.said for client in self._clients if client.said is not None]

    @property
    def slowest_s(self) -> float:
        """As `Session.slowest_s`, of all of them."""
        return max((client.slowest_s for client in self._clients), default=0.0)

    # --- one of them ---

    async def _listen(self, client: _Client, server: Server) -> None:
        """Take in what it says, until it ends."""
        parted = False
        try:
            while (message := await client.link.receive()) is not None:
                parted = await self._hear(client, message, server) or parted
        finally:
            client.working, client.slowest_s, client.load = False, 0.0, {}
            self._deal()
        code = await client.group.wait()
        if not parted:
            words = last_words(client.group.log)
            self._events.say(
                f"client process {client.number} ended with status {code}, this one goes on\n{words}".rstrip()
            )

    async def _hear(self, client: _Client, message: dict[str, Any], server: Server) -> bool:
        """Take in one message; whether it is the last one."""
        match message:
            case {"event": event, "load": load, "slowest_s": slowest_s}:
                client.said = Event(**event)
                client.load = {url: Load(**one) for url, one in load.items()}
                client.slowest_s = slowest_s
                self._events.tick()
            case {"ensure": _}:
                client.link.send(await _ensured(server))
            case {"failed": text}:
                self._events.say(f"client process {client.number} ended, this one goes on: {text}")
                return True
            case _:  # done
                return True
        return False


async def _ensured(server: Server) -> dict[str, Any]:
    try:
        await server.ensure()
    except ProctorError as error:
        return {"error": error.report}
    return _where(server)


def _where(server: Server) -> dict[str, Any]:
    """Where to ask, and what answers: keys too, which no command line and no file may show."""
    return {"backends": [asdict(one) for one in server.backends], "info": asdict(server.info)}


def _both(one: Load, other: Load) -> Load:
    """The sum; what the server says of itself, both say."""
    return replace(
        one,
        in_flight=one.in_flight + other.in_flight,
        answered=one.answered + other.answered,
        limit=one.limit + other.limit,
        waiting=one.waiting if one.waiting is not None else other.waiting,
        hedged=one.hedged + other.hedged,
    )
