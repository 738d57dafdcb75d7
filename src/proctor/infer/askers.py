"""As many askers as requests may be in flight: each takes the next batch as soon as its last one is answered.

A task for each request, and a place to wait in for each, would cost as much as reading its answer.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Callable
from contextlib import suppress
from typing import cast

from proctor.infer.engine import PhysicalRequest
from proctor.records import Answer

Batch = list[PhysicalRequest]


class Askers:
    """Asks batch after batch; `run` yields the answers that have come."""

    def __init__(self, ask: Callable[[Batch], Awaitable[list[Answer]]], wanted: Callable[[], int]) -> None:
        """`wanted`: how many batches to have under way; asked anew for each."""
        self._ask = ask
        self._wanted = wanted
        self._limit = 0
        """What was wanted when it was last asked: at each answer, and before the first."""
        self._count = 0
        self._ready: deque[Batch] = deque()
        self._answers: list[Answer] = []
        self._news = asyncio.Event()
        """Set when there are answers, and when no more come."""
        self._room = asyncio.Event()
        """Set when little is ready."""
        self._taken = asyncio.Event()
        """Set when answers were taken."""

    async def run(self, batches: AsyncIterable[Batch], *, dry: Callable[[], None]) -> AsyncGenerator[list[Answer]]:
        """Take no more than can soon be asked, and call `dry` when there is nothing more to take. Once only."""
        feeding = asyncio.create_task(self._feed(batches, dry))
        feeding.add_done_callback(lambda _: self._news.set())
        try:
            while not feeding.done() or self._answers:
                await self._news.wait()
                self._news.clear()
                answers, self._answers = self._answers, []
                if answers:
                    yield answers
                    self._taken.set()
            await feeding
        finally:
            feeding.cancel()
            with suppress(asyncio.CancelledError):
                await asyncio.wait([feeding])

    async def _feed(self, batches: AsyncIterable[Batch], dry: Callable[[], None]) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                self._limit = self._wanted()
                async for batch in batches:
                    self._ready.append(batch)
                    if self._count < self._limit:
                        self._call(group)
                    # Half as many again as are asked, so that who is done finds the next one.
                    if len(self._ready) > self._limit // 2:
                        self._room.clear()
                        await self._room.wait()
                dry()
        except BaseExceptionGroup as errors:
            # One lost server ends every request in flight with the same error: the first tells it.
            raise _first(errors) from None

    def _call(self, group: asyncio.TaskGroup) -> None:
        """Have as many askers as are wanted, where there is something for each."""
        while self._ready and self._count < self._limit:
            self._count += 1
            group.create_task(self._work(group, self._ready.popleft()))

    async def _work(self, group: asyncio.TaskGroup, batch: Batch) -> None:
        try:
            while True:
                answers = await self._ask(batch)
                self._answers += answers
                self._news.set()
                wanted = self._limit = self._wanted()
                if len(self._answers) > wanted:
                    self._taken.clear()
                    await self._taken.wait()
                if not self._ready or self._count > wanted:
                    return
                batch = self._ready.popleft()
                if self._count < wanted:
                    self._call(group)
                if len(self._ready) <= wanted // 4:
                    self._room.set()
        finally:
            self._count -= 1


def _first(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    found = errors.exceptions[0]
    return _first(cast("BaseExceptionGroup[BaseException]", found)) if isinstance(found, BaseExceptionGroup) else found
