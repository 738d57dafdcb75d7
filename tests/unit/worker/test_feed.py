"""The feed by itself: what it yields when whoever takes from it goes away, and what it leaves to others."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import pytest

from proctor.infer.engine import PhysicalRequest
from proctor.infer.fake import FakeEngine
from proctor.records import Failure, Request, Shard
from proctor.store import Ledger, Owner
from proctor.worker.feed import Feed

from .conftest import WEIGHTS, Bench, question

REQUESTS = [question(f"q{n}") for n in range(30)]


class Notes:
    """Keeps in memory what needed no asking."""

    def __init__(self) -> None:
        self.aliases: list[tuple[str, str]] = []
        self.failures: list[Failure] = []

    async def alias(self, key: str, physical_key: str) -> None:
        self.aliases.append((key, physical_key))

    async def failure(self, failure: Failure) -> None:
        self.failures.append(failure)


class SlowEngine(FakeEngine):
    """Resolves when told to."""

    def __init__(self) -> None:
        super().__init__()
        self.go = asyncio.Event()
        self.resolving = asyncio.Event()

    async def resolve(
        self, requests: Sequence[Request], keys: Sequence[str] | None = None
    ) -> list[PhysicalRequest | Failure]:
        self.resolving.set()
        await self.go.wait()
        return await super().resolve(requests, keys)


@asynccontextmanager
async def feeding(
    bench: Bench, shards: Sequence[Shard], *, engine: FakeEngine | None = None, ledger: Ledger | None = None
) -> AsyncIterator[Feed]:
    feed = Feed(
        store=bench.store,
        engine=engine or FakeEngine(),
        answers=bench.answers(),
        ledger=ledger or bench.store.ledger(WEIGHTS, owner=Owner.here(run="feed")),
        shards=shards,
    )
    feed.keep = Notes()
    try:
        yield feed
    finally:
        await feed.close()


async def taken(feed: Feed, n: int | None = None) -> list[str]:
    """The keys of the next n requests, or of all."""
    out: list[str] = []
    async for request in feed.take():
        out.append(request.key)
        if len(out) == n:
            break
    return out


async def test_what_was_yielded_and_not_settled_comes_first_again(bench: Bench) -> None:
    shards = bench.shards(REQUESTS, size=8)
    async with feeding(bench, shards) as feed:
        first = await taken(feed, 11)
        assert first == [r.key for r in REQUESTS[:11]]
        assert feed.outstanding == 11
        assert await taken(feed) == [r.key for r in REQUESTS]


async def test_a_taker_cancelled_while_its_requests_are_resolved_loses_none(bench: Bench) -> None:
    engine = SlowEngine()
    async with feeding(bench, bench.shards(REQUESTS, size=30), engine=engine) as feed:
        taker = asyncio.create_task(taken(feed))
        await engine.resolving.wait()
        taker.cancel()
        await asyncio.gather(taker, return_exceptions=True)
        engine.go.set()
        assert await taken(feed) == [r.key for r in REQUESTS]


async def test_a_taker_cancelled_while_it_claims_loses_no_claim(bench: Bench) -> None:
    ledger = bench.store.ledger(WEIGHTS, owner=Owner.here(run="feed"))
    entered, go = asyncio.Event(), asyncio.Event()
    claim = ledger.claim

    async def slow(*arguments: object, **named: object) -> object:
        entered.set()
        found = await claim(*arguments, **named)  # type: ignore[arg-type]
        await go.wait()
        return found

    ledger.claim = slow  # type: ignore[method-assign, assignment]
    async with feeding(bench, bench.shards(REQUESTS, size=30), ledger=ledger) as feed:
        taker = asyncio.create_task(taken(feed))
        await entered.wait()
        taker.cancel()
        await asyncio.gather(taker, return_exceptions=True)
        go.set()
        assert await taken(feed) == [r.key for r in REQUESTS]
        assert feed.deferred == 0
    assert await bench.ledger().live() == {}


async def test_an_engine_that_cannot_resolve_is_asked_again(bench: Bench) -> None:
    class Once(FakeEngine):
        tries = 0

        async def resolve(
            self, requests: Sequence[Request], keys: Sequence[str] | None = None
        ) -> list[PhysicalRequest | Failure]:
            self.tries += 1
            if self.tries == 1:
                raise ConnectionError("the server tokenises, and is gone")
            return await super().resolve(requests, keys)

    async with feeding(bench, bench.shards(REQUESTS, size=30), engine=Once()) as feed:
        with pytest.raises(ConnectionError):
            await taken(feed)
        assert await taken(feed) == [r.key for r in REQUESTS]


async def test_draining_stops_between_two_requests_of_one_batch(bench: Bench) -> None:
    async with feeding(bench, bench.shards(REQUESTS, size=30)) as feed:
        out: list[str] = []
        async for request in feed.take():
            out.append(request.key)
            if len(out) == 3:
                feed.draining.set()
        assert len(out) == 3
    assert await bench.ledger().live() == {}, "what was claimed and not asked is given back"


async def test_what_others_hold_is_left_to_them_until_they_end(bench: Bench) -> None:
    other = bench.ledger()
    theirs = await other.claim([r.key for r in REQUESTS[5:10]])
    async with feeding(bench, bench.shards(REQUESTS, size=15)) as feed:
        mine = await taken(feed)
        assert mine == [r.key for r in REQUESTS[:5] + REQUESTS[10:]]
        assert feed.deferred == 5
        more = asyncio.create_task(feed.more())
        await asyncio.sleep(0.2)
        assert not more.done()
        await other.finish(theirs)  # without having asked
        assert await asyncio.wait_for(more, 5)
        assert (await taken(feed))[len(mine) :] == sorted(r.key for r in REQUESTS[5:10])
        assert not await feed.more()


async def test_the_first_of_several_claims_to_end_is_taken_over(bench: Bench) -> None:
    """A long claim with a low number must not hold up what a dead or finished one leaves."""
    one, two = bench.ledger(), bench.ledger()
    await one.claim([r.key for r in REQUESTS[:5]])
    short = await two.claim([r.key for r in REQUESTS[5:10]])
    async with feeding(bench, bench.shards(REQUESTS[:10], size=10)) as feed:
        assert await taken(feed) == []
        await two.finish(short)
        assert await asyncio.wait_for(feed.more(), 5)
        assert set(await taken(feed)) == {r.key for r in REQUESTS[5:10]}
        assert feed.deferred == 5
        feed.draining.set()
        assert not await feed.more()


async def test_the_claim_ends_with_its_last_answer(bench: Bench) -> None:
    async with feeding(bench, bench.shards(REQUESTS[:3], size=3)) as feed:
        engine = FakeEngine()
        answers = [a async for a in engine.run(feed.take())]
        for n, answer in enumerate(answers):
            assert len(await bench.ledger().live()) == 1, n
            await feed.settle([answer])
        assert await bench.ledger().live() == {}


# --- recordings ---


async def test_recordings_are_let_go_and_read_again(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("proctor.worker.feed.KEPT_BYTES", 0)
    tasks = [[question(f"{name}{n}") for n in range(6)] for name in "abc"]
    items = [shard.items for n, task in enumerate(tasks) for shard in bench.shards(task, size=6, name=str(n))]
    # Every shard has something of every task.
    shards = [Shard(id=str(n), model="m", items=tuple(i for s in items for i in s[n : n + 2])) for n in (0, 2, 4)]
    async with feeding(bench, shards) as feed:
        await feed.look_ahead()
        assert await taken(feed) == [task[i].key for n in (0, 2, 4) for task in tasks for i in (n, n + 1)]
        assert len(feed._recorded) == 1
        assert not feed._places


async def test_what_others_are_asking_is_resolved_when_it_is_left_to_us(bench: Bench) -> None:
    shards = bench.shards(REQUESTS, size=30)
    other = bench.store.ledger(WEIGHTS, owner=Owner.here(run="other"))
    claim = await other.claim([r.key for r in REQUESTS[:10]])
    async with feeding(bench, shards) as feed:
        assert await taken(feed) == [r.key for r in REQUESTS[10:]]
        assert len(feed._places) == feed.deferred == 10
        await other.finish(claim)
        assert await feed.more()
        assert sorted((await taken(feed))[20:]) == sorted(r.key for r in REQUESTS[:10])
        assert not feed._places
