"""From planned shards to physical requests: claim, resolve, deduplicate, yield.

A worker walks the shards of its model in order. Of each shard it claims the keys that are owed and that
nobody else holds; what somebody else holds is looked at again at the end, when its holder has answered it
or died. So two runs, or two workers, that owe the same request ask it once.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from proctor.infer.engine import Engine, PhysicalRequest
from proctor.records import Answer, Failure, Request, Shard
from proctor.store import Answers, Claim, Ledger, Store

RESOLVE_BATCH = 256
"""Requests rendered and tokenised at a time: enough for all cores, little enough to start at once."""


@dataclass(slots=True)
class OpenClaim:
    """A claim of ours and the keys of it that have no durable answer yet."""

    claim: Claim
    unsettled: set[str]


class Keep(Protocol):
    """Where the feed records what needs no asking."""

    async def alias(self, key: str, physical_key: str) -> None:
        """Record, durably, that `key` has the answer of `physical_key`."""
        ...

    async def failure(self, failure: Failure) -> None:
        """Record, durably, a request that no engine can be asked."""
        ...


class Feed:
    """The source of physical requests for one worker.

    `take()` yields requests lazily; `settle(answer)` is called when an answer is durable. Requests that
    were yielded but not settled when an engine breaks are yielded again by the next `take()`.
    """

    def __init__(
        self,
        *,
        store: Store,
        engine: Engine,
        answers: Answers,
        ledger: Ledger,
        shards: Sequence[Shard],
        keep: Keep,
        retry_failed: bool = False,
    ) -> None:
        self.draining = asyncio.Event()
        self._store = store
        self._engine = engine
        self._answers = answers
        self._ledger = ledger
        self._shards = deque(shards)
        self._keep = keep
        self._ledger_turn = asyncio.Lock()
        self._retry_failed = retry_failed
        self._requests: dict[str, Request] = {}
        self._ordinals: dict[str, list[str]] = {}
        self._open: dict[int, OpenClaim] = {}
        self._claim_of: dict[str, int] = {}
        self._asking: dict[str, PhysicalRequest] = {}  # logical key → yielded, not settled
        self._first: dict[str, str] = {}  # physical key → the logical key that is asked for it
        self._twins: dict[str, list[str]] = {}  # logical key being asked → others with its physical key
        self._answered: set[bytes] = set()  # physical keys answered in this session
        self._deferred: dict[int, set[str]] = {}  # another's claim → keys of ours that it holds
        self._released_keys: list[str] = []

    async def take(self) -> AsyncIterator[PhysicalRequest]:
        """Yield what is to be asked, until nothing is owed or the worker drains."""
        for request in list(self._asking.values()):
            yield request
        while self._shards and not self.draining.is_set():
            keys = await asyncio.to_thread(self._shard_keys, self._shards.popleft())
            async for request in self._claimed(keys):
                yield request
        while self._released_keys and not self.draining.is_set():
            keys, self._released_keys = self._released_keys, []
            async for request in self._claimed(self._still_owed(keys)):
                yield request

    async def more(self) -> bool:
        """Wait until somebody else's claim on something that we owe ends; False if there is none, or we drain.

        To be called between two runs of the engine: waiting inside one could hold back answers that the other
        side waits for.
        """
        if not self._deferred or self.draining.is_set():
            return False
        sequence = min(self._deferred)
        if not await self._released(sequence):
            return False
        self._released_keys = sorted(self._deferred.pop(sequence))
        await asyncio.to_thread(self._answers.refresh)
        return True

    async def settle(self, answer: Answer) -> None:
        """Count `answer` as durable: answer its twins by alias, and close its claim when that was the last."""
        request = self._asking.pop(answer.key, None)
        if request is not None:
            self._first.pop(request.physical_key, None)
        if not isinstance(answer, Failure):
            self._answered.add(_short(answer.physical_key))
        for twin in self._twins.pop(answer.key, []):
            if isinstance(answer, Failure):
                await self._keep.failure(replace(answer, key=twin))
            else:
                await self._keep.alias(twin, answer.physical_key)
            await self._close(twin)
        await self._close(answer.key)

    @property
    def outstanding(self) -> int:
        """Requests that were yielded and are not durable yet."""
        return len(self._asking)

    async def _released(self, sequence: int) -> bool:
        """Wait until the claim is settled or its holder is gone; False if the worker drains first."""
        wait: asyncio.Task[bool] = asyncio.create_task(self._ledger.wait(sequence))
        stop: asyncio.Task[bool] = asyncio.create_task(_set(self.draining))
        done, pending = await asyncio.wait({wait, stop}, return_when=asyncio.FIRST_COMPLETED)
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)
        if wait in done:
            wait.result()
        return wait in done

    def _shard_keys(self, shard: Shard) -> list[str]:
        """The shard's owed keys in order, each once."""
        keys: dict[str, None] = {}
        for fingerprint, ordinal in shard.items:
            key = self._keys(fingerprint)[ordinal]
            if key not in self._claim_of:
                keys[key] = None
        return self._still_owed(list(keys))

    def _still_owed(self, keys: list[str]) -> list[str]:
        if self._retry_failed:
            return [k for k in keys if not self._answers.answered(k)]
        return list(self._answers.owed(keys))

    def _keys(self, fingerprint: str) -> list[str]:
        if fingerprint not in self._ordinals:
            instances = self._store.read_recording(fingerprint).instances
            self._requests.update((i.key, i.request) for i in instances)
            self._ordinals[fingerprint] = [i.key for i in instances]
        return self._ordinals[fingerprint]

    async def _claimed(self, keys: list[str]) -> AsyncIterator[PhysicalRequest]:
        if not keys:
            return
        async with self._ledger_turn:
            claim = await self._ledger.claim(keys, answers=None if self._retry_failed else self._answers)
        for sequence, held in claim.deferred.items():
            self._deferred.setdefault(sequence, set()).update(held)
        granted = set(claim.granted)
        if self._retry_failed:
            await asyncio.to_thread(self._answers.refresh)
            granted = {k for k in granted if not self._answers.answered(k)}
        mine = [k for k in keys if k in granted]
        if claim.seq is None or not mine:
            await self._finish(claim)
            return
        self._open[claim.seq] = OpenClaim(claim, set(mine))
        self._claim_of.update(dict.fromkeys(mine, claim.seq))
        for batch in _batches(mine, RESOLVE_BATCH):
            if self.draining.is_set():
                return
            async for request in self._resolved(batch):
                yield request

    async def _resolved(self, keys: Sequence[str]) -> AsyncIterator[PhysicalRequest]:
        requests = [self._requests[k] for k in keys]
        for resolved in await self._engine.resolve(requests):
            if isinstance(resolved, Failure):
                await self._keep.failure(resolved)
                await self._close(resolved.key)
            elif self._is_answered(resolved.physical_key):
                await self._keep.alias(resolved.key, resolved.physical_key)
                await self._close(resolved.key)
            elif resolved.physical_key in self._first:
                self._twins.setdefault(self._first[resolved.physical_key], []).append(resolved.key)
            else:
                self._first[resolved.physical_key] = resolved.key
                self._asking[resolved.key] = resolved
                yield resolved

    def _is_answered(self, physical_key: str) -> bool:
        return _short(physical_key) in self._answered or self._answers.has_physical(physical_key)

    async def _close(self, key: str) -> None:
        sequence = self._claim_of.get(key)
        if sequence is None:
            return
        claim = self._open.get(sequence)
        if claim is None:
            return
        claim.unsettled.discard(key)
        if not claim.unsettled:
            del self._open[sequence]
            await self._finish(claim.claim)

    async def _finish(self, claim: Claim) -> None:
        async with self._ledger_turn:
            await self._ledger.finish(claim)


async def _set(event: asyncio.Event) -> bool:
    return await event.wait()


def _short(key: str) -> bytes:
    return bytes.fromhex(key)[:16]


def _batches(keys: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    for start in range(0, len(keys), size):
        yield keys[start : start + size]
