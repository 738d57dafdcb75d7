"""What one process takes of a run's work on one model, and the session that asks it."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass, replace

from proctor.infer.engine import Engine
from proctor.records import Shard
from proctor.store import Answers, Owner, Store, Writer
from proctor.worker.events import EventLog
from proctor.worker.feed import Feed
from proctor.worker.job import Job
from proctor.worker.run_directory import RunDirectory
from proctor.worker.session import Session


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """Which of a model's planned requests, in which order."""

    retry_failed: bool = False
    retry_reasons: frozenset[str] = frozenset()
    """With `retry_failed`: only what failed at these boundaries; empty: all."""
    at_most: int | None = None
    """Only so many, to see whether the model works."""
    begin: int = 0
    """The shard to begin with: processes that begin apart get ready what is their own."""
    linger_s: float | None = None
    """How long to wait at the end for requests that others are asking; None: until they have ended."""

    async def work_of(
        self, directory: RunDirectory, job: Job, store: Store, writer: Writer | None = None
    ) -> tuple[Answers, list[Shard]]:
        """What is answered already, not counting `writer`, and the shards. Raises StoreError."""
        answers = await asyncio.to_thread(store.answers, job.weights, job.resolution, without=writer)
        shards = deque(await asyncio.to_thread(directory.read_shards, job.model))
        shards.rotate(-self.begin)
        if self.at_most is not None:
            return answers, [replace(s, items=s.items[: self.at_most]) for s in list(shards)[:1]]
        return answers, list(shards)

    async def session(
        self,
        directory: RunDirectory,
        job: Job,
        store: Store,
        *,
        owner: Owner,
        writer: Writer,
        engine: Engine,
        events: EventLog,
    ) -> Session:
        """A session over this share, with what it asks first got ready. Raises StoreError."""
        answers, shards = await self.work_of(directory, job, store, writer)
        feed = Feed(
            store=store,
            engine=engine,
            answers=answers,
            ledger=store.ledger(job.weights, owner=owner, segment=writer.name),
            shards=shards,
            retry_failed=self.retry_failed,
            retry_reasons=self.retry_reasons,
        )
        session = Session(feed=feed, writer=writer, engine=engine, events=events, linger_s=self.linger_s)
        await session.prepare()
        return session
