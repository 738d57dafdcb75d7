"""How a set of owed requests is cut into shards: an order, bits that say what is owed, and where each shard ends.

Order inside a model: documents longest first, so that the tail is short; a document's requests stay side
by side, so that a prefix cache serves all its choices. Sizes follow guided self-scheduling (Polychronopoulos
and Kuck, 1987): each next shard is a share of the remaining cost, so the first ones are large and the last ones
small, and never below a floor that pays for claiming one (`floor_s`). The share is half of the classic one,
1 / (2 · workers): predictions are wrong, and a first shard that takes longer than predicted must still end before the
rest does.

Costs are whole microseconds: whoever cuts the same bits of the same order, on whatever machine, gets the same shards.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import numpy as np
from numpy.typing import NDArray

from proctor.plan.requests import Bits, RequestTable

MIN_SHARD_S: Final = 2.0
LEAST_SHARD_S: Final = 0.5
"""Ten times what claiming one takes on a slow file system."""
TAIL: Final = 1000
"""A floor is at most this part of what each worker does: last shards that take longer than predicted weigh little."""
MAX_SHARD_S: Final = 600.0
MAX_SHARD_REQUESTS: Final = 20_000
"""A claim names every key: this keeps one under half a megabyte."""
SHARE: Final = 2
"""A shard is the remaining cost over SHARE × workers."""
SAMPLE: Final = 4_096
"""Requests that `Cut.about` looks at."""
_WHOLE: Final = 1e6
"""Microseconds of a second."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardSizes:
    """How large shards may be."""

    workers: int = 1
    min_s: float = MIN_SHARD_S
    """See `floor_s`."""
    max_s: float = MAX_SHARD_S
    max_requests: int = MAX_SHARD_REQUESTS
    share: int = SHARE
    limit_s: float = math.inf
    """What fits a time limit: whatever the strategy, a shard that is predicted to take longer is cut. A single request
    that does is a shard of its own."""

    @property
    def largest_s(self) -> float:
        """No shard of several requests costs more."""
        return min(max(self.max_s, self.min_s), self.limit_s)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AskingOrder:
    """Rows of a request table in the order in which they are asked, with their costs."""

    fingerprints: tuple[str, ...]
    """Of the table's tasks."""
    starts: NDArray[np.int64]
    """First row of each task, and the number of rows: multiples of 8, as of the table."""
    rows: NDArray[np.int32]
    cost_us: NDArray[np.int64]
    """Of each of `rows`, in microseconds."""

    def owed(self, bits: Bits) -> NDArray[np.int64]:
        """Positions in this order of the rows whose bits are set."""
        return np.flatnonzero(np.unpackbits(bits, count=int(self.starts[-1])).take(self.rows).view(np.bool_))


