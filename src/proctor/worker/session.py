"""One worker at work on one model: feed the engine, keep every answer, keep the server up, obey signals."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace

from proctor.errors import ProbeError, ServerError
from proctor.infer.engine import Engine
from proctor.infer.server import Server
from proctor.records import METHODS, Answer, Failure, Response
from proctor.store import Writer
from proctor.worker.events import EventLog
from proctor.worker.feed import Feed

LIVENESS_S = 1.0
"""Between two looks at the server's processes: a dead server is noticed long before a request times out."""

GATHER_S = 0.02
"""Answers wait so long for others to be kept with: a wait for the disk costs the same for one as for a hundred."""
GATHER_FROM = 32
"""Only with so many in flight: what a kill costs is what is in flight, and must not become a multiple of it."""

RECENT = 256
"""So many of the latest answers say how long one takes."""

ENGINE_BREAKS = 3
"""How often an engine may be lost as a whole, without one answer in between, before the worker gives up."""


@dataclass(slots=True)
class Outcome:
    """What a session did."""

    answered: int = 0
    aliased: int = 0
    failed: int = 0
    drained: bool = False
    left: bool = True
    """Whether something may still be owed."""


class Session:
    """Runs one worker's share. Everything acknowledged is in the store, whatever happens to the rest."""

    def __init__(
        self,
        *,
        feed: Feed,
        writer: Writer,
        engine: Engine,
        events: EventLog,
        server: Server | None = None,
        linger_s: float | None = None,
    ) -> None:
        """`server`: to be kept up; may be set later, before `work`.

        `linger_s`: how long to wait at the end for requests that others are asking; None: until they have ended.
        """
        self.server = server
        self.helped: Callable[[], bool] = lambda: False
        """Whether processes work that have this one's server: for what they are asking, it stays."""
        self._feed = feed
        feed.keep = self
        self._writer = writer
        self._engine = engine
        self._events = events
        self._named: set[str] = set()
        self._arrived: list[Answer] = []
        self._keeping: asyncio.Task[None] | None = None
        self._broken: asyncio.Future[None] | None = None
        self._linger_s = linger_s
        self._latencies: deque[float] = deque(maxlen=RECENT)
        self.outcome = Outcome()

    @property
    def slowest_s(self) -> float:
        """The longest that one of the latest answers took, or has taken so far, in seconds.

        From when the engine took it: an engine takes more than it asks at a time.
        """
        oldest = self._feed.age_s()
        return max(oldest, *self._latencies) if self._latencies else oldest

    def drain(self) -> None:
        """Take nothing new; finish and keep what is in flight."""
        self.outcome.drained = True
        self._feed.draining.set()
        self._events.phase("draining")

    async def prepare(self) -> None:
        """Render and tokenise what is likely to be asked first, where that needs no server. Raises StoreError."""
        if self._engine.resolves_alone:
            await self._feed.look_ahead()

    async def work(self) -> Outcome:
        """Ask everything that the shards owe. Raises ServerError, StoreError; what was kept stays kept."""
        self._broken = asyncio.get_running_loop().create_future()
        self._events.phase("asking")
        asking = asyncio.create_task(self._ask(self._feed))
        watching = asyncio.create_task(self._watch())
        try:
            await asyncio.wait({asking, watching, self._broken}, return_when=asyncio.FIRST_COMPLETED)
            for first in (self._broken, watching, asking):
                if first.done():
                    first.result()
            return self.outcome
        finally:
            for task in (asking, watching):
                task.cancel()
            await asyncio.gather(asking, watching, return_exceptions=True)
            await self._flush()
            self.outcome.left = self._feed.left
            await self._feed.close()
            if not self._broken.done():
                self._broken.cancel()
            elif not self._broken.cancelled():
                self._broken.exception()  # seen: what ended the session first is what is raised

    async def alias(self, key: str, physical_key: str) -> None:
        """Record an owed request whose physical request is answered already."""
        await self._writer.alias(key, physical_key)
        self.outcome.aliased += 1
        self._events.aliased()

    async def failure(self, failure: Failure) -> None:
        """Record a request that cannot be asked."""
        await self._writer.append(failure)
        self.outcome.failed += 1
        self._events.answered([failure], in_flight=0)

    async def _ask(self, feed: Feed) -> None:
        breaks = 0
        while True:
            before = self.outcome.answered
            try:
                async for answer in self._engine.run(feed.take()):
                    self._arrived.append(answer)
                    if self._keeping is None:
                        self._keeping = asyncio.create_task(self._keep_arrived(feed))
                        self._keeping.add_done_callback(self._kept)
                await self._flush()
                if feed.outstanding:
                    raise ServerError(f"the engine ended with {feed.outstanding} requests unanswered")
                if not await self._wait_for_others(feed):
                    return
            except ProbeError:
                raise  # no restart makes a server that answers wrongly answer rightly
            except ServerError:
                await self._flush()  # an answer counts as progress once it is durable
                breaks = 1 if self.outcome.answered > before else breaks + 1
                if self.server is None or breaks >= ENGINE_BREAKS or self.outcome.drained:
                    raise
                await self.server.ensure()

    async def _wait_for_others(self, feed: Feed) -> bool:
        if not feed.deferred:
            return False
        self._events.phase("waiting", f"{feed.deferred} requests are being asked by others")
        try:
            while not await feed.more(timeout_s=self._linger_s):
                if self.outcome.drained or not feed.deferred or not self.helped():
                    return False
            return True
        finally:
            self._events.phase("draining" if self.outcome.drained else "asking")

    async def _keep_arrived(self, feed: Feed) -> None:
        """Append what has arrived, all of it at a time: one wait for the disk serves whatever came meanwhile."""
        try:
            while self._arrived:
                if feed.outstanding >= GATHER_FROM:
                    await asyncio.sleep(GATHER_S)
                batch, self._arrived = self._arrived, []
                await self._keep(batch, feed)
        finally:
            # In the same step as the last look at what arrived: an answer that comes now is kept by another task.
            self._keeping = None

    async def _keep(self, batch: list[Answer], feed: Feed) -> None:
        good = [answer for answer in batch if isinstance(answer, Response)]
        for engine_id in {answer.engine_id for answer in good} - self._named:
            await self._name_engine(engine_id)
        await self._writer.append_many(batch)
        self.outcome.failed += len(batch) - len(good)
        self.outcome.answered += len(good)
        self._latencies += feed.ages_s([answer.key for answer in good[-RECENT:]])
        self._events.answered(batch, in_flight=feed.outstanding)
        await feed.settle(batch)

    async def _name_engine(self, engine_id: str) -> None:
        """Let the store say what `engine_id` stands for. Generations carry the id of the engine without a method."""
        known = self._engine.info
        for info in (known, *(replace(known, method=method) for method in METHODS)):
            if info.id == engine_id:
                self._named.add(engine_id)
                await self._writer.engine(info)

    async def _watch(self) -> None:
        if self.server is None:
            await asyncio.Event().wait()
            return
        while True:
            await asyncio.sleep(LIVENESS_S)
            await self.server.ensure()

    def _kept(self, task: asyncio.Task[None]) -> None:
        if task.cancelled() or (error := task.exception()) is None:
            return
        self._arrived.clear()  # what could not be kept is owed
        if self._broken is not None and not self._broken.done():
            self._broken.set_exception(error)

    async def _flush(self) -> None:
        while self._keeping is not None:
            await asyncio.wait([self._keeping])
