"""Who uses which slot of a llama.cpp server: token-by-token scoring is cheap only on the slot that has the prefix.

The server keeps one key-value cache for each slot and gives a request to whichever is free. With more passages
under way than slots, every step would find another passage's cache and compute its whole prefix again. So a
passage holds one slot from its first step to its last, and prefers the slot that has most of its context. With
several servers a slot is at the one that its first step went to.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Final

from proctor.infer.routing import Affinity

WORTH_WAITING: Final = 64
"""Shared tokens from which on waiting for a busy slot beats computing the prefix again on a free one."""


@dataclass(slots=True, eq=False)
class Slot:
    """A server's slot."""

    number: int
    """What the server calls it."""
    near: Affinity = field(default_factory=Affinity)
    tokens: tuple[int, ...] = ()
    used: int = 0
    """When it was leased last, by count: the longest unused free slot loses its cache first."""
    users: int = 0
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)


class SlotPool:
    """Leases slots. Waiting is in order of arrival for each slot."""

    def __init__(self, size: int, servers: int = 1) -> None:
        """`size`: of each server."""
        # Slots that are leased one after the other find servers that take turns: they get the same number at each.
        self._slots = [Slot(number) for number in range(size) for _ in range(servers)]
        self._free = asyncio.Condition()
        self._count = 0

    @asynccontextmanager
    async def lease(self, tokens: Sequence[int]) -> AsyncGenerator[Slot]:
        """Hold the slot that suits `tokens` (the whole passage)."""
        ids = tuple(tokens)
        async with self._free:
            slot = self._choose(ids)
            while slot is None:
                await self._free.wait()
                slot = self._choose(ids)
            self._count += 1
            slot.users += 1
            slot.used = self._count
            slot.tokens = ids
        try:
            async with slot.turn:
                yield slot
        finally:
            async with self._free:
                slot.users -= 1
                self._free.notify_all()

    def _choose(self, ids: tuple[int, ...]) -> Slot | None:
        """The slot that has most of `ids` if that is worth a wait, else a free one, else None."""
        best = max(self._slots, key=lambda s: (shared(s.tokens, ids), -s.users))
        if best.users == 0 or shared(best.tokens, ids) >= WORTH_WAITING:
            return best
        free = [s for s in self._slots if s.users == 0]
        return min(free, key=lambda s: s.used) if free else None


def shared(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common prefix."""
    count = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        count += 1
    return count
