"""From planned shards to physical requests: claim, resolve, deduplicate, yield.

A worker walks the shards of its model in order. Of each shard it claims the keys that are owed and that
nobody else holds; what somebody else holds is looked at again at the end, when its holder has answered it
or died. So two runs, or two workers, that owe the same request ask it once.

The server never waits for this: while requests are asked, the next ones are rendered and tokenised; the first ones
already while the server starts, before anything is claimed.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from proctor.errors import StoreError
from proctor.infer.engine import Engine, PhysicalRequest
from proctor.records import Answer, Failure, Request, Shard
from proctor.store import Answers, Claim, Ledger, Requests, Store

RESOLVE_BATCH = 256
"""Requests rendered and tokenised at a time: enough for all cores, little enough to start at once."""

READY = 1024
"""Resolved requests that are kept ready: as many as may leave at once."""

LOOK_AHEAD = 4096
"""Requests resolved before a server is up."""

KEPT_BYTES = 256 << 20
"""Of recordings that were read: what is asked of one after the other is read once, and memory has an end."""

POLL_FIRST_S = 0.05
POLL_LAST_S = 5.0
"""Between two looks at the claims of others, growing: a short claim costs little waiting, a long one few listings."""


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

    `take()` yields requests lazily; `settle(answers)` is called when answers are durable. A `take()` may be
    abandoned at any point, by cancellation too: the next one first yields again what was yielded and not settled,
    then goes on where the other stopped. `close()` ends it.
    """

    def __init__(
        self,
        *,
        store: Store,
        engine: Engine,
        answers: Answers,
        ledger: Ledger,
        shards: Sequence[Shard],
        retry_failed: bool = False,
        retry_reasons: frozenset[str] = frozenset(),
    ) -> None:
        """`answers`: what others have stored, and what was there before; those of this feed it knows by `settle`.

        `retry_reasons`: with `retry_failed`, only what failed at these boundaries; empty: all.
        """
        self.draining = asyncio.Event()
        self.keep: Keep
        """Set by whoever works this off."""
        self._store = store
        self._engine = engine
        self._answers = answers
        self._ledger = ledger
        self._shards = deque(shards)
        self._ledger_turn = asyncio.Lock()
        self._retry_failed = retry_failed
        self._retry_reasons = retry_reasons
        self._started = time.time()
        self._recorded: dict[str, Requests] = {}  # fingerprint → requests, the ones read last at the end
        self._places: dict[str, tuple[str, int]] = {}  # key, not resolved → fingerprint and ordinal
        self._released: list[str] = []  # held by another's claim, which has ended
        self._claimed: list[str] = []  # by us, in asking order, not resolved
        self._ready: deque[PhysicalRequest] = deque()  # resolved, not yielded
        self._asking: dict[str, tuple[PhysicalRequest, float]] = {}  # logical key → yielded, not settled; when
        self._filling: asyncio.Task[bool] | None = None
        self._open: dict[int, OpenClaim] = {}
        self._claim_of: dict[str, int] = {}
        self._first: dict[str, str] = {}  # physical key → the logical key that is asked for it
        self._twins: dict[str, list[str]] = {}  # logical key being asked → others with its physical key
        self._answered: set[bytes] = set()  # physical keys answered in this session
        self._deferred: dict[int, set[str]] = {}  # another's claim → keys of ours that it holds
        self._seen: dict[str, PhysicalRequest | Failure] = {}  # resolved by `look_ahead`

    async def look_ahead(self) -> None:
        """Read and resolve what is likely to be asked first. Claims nothing, asks nobody. Raises StoreError."""
        for shard in self._shards:
            keys = await asyncio.to_thread(self._shard_keys, shard)
            async with self._ledger_turn:
                free = set(await self._ledger.unclaimed(keys)) if keys else set[str]()
            wanted = [k for k in keys if k in free][:LOOK_AHEAD]
            for at in range(0, len(wanted), RESOLVE_BATCH):
                batch = wanted[at : at + RESOLVE_BATCH]
                self._seen.update(zip(batch, await self._resolved(batch), strict=True))
            if wanted:
                return

    async def take(self) -> AsyncIterator[PhysicalRequest]:
        """Yield what is to be asked, until nothing is owed or the worker drains. Raises StoreError."""
        for request, _ in list(self._asking.values()):
            yield request
        while not self.draining.is_set():
            if self._ready:
                if len(self._ready) < READY:
                    self._fill_ahead()
                request = self._ready.popleft()
                self._asking[request.key] = request, time.monotonic()
                yield request
            elif not await self._filled():
                return

    async def more(self, *, timeout_s: float | None = None) -> bool:
        """Wait until somebody else's claim on something that we owe ends; False if there is none, or we drain.

        With `timeout_s` also False when that has passed: whoever holds the claim answers it, or leaves it owed.

        To be called between two runs of the engine: waiting inside one could hold back answers that the other
        side waits for.
        """
        ended = await self._ended(timeout_s)
        for sequence in ended:
            self._released += sorted(self._deferred.pop(sequence))
        if ended:
            await asyncio.to_thread(self._answers.refresh)
        return bool(ended)

    async def settle(self, answers: Sequence[Answer]) -> None:
        """Count `answers` as durable: answer their twins by alias, and close the claims that they were the last of."""
        for answer in answers:
            key = answer.key
            asked = self._asking.pop(key, None)
            if asked is not None:
                self._first.pop(asked[0].physical_key, None)
            if not isinstance(answer, Failure):
                self._answered.add(_short(answer.physical_key))
            if key in self._twins:
                await self._settle_twins(answer)
            if (ended := self._settled(key)) is not None:
                await self._finish(ended)

    async def _settle_twins(self, answer: Answer) -> None:
        for twin in self._twins.pop(answer.key):
            if isinstance(answer, Failure):
                await self.keep.failure(replace(answer, key=twin))
            else:
                await self.keep.alias(twin, answer.physical_key)
            await self._over(twin)

    async def close(self) -> None:
        """Give back what was claimed and not answered, so that nobody waits for it. To be called once, at the end."""
        if self._filling is not None:
            await asyncio.gather(self._filling, return_exceptions=True)
        while self._open:
            _, claim = self._open.popitem()
            # A claim that cannot be marked ends with this process.
            with contextlib.suppress(StoreError):
                await self._finish(claim.claim)

    @property
    def outstanding(self) -> int:
        """Requests that were yielded and are not durable yet."""
        return len(self._asking)

    @property
    def left(self) -> bool:
        """Whether something may be owed that is not settled; what others are asking counts."""
        waiting = (self._shards, self._claimed, self._ready, self._released, self._asking, self._deferred)
        filling = self._filling is not None and not self._filling.done()
        return filling or any(map(bool, waiting))

    def age_s(self) -> float:
        """Since the oldest of all that are outstanding was yielded; 0 if there is none."""
        oldest = next(iter(self._asking.values()), None)
        return 0.0 if oldest is None else time.monotonic() - oldest[1]

    def ages_s(self, keys: Sequence[str]) -> list[float]:
        """Since each of `keys` that is outstanding was yielded."""
        now, asking = time.monotonic(), self._asking
        return [now - asking[key][1] for key in keys if key in asking]

    @property
    def deferred(self) -> int:
        """Requests of ours that others have claimed."""
        return sum(map(len, self._deferred.values()))

    # --- towards the next requests ---

    def _fill_ahead(self) -> None:
        """Begin the next step in the background before what is ready has been taken."""
        filling = self._filling
        if filling is not None and filling.done() and not filling.cancelled() and filling.exception() is None:
            self._filling = filling = None
        if filling is None and (self._claimed or self._shards):
            self._filling = asyncio.create_task(self._fill())

    async def _filled(self) -> bool:
        """Do one step; False when there is none left.

        An engine that breaks cancels whoever waits here. The step goes on, and is finished by the next `take()`:
        a claim must not be lost between the ledger and us.
        """
        if self._filling is None:
            self._filling = asyncio.create_task(self._fill())
        filling = self._filling
        try:
            return await asyncio.shield(filling)
        finally:
            if filling.done():
                self._filling = None

    async def _fill(self) -> bool:
        if self._claimed:
            batch = self._claimed[:RESOLVE_BATCH]
            await self._resolve(batch)
            del self._claimed[: len(batch)]
        elif self._shards:
            await self._claim(await asyncio.to_thread(self._shard_keys, self._shards[0]))
            self._shards.popleft()
        elif self._released:
            keys = [k for k in dict.fromkeys(self._released) if k not in self._claim_of]
            await self._claim(await asyncio.to_thread(self._still_owed, keys))
            self._released.clear()
        else:
            return False
        return True

    def _shard_keys(self, shard: Shard) -> list[str]:
        """The shard's owed keys, each once: task after task, because a task's requests begin alike."""
        by_task: dict[str, list[int]] = {}
        for fingerprint, ordinal in shard.items:
            by_task.setdefault(fingerprint, []).append(ordinal)
        places: dict[str, tuple[str, int]] = {}
        for fingerprint, ordinals in by_task.items():
            recorded = self._read(fingerprint)
            for ordinal in ordinals:
                places.setdefault(recorded.key(ordinal), (fingerprint, ordinal))
        owed = self._still_owed([k for k in places if k not in self._claim_of])
        self._places.update((k, places[k]) for k in owed)
        return owed

    def _still_owed(self, keys: list[str]) -> list[str]:
        if not self._retry_failed:
            return self._answers.owed(keys)
        keys = [k for k in keys if not self._answers.answered(k)]
        found = self._answers.read(keys)
        return [k for k in keys if not isinstance(f := found.get(k), Failure) or self._again(f)]

    def _again(self, failure: Failure) -> bool:
        # What another worker has asked again meanwhile, in vain, is not asked a third time.
        if failure.created >= self._started:
            return False
        return not self._retry_reasons or failure.boundary.value in self._retry_reasons

    def _read(self, fingerprint: str) -> Requests:
        """A recording's requests; of those that were read before, as many are kept as there is room for."""
        recorded = self._recorded.pop(fingerprint, None)
        if recorded is None:
            recorded = self._store.recorded_requests(fingerprint)
        self._recorded[fingerprint] = recorded
        sizes = [one.size for one in self._recorded.values()]
        while len(sizes) > 1 and sum(sizes) > KEPT_BYTES:
            del self._recorded[next(iter(self._recorded))], sizes[0]
        return recorded

    async def _resolved(self, keys: Sequence[str]) -> list[PhysicalRequest | Failure]:
        requests: list[Request] = []
        for key in keys:
            fingerprint, ordinal = self._places[key]
            recorded = self._recorded.get(fingerprint)
            if recorded is None:
                recorded = await asyncio.to_thread(self._read, fingerprint)
            requests.append(recorded.request(ordinal))
        return await self._engine.resolve(requests, keys)

    async def _claim(self, keys: list[str]) -> None:
        if not keys:
            return
        async with self._ledger_turn:
            claim = await self._ledger.claim(keys, answers=None if self._retry_failed else self._answers)
        for sequence, held in claim.deferred.items():
            self._deferred.setdefault(sequence, set()).update(held)
        granted = list(claim.granted)
        if self._retry_failed:
            await asyncio.to_thread(self._answers.refresh)
            granted = await asyncio.to_thread(self._still_owed, granted)
        mine = set(granted)
        for key in set(keys).difference(mine, *claim.deferred.values()):
            # Answered meanwhile.
            self._places.pop(key, None)
            self._seen.pop(key, None)
        if claim.seq is None or not granted:
            await self._finish(claim)
            return
        self._open[claim.seq] = OpenClaim(claim, set(granted))
        self._claim_of.update(dict.fromkeys(granted, claim.seq))
        self._claimed += [k for k in keys if k in mine]

    async def _resolve(self, keys: Sequence[str]) -> None:
        new = [k for k in keys if k not in self._seen]
        if new:
            self._seen.update(zip(new, await self._resolved(new), strict=True))
        batch = [self._seen.pop(k) for k in keys]
        stored = self._answers.physical_of([r.physical_key for r in batch if not isinstance(r, Failure)])
        for resolved in batch:
            if isinstance(resolved, Failure):
                await self.keep.failure(resolved)
                await self._over(resolved.key)
            elif resolved.physical_key in stored or _short(resolved.physical_key) in self._answered:
                await self.keep.alias(resolved.key, resolved.physical_key)
                await self._over(resolved.key)
            elif resolved.physical_key in self._first:
                self._twins.setdefault(self._first[resolved.physical_key], []).append(resolved.key)
            else:
                self._first[resolved.physical_key] = resolved.key
                self._ready.append(resolved)
        for key in keys:
            self._places.pop(key, None)

    # --- claims ---

    async def _ended(self, timeout_s: float | None) -> list[int]:
        """Which claims of others, of those that we wait for, have ended; waits for one. None if the worker drains."""
        pause = POLL_FIRST_S
        end = None if timeout_s is None else time.monotonic() + timeout_s
        while self._deferred and not self.draining.is_set():
            async with self._ledger_turn:
                ended = [s for s in sorted(self._deferred) if await self._ledger.wait(s, timeout_s=0)]
            if ended or (end is not None and time.monotonic() >= end):
                return ended
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.draining.wait(), pause)
            pause = min(pause * 1.5, POLL_LAST_S)
        return []

    def _settled(self, key: str) -> Claim | None:
        """One key of a claim needs nothing more; the claim that it was the last of, to be finished."""
        sequence = self._claim_of.get(key)
        claim = self._open.get(sequence) if sequence is not None else None
        if sequence is None or claim is None:
            return None
        claim.unsettled.discard(key)
        if claim.unsettled:
            return None
        del self._open[sequence]
        return claim.claim

    async def _over(self, key: str) -> None:
        """One key of a claim needs nothing more."""
        if (ended := self._settled(key)) is not None:
            await self._finish(ended)

    async def _finish(self, claim: Claim) -> None:
        async with self._ledger_turn:
            await self._ledger.finish(claim)


def _short(key: str) -> bytes:
    return bytes.fromhex(key[:32])
