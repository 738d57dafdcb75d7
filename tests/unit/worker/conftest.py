"""A real store, the fake engine, and engines that break; everything but processes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from proctor.errors import ServerError
from proctor.infer.engine import PhysicalRequest
from proctor.infer.fake import FakeEngine
from proctor.records import Answer, Instance, Kind, Recording, Request, Shard
from proctor.store import Answers, Ledger, Owner, Store, Writer
from proctor.worker.events import EventLog
from proctor.worker.feed import Feed
from proctor.worker.session import Outcome, Session

WEIGHTS = "ab" * 32


def question(text: str, **more: object) -> Request:
    """A greedy request."""
    return Request(kind=Kind.GENERATE, text=text, **({"arguments": '{"max_gen_toks":4,"until":[]}'} | more))  # type: ignore[arg-type]


def recording_of(requests: Sequence[Request], name: str = "t") -> Recording:
    """One document for each request."""
    keys = [r.key for r in requests]
    fingerprint = Recording.compute_fingerprint(
        source="native", source_version="1", task=name, task_version="1", settings="{}", keys=keys
    )
    return Recording(
        fingerprint=fingerprint,
        source="native",
        source_version="1",
        task=name,
        task_version="1",
        num_fewshot=0,
        settings="{}",
        instances=tuple(
            Instance(request=r, key=k, doc_id=n, index=0) for n, (r, k) in enumerate(zip(requests, keys, strict=True))
        ),
        documents="[]",
    )


class BreakingEngine(FakeEngine):
    """Is lost after so many answers of each run, as often as told."""

    def __init__(self, *, after: Sequence[int]) -> None:
        super().__init__()
        self._after = list(after)

    async def run(self, requests: AsyncIterable[PhysicalRequest]) -> AsyncIterator[Answer]:
        left = self._after.pop(0) if self._after else None
        async for answer in super().run(requests):
            if left == 0:
                raise ServerError("the engine is lost")
            yield answer
            left = None if left is None else left - 1


class Kept:
    """A server that is always well, and counts how often somebody asked whether it is."""

    def __init__(self) -> None:
        self.ensured = 0

    async def ensure(self) -> None:
        self.ensured += 1


@dataclass
class Bench:
    """Sessions over one store."""

    root: Path
    store: Store
    log: Path
    resolution: str = "0123456789abcdef"
    writers: list[Writer] = field(default_factory=list)

    def shards(self, requests: Sequence[Request], *, size: int = 10, name: str = "t") -> list[Shard]:
        """Keep a recording of these and cut it."""
        recording = recording_of(requests, name)
        self.store.write_recording(recording)
        items = [(recording.fingerprint, n) for n in range(len(requests))]
        return [
            Shard(id=str(n), model="m", items=tuple(items[at : at + size]))
            for n, at in enumerate(range(0, len(items), size))
        ]

    def answers(self) -> Answers:
        return self.store.answers(WEIGHTS, self.resolution)

    def ledger(self) -> Ledger:
        return self.store.ledger(WEIGHTS, owner=Owner.here(run="bench"))

    async def work(
        self,
        shards: Sequence[Shard],
        engine: FakeEngine,
        *,
        server: Kept | None = None,
        retry_failed: bool = False,
        meanwhile: object = None,
    ) -> Outcome:
        """One session from start to end; `meanwhile(session)` is called as it begins."""
        owner = Owner.here(run="bench")
        async with self.store.writer(WEIGHTS, self.resolution, owner=owner) as writer:
            self.writers.append(writer)
            with EventLog(self.log, worker="w", model="m") as events:
                feed = Feed(
                    store=self.store,
                    engine=engine,
                    answers=self.store.answers(WEIGHTS, self.resolution, without=writer),
                    ledger=self.store.ledger(WEIGHTS, owner=owner, segment=writer.name),
                    shards=shards,
                    retry_failed=retry_failed,
                )
                session = Session(
                    feed=feed,
                    writer=writer,
                    engine=engine,
                    server=server,  # type: ignore[arg-type]
                    events=events,
                )
                if meanwhile is not None:
                    asyncio.get_running_loop().call_soon(meanwhile, session)  # type: ignore[arg-type]
                outcome = await session.work()
                events.phase("done")
                return outcome


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    yield Bench(root=tmp_path, store=Store.open(tmp_path / "store"), log=tmp_path / "events.jsonl")
