"""One server for checkpoint after checkpoint: the next one's weights are loaded into it, once that is seen to be right.

A worker starts a server for its first two checkpoints. Then it loads the first one's weights into the second one's
server: what that holds and says must equal, to every bit, what the first one's own server held and said. Only then are
the weights of a third one trusted to be those that were asked for. Whatever is not as it must be ends this for the run,
and a server is started anew.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from proctor.config.spec import OpenAIEngine, VllmServer
from proctor.errors import ServerError, StoreError
from proctor.infer.server import Server
from proctor.infer.servers.launched import LaunchedServer
from proctor.infer.servers.reload import State, Weights, probe_tokens
from proctor.records import digest
from proctor.worker.alike import unlike
from proctor.worker.build import adopt
from proctor.worker.events import EventLog
from proctor.worker.job import Job
from proctor.worker.run_directory import RunDirectory

_MAY_DIFFER: Final = ("model", "display_name", "weights", "resolution", "path", "served_model")
"""Of a job, where the server is the same."""


def reloads(job: Job) -> VllmServer | None:
    """The server of a job that may get other weights while it runs: as configured, on this machine, from a directory
    that needs no code of its own."""
    engine = job.engine_spec
    if not isinstance(engine, OpenAIEngine) or not isinstance(engine.server, VllmServer):
        return None
    plain = job.container is None and job.revision is None and not job.trust_remote_code
    return engine.server if engine.server.swap == "reload" and plain and Path(job.path).is_dir() else None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Held:
    """A server that is up and asked nothing."""

    job: Job
    server: LaunchedServer
    stack: contextlib.AsyncExitStack
    """Closing it stops the server."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Known:
    """What the fresh server of a checkpoint held and said."""

    job: Job
    states: tuple[State, ...]
    """Of each replica."""


class Handover:
    """Keeps the server of one job for the next. Use as an async context manager: leaving stops what is kept."""

    def __init__(self, directory: RunDirectory) -> None:
        self._directory = directory
        self._held: _Held | None = None
        self._known: _Known | None = None
        self._proven = False
        self.next: str | None = None
        """The job file of the model that may come next; None: no other comes."""

    async def __aenter__(self) -> Handover:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Stop the server that is kept, if there is one."""
        held, self._held = self._held, None
        if held is not None:
            await held.stack.aclose()

    async def keep(self, job: Job, server: Server | None, stack: contextlib.AsyncExitStack) -> None:
        """The job is done: keep its server for the next, or stop it. `stack` stops it when closed."""
        held = None
        if self.next is not None and isinstance(server, LaunchedServer) and self._given_up(job) is None:
            with contextlib.suppress(StoreError):  # it is told when that model's turn has come
                after = await asyncio.to_thread(Job.read, self._directory.jobs / self.next)
                if await asyncio.to_thread(_differs, job, after) is None:
                    held = _Held(job=job, server=server, stack=stack.pop_all())
        self._held = held

    async def take(self, job: Job, *, worker: str, events: EventLog) -> LaunchedServer | None:
        """The kept server, now with the weights of this job; None: none is kept any more, start one.

        Never raises ServerError: what goes wrong is told to `events`, and not tried again in this run.
        """
        held = self._held
        if held is None:
            return None
        why = await asyncio.to_thread(_differs, held.job, job)
        if why is None:
            try:
                if await self._load(held, job, events):
                    adopt(held.server, job, worker=worker)
                    events.reloaded = True
                    return held.server
            except ServerError as error:
                why = error.message
                await asyncio.to_thread(self._give_up, job, why)
        if why is not None:
            events.phase("starting", f"the weights are not loaded into the running server, another is started: {why}")
        await self.close()
        return None

    def owned(self, server: LaunchedServer) -> contextlib.AsyncExitStack:
        """What stops a server that was taken; from now on the caller does."""
        held, self._held = self._held, None
        assert held is not None and held.server is server
        return held.stack

    # --- proof ---

    async def _load(self, held: _Held, job: Job, events: EventLog) -> bool:
        """Whether the weights of `job` are in place now, as far as can be seen; False: nothing to go by yet."""
        spec = reloads(job)
        assert spec is not None
        tokens = await asyncio.to_thread(probe_tokens, held.job.path)
        if len(held.server.backends) != spec.replicas:
            raise ServerError("a replica is not up")
        replicas = [Weights(b, tokens, timeout_s=spec.start_timeout_s) for b in held.server.backends]
        before = await _states(replicas)
        known = self._known
        if known is None or await asyncio.to_thread(_differs, known.job, held.job) is not None:
            self._known, self._proven = _Known(job=held.job, states=before), False
            return False
        if not self._proven:
            events.phase("starting", f"loading {known.job.model!r} again, to see whether that gives its own answers")
            await self._prove(known, before, replicas)
        events.phase("starting", "loading the weights into the running server")
        await _together(replicas, job.path)
        now = await _states(replicas)
        if any(a.said == b.said or a.sums == b.sums for a, b in zip(before, now, strict=True)):
            raise ServerError("the server holds the weights that it held before")
        return True

    async def _prove(self, known: _Known, fresh: tuple[State, ...], replicas: list[Weights]) -> None:
        """Raises ServerError unless reloading gives exactly what starting gave. Another checkpoint is loaded now."""
        if any(a.said == b.said for a, b in zip(known.states, fresh, strict=True)):
            raise ServerError("two checkpoints give the same answers, by which they cannot be told apart")
        await _together(replicas, known.job.path)
        for number, (then, now) in enumerate(zip(known.states, await _states(replicas), strict=True)):
            where = f" (replica {number})" if len(replicas) > 1 else ""
            if wrong := [name for name, value in then.sums.items() if now.sums.get(name) != value]:
                raise ServerError(f"{len(wrong)} parameters differ from those of a fresh server{where}: {wrong[0]!r}")
            if then.said != now.said:
                raise ServerError(f"the same weights give other answers than on a fresh server{where}")
        self._proven = True

    # --- giving up ---

    def _mark(self, job: Job) -> Path:
        """Says that it failed with this engine; another engine may try."""
        return self._directory.root / f"no-reload-{digest(_alike(job))[:16]}"

    def _given_up(self, job: Job) -> str | None:
        with contextlib.suppress(OSError):
            return self._mark(job).read_text(encoding="utf-8")
        return None

    def _give_up(self, job: Job, why: str) -> None:
        self._known, self._proven = None, False
        with contextlib.suppress(OSError):
            self._mark(job).write_text(why, encoding="utf-8")


def _differs(one: Job, other: Job) -> str | None:
    """Why the server of `one` cannot be that of `other` too; None: it can. Blocks."""
    spec = reloads(one)
    if spec is None or reloads(other) is None:
        return "it is not one whose weights are reloaded"
    if _alike(one) != _alike(other):
        return "it is configured in another way"
    return unlike(one.path, other.path, spec.args)


def _alike(job: Job) -> Mapping[str, object]:
    return {name: value for name, value in asdict(job).items() if name not in _MAY_DIFFER}


async def _states(replicas: list[Weights]) -> tuple[State, ...]:
    return tuple(await asyncio.gather(*(one.state() for one in replicas)))


async def _together(replicas: list[Weights], path: str) -> None:
    await asyncio.gather(*(one.load(path) for one in replicas))