@dataclass(frozen=True, kw_only=True, eq=False)
class Cut:
    """Shards of one set of owed requests, found when somebody looks at them; models that owe the same share one.

    Shard i holds the owed requests `ends[i-1]`..`ends[i]` - 1 in asking order.
    """

    order: AskingOrder
    owed: Bits | None
    """None: all rows of the order."""
    sizes: ShardSizes = ShardSizes()
    """Where shards end, by `guided_ends`."""
    fixed: NDArray[np.int64] | None = None
    """Where they end instead, if a strategy has rules of its own."""

    @cached_property
    def requests(self) -> int:
        """Requests in all shards."""
        return len(self.order.rows) if self.owed is None else int(np.bitwise_count(self.owed).sum(dtype=np.int64))

    @property
    def ends(self) -> NDArray[np.int64]:
        """Of each shard, counted in owed requests."""
        return self._made[0]

    @property
    def cost_us(self) -> NDArray[np.int64]:
        """Of each shard."""
        return self._made[1]

    @property
    def made(self) -> bool:
        """Whether somebody has looked already."""
        return "_made" in self.__dict__

    @cached_property
    def _made(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        cost = self.order.cost_us[self.positions()]
        ends = self.fixed
        if ends is None:
            ends = np.fromiter(guided_ends(np.cumsum(cost), self.sizes), np.int64)
        return ends, stretch_sums(cost, ends)

    def positions(self) -> NDArray[np.int64]:
        """Where the owed requests stand in the order."""
        return np.arange(len(self.order.rows)) if self.owed is None else self.order.owed(self.owed)

    def places(self) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Task (its number in the order) and ordinal of every owed request, in asking order."""
        rows = self.order.rows[self.positions()]
        starts = self.order.starts
        task = np.searchsorted(starts, rows, side="right") - 1
        return task.astype(np.int32), (rows - starts[task]).astype(np.int32)

    def about(self) -> int:
        """Number of shards: exact once they were looked at, else from a sample of the order."""
        if self.made or self.fixed is not None or self.owed is None:
            return len(self.ends)
        step = max(1, len(self.order.rows) // SAMPLE)
        rows = self.order.rows[::step]
        chosen = (self.owed[rows >> 3] >> (7 - (rows & 7))) & 1
        cost = self.order.cost_us[::step][chosen.astype(np.bool_)]
        # Each of the sample stands for so many requests.
        each = self.requests / max(1, len(cost))
        return _count(np.cumsum(cost * each).tolist(), each, self.sizes)


def floor_s(work_s: float, workers: int) -> float:
    """The smallest shard worth claiming, of so much work."""
    return min(MIN_SHARD_S, max(LEAST_SHARD_S, work_s / (TAIL * workers)))


def guided_ends(done: NDArray[np.int64], sizes: ShardSizes) -> Iterator[int]:
    """Where each shard ends; `done`: the cost of everything up to and with each request, in asking order, in µs."""
    count = len(done)
    if not count:
        return
    total = int(done[-1])
    least, largest = _us(sizes.min_s), _us(sizes.largest_s)
    start = before = 0
    while start < count:
        size = min(largest, max(least, (total - before) // (sizes.share * sizes.workers)))
        stop = int(np.searchsorted(done, before + size, side="right"))
        start = min(max(stop, start + 1), start + sizes.max_requests, count)
        before = int(done[start - 1])
        yield start


def fitting_ends(cost: NDArray[np.int64], ends: NDArray[np.int64], limit_s: float) -> NDArray[np.int64]:
    """`ends` of stretches of requests, and those at which every stretch is cut that costs more than `limit_s`.

    Pieces are as long as fits. A single request above the limit stands alone.
    """
    limit = _us(limit_s)
    found: list[int] = []
    start = 0
    for end in ends.tolist():
        summed = np.cumsum(cost[start:end])
        done, at = 0, 0
        while at < len(summed):
            # An even cut would leave no short piece, but could not promise that each fits.
            at = max(int(np.searchsorted(summed, done + limit, side="right")), at + 1)
            done = int(summed[at - 1])
            found.append(start + at)
        start = end
    return np.array(found, dtype=np.int64)


def stretch_sums(cost: NDArray[np.int64], ends: NDArray[np.int64]) -> NDArray[np.int64]:
    """Sum of each non-empty stretch that ends where `ends` says."""
    return np.add.reduceat(cost, np.concatenate([[0], ends[:-1]])) if len(ends) else np.empty(0, np.int64)


def longest_documents_first(table: RequestTable, cost_us: NDArray[np.int64]) -> AskingOrder:
    """The order in which `balanced` asks: dear documents first, each one's requests side by side."""
    rows = np.flatnonzero(np.unpackbits(table.first, count=table.rows))
    sizes = [int(t.documents.max()) + 1 if len(t) else 0 for t in table.tasks]
    offsets = np.cumsum([0, *sizes])
    groups = np.zeros(table.rows, np.int64)
    for task, offset, start in zip(table.tasks, offsets.tolist(), table.starts.tolist(), strict=False):
        groups[start : start + len(task)] = task.documents + offset
    return order_of(table, rows[by_group(groups[rows], cost_us[rows])], cost_us)


def order_of(table: RequestTable, rows: NDArray[np.int64], cost_us: NDArray[np.int64]) -> AskingOrder:
    """These rows of a table, in this order; `cost_us`: of all of its rows."""
    return AskingOrder(
        fingerprints=tuple(table.fingerprints), starts=table.starts, rows=rows.astype(np.int32), cost_us=cost_us[rows]
    )


def by_group(groups: NDArray[np.int64], cost_us: NDArray[np.int64]) -> NDArray[np.int64]:
    """The permutation that puts dear groups first and keeps each together, in its own order."""
    if not len(groups):
        return np.empty(0, np.int64)
    # Sums of whole numbers below 2^53 are exact in any order.
    per_group = np.bincount(groups, weights=cost_us)
    place = np.empty(len(per_group), np.int32)
    place[np.argsort(-per_group, kind="stable")] = np.arange(len(per_group), dtype=np.int32)
    return np.argsort(place[groups], kind="stable")


def microseconds(seconds: NDArray[np.float64]) -> NDArray[np.int64]:
    """Costs as whole numbers."""
    return np.rint(seconds * _WHOLE).astype(np.int64)


def _us(seconds: float) -> int:
    # No sum of costs reaches the limit that stands for "no limit".
    return 1 << 60 if seconds >= (1 << 40) else round(seconds * _WHOLE)


def _count(done: list[float], each: float, sizes: ShardSizes) -> int:
    """How many shards `guided_ends` would make of requests of which every one here stands for `each`."""
    if not done:
        return 0
    total, count, most = done[-1], 0, sizes.max_requests / each
    least, largest = _us(sizes.min_s), _us(sizes.largest_s)
    before = at = 0.0
    while before < total and at < len(done):
        size = min(largest, max(least, (total - before) / (sizes.share * sizes.workers)))
        stop = bisect_right(done, before + size)
        # Between two of the sample, as if the cost were spread evenly.
        low = done[stop - 1] if stop else 0.0
        reach = stop + ((before + size - low) / (done[stop] - low) if stop < len(done) and done[stop] > low else 0.0)
        if reach > at + most:
            at += most
            whole = min(int(at), len(done) - 1)
            low = done[whole - 1] if whole else 0.0
            before = low + (at - whole) * (done[whole] - low)
        else:
            at, before = reach, before + size
        count += 1
    return count
