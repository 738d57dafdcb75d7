"""Askers: as many as are wanted, none idle, nothing taken that cannot soon be asked, nothing lost at the end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any, cast

import pytest

from proctor.errors import ServerError
from proctor.infer.askers import Askers, Batch
from proctor.infer.client import Client, Reply, Retries
from proctor.infer.concurrency import START
from proctor.testing import FakeServer, Faults, ServerOptions


class Bench:
    """A source that counts what was taken, and an engine that counts what is under way and answers when told to."""

    def __init__(self, total: int, wanted: int, *, held: bool = False) -> None:
        self.total = total
        self.wanted = wanted
        self.taken = self.under_way = self.most = 0
        self.dry = False
        self.released = asyncio.Semaphore(0 if held else total)
        self.askers = Askers(self._ask, lambda: self.wanted)

    async def batches(self) -> AsyncIterator[Batch]:
        for number in range(self.total):
            self.taken += 1
            yield cast(Batch, [number])

    async def _ask(self, batch: Batch) -> list[Any]:
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        try:
            await self.released.acquire()
            await asyncio.sleep(0)
        finally:
            self.under_way -= 1
        return list(batch)

    def run(self) -> AsyncIterator[list[Any]]:
        def dry() -> None:
            self.dry = True

        return self.askers.run(self.batches(), dry=dry)


async def settled() -> None:
    for _ in range(50):
        await asyncio.sleep(0)


async def drained(bench: Bench, found: list[Any]) -> None:
    async for answers in bench.run():
        found += answers


@pytest.mark.parametrize("wanted", [1, 2, 7, 1000])
async def test_everything_is_answered_once_by_no_more_askers_than_wanted(wanted: int) -> None:
    bench, found = Bench(300, wanted), []
    await drained(bench, found)
    assert sorted(found) == list(range(300))
    assert bench.most == min(wanted, 300)
    assert bench.dry


async def test_no_more_is_taken_than_can_soon_be_asked_and_more_when_more_is_wanted() -> None:
    bench, found = Bench(300, 8, held=True), []
    draining = asyncio.create_task(drained(bench, found))
    await settled()
    assert (bench.under_way, bench.taken) == (8, 8 + 5)
    bench.wanted = 20
    bench.released.release()
    await settled()
    assert len(found) == 1
    assert bench.under_way == 20
    assert 20 <= bench.taken - 1 <= 31
    bench.wanted = 3
    for _ in range(18):
        bench.released.release()
    await settled()
    assert (len(found), bench.under_way) == (19, 3)
    bench.wanted = 1000
    for _ in range(300):
        bench.released.release()
    await draining
    assert sorted(found) == list(range(300))


async def test_who_does_not_take_answers_is_given_no_more_than_twice_as_many() -> None:
    bench = Bench(300, 8)
    async with aclosing(cast(Any, bench.run())) as answers:
        found = list(await anext(answers))
        await settled()
        assert bench.taken < 40
        async for one in answers:
            found += one
    assert sorted(found) == list(range(300))


async def test_the_first_error_ends_all_and_what_was_answered_before_stands() -> None:
    bench, found = Bench(20, 4, held=True), []

    async def lost(batch: Batch) -> list[Any]:
        if cast(int, batch[0]) == 2:
            await settled()
            raise ServerError("gone")
        return list(batch) if cast(int, batch[0]) < 2 else await asyncio.Event().wait() or []

    bench.askers = Askers(lost, lambda: bench.wanted)
    with pytest.raises(ServerError, match="gone"):
        await drained(bench, found)
    assert found == [0, 1]
    assert not bench.dry or bench.taken == 20


async def test_whoever_leaves_ends_what_is_under_way() -> None:
    bench = Bench(100, 10, held=True)
    draining = asyncio.create_task(drained(bench, []))
    await settled()
    assert bench.under_way == 10
    draining.cancel()
    with pytest.raises(asyncio.CancelledError):
        await draining
    await settled()
    assert bench.under_way == 0


async def test_a_request_that_waits_to_be_repeated_keeps_nobody_elses_place() -> None:
    options = ServerOptions(faults=Faults(rate_limited=1.0, retry_after_s=60.0))
    async with (
        FakeServer(options) as server,
        Client(lambda: [server.backend], retries=Retries(attempts=1)) as client,
    ):
        before = client.wanted()
        asking = asyncio.create_task(client.post("/v1/completions", {"prompt": "x"}))
        while not server.stats.faults["rate_limited"]:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.05)
        limit = sum(load.limit for load in client.load().values())
        assert (client.wanted(), before) == (limit + 1, START)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            assert not isinstance(await asking, Reply)
        assert client.wanted() == limit
