"""`python -m proctor.worker.client_process RUN_DIRECTORY FD`: one more process that asks the servers of a worker.

See `worker.clients`, whose end of the link tells what to do and where the servers are. Nothing but the link ends it:
signals that a whole job gets are for the worker, who says what they mean. SIGTERM is that of its guard.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from proctor.errors import Incomplete, ProctorError
from proctor.infer.openai import OpenAIEngine
from proctor.infer.server import Backend
from proctor.processes.exchange import error_of
from proctor.processes.garbage import collect_seldom
from proctor.processes.link import Link
from proctor.records import EngineInfo
from proctor.store import Store
from proctor.worker.attempt import Attempt
from proctor.worker.build import engine_for
from proctor.worker.clients import Orders
from proctor.worker.events import Event, EventLog
from proctor.worker.job import Job
from proctor.worker.run_directory import RunDirectory
from proctor.worker.scheduler import scheduler_here
from proctor.worker.session import Session
from proctor.worker.share import Share

_IGNORED: Final = (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class TheirServer:
    """Implements `infer.server.Server`: the worker's, as the worker tells of it."""

    def __init__(self, link: Link, told: dict[str, Any]) -> None:
        self._link = link
        self._turn = asyncio.Lock()
        self._answer: asyncio.Future[dict[str, Any]] | None = None
        self._take(told)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    @property
    def backends(self) -> tuple[Backend, ...]:
        return self._backends

    @property
    def info(self) -> EngineInfo:
        return self._info

    async def ensure(self) -> None:
        """Let the worker look, and restart what died. Raises ServerError as there."""
        async with self._turn:
            self._answer = asyncio.get_running_loop().create_future()
            self._link.send({"ensure": True})
            self._take(await self._answer)

    def hear(self, answer: dict[str, Any]) -> None:
        """What the worker says of the server."""
        if self._answer is not None and not self._answer.done():
            self._answer.set_result(answer)

    def _take(self, told: dict[str, Any]) -> None:
        if "error" in told:
            raise error_of(told["error"])
        self._backends = tuple(Backend(**one) for one in told["backends"])
        self._info = EngineInfo(**told["info"])


class ClientProcess:
    """The process's own side."""

    def __init__(self, directory: RunDirectory, link: Link, told: dict[str, Any]) -> None:
        self._directory = directory
        self._orders = Orders(**told["orders"])
        self._number: int = told["number"]
        self._link = link
        self._server = TheirServer(link, told)
        self._engine: OpenAIEngine | None = None
        self._session: Session | None = None
        self._draining = False
        self._in_flight = 1  # until the worker says how many may be

    async def work(self) -> None:
        """Ask what nobody else does, until nothing of that is left. Raises ProctorError."""
        orders, directory = self._orders, self._directory
        job = Job.read(directory.jobs / orders.job)
        scheduler = await asyncio.to_thread(scheduler_here, os.environ) if orders.slurm else None
        attempt = Attempt.here(orders.index, os.environ, scheduler)
        store = Store.open(Path(job.store), create=False, alive=attempt.alive())
        owner = attempt.owner(job.run)
        worker = f"{job.job_id}-{attempt.label}.client-{self._number}"
        engine = engine_for(job, self._server, worker=worker)
        assert isinstance(engine, OpenAIEngine)
        engine.allow(self._in_flight)
        self._engine = engine
        # What others hold at its end, the worker waits for.
        share = Share(
            retry_failed=orders.retry_failed,
            retry_reasons=frozenset(orders.retry_reasons),
            begin=self._number,
            linger_s=0.0,
        )
        async with (
            store.writer(job.weights, job.resolution, owner=owner) as writer,
            engine,
        ):
            with EventLog(self._tell, worker=worker, model=job.model) as events:
                events.load = engine.load
                session = await share.session(
                    directory, job, store, owner=owner, writer=writer, engine=engine, events=events
                )
                session.server = self._server
                self._session = session
                if self._draining:
                    session.drain()
                try:
                    await session.work()
                except ProctorError as error:
                    events.failed(error)
                    raise
                events.phase("done")

    async def listen(self) -> None:
        """Do what the worker says, until it says nothing any more."""
        while (message := await self._link.receive()) is not None:
            match message:
                case {"drain": _}:
                    self._draining = True
                    if self._session is not None:
                        self._session.drain()
                case {"allow": share}:
                    self._in_flight = share
                    if self._engine is not None:
                        self._engine.allow(share)
                case _:
                    self._server.hear(message)

    def _tell(self, event: Event) -> None:
        load = {} if self._engine is None else {url: asdict(one) for url, one in self._engine.load().items()}
        slowest_s = 0.0 if self._session is None else self._session.slowest_s
        self._link.send({"event": asdict(event), "load": load, "slowest_s": slowest_s})


async def serve(directory: RunDirectory, fd: int) -> int:
    """Work and listen; the exit code."""
    link = await Link.over(socket.socket(fileno=fd))
    told = await link.receive()
    if told is None:
        return 0
    process = ClientProcess(directory, link, told)
    working, listening = asyncio.create_task(process.work()), asyncio.create_task(process.listen())

    def end(_: object = None) -> None:
        # Once: what is given back and sealed at the end is not to be interrupted.
        if not working.cancelling():
            working.cancel()

    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, end)
    listening.add_done_callback(end)
    try:
        await working
    except ProctorError as error:
        link.send({"failed": str(error)})
        return error.exit_code
    except asyncio.CancelledError:
        return Incomplete.exit_code
    else:
        link.send({"done": True})
        return 0
    finally:
        await link.flush()
        listening.cancel()
        await asyncio.gather(listening, return_exceptions=True)
        link.close()


def main(arguments: list[str]) -> int:
    """Run one; the exit code is the error's."""
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)
    collect_seldom()
    return asyncio.run(serve(RunDirectory(Path(arguments[0])), int(arguments[1])))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
