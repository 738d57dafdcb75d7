"""Cut what one model owes into shards.

Order inside a model: documents longest first, so that the tail is short; a document's requests stay side
by side, so that a prefix cache serves all its choices. Sizes follow guided self-scheduling (Polychronopoulos
and Kuck, 1987): each next shard is a share of the remaining cost, so the first ones are large and the last ones
small, and never below a floor that pays for claiming one. The share is half of the classic one, 1 / (2 · workers):
predictions are wrong, and a first shard that takes longer than predicted must still end before the rest does.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, overload

import numpy as np
from numpy.typing import NDArray

from proctor.plan.requests import Bits, RequestTable
from proctor.records import Shard

MIN_SHARD_S: Final = 2.0
MAX_SHARD_S: Final = 600.0
MAX_SHARD_REQUESTS: Final = 20_000
"""A claim names every key: this keeps one under half a megabyte."""
SHARE: Final = 2
"""A shard is the remaining cost over SHARE × workers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardSizes:
    """How large shards may be."""

    workers: int = 1
    min_s: float = MIN_SHARD_S
    max_s: float = MAX_SHARD_S
    max_requests: int = MAX_SHARD_REQUESTS
    limit_s: float = math.inf
    """What fits a time limit: whatever the strategy, a shard that is predicted to take longer is cut. A single request
    that does is a shard of its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OwedTask:
    """The owed part of one recording: arrays of one length n."""

    fingerprint: str
    ordinals: NDArray[np.int64]
    documents: NDArray[np.int64]
    cost_s: NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AskingOrder:
    """Rows of a request table in the order in which they are asked, with their costs."""

    table: RequestTable
    rows: NDArray[np.int32]
    cost_s: NDArray[np.float64]

    def owed(self, bits: Bits) -> NDArray[np.int64]:
        """Positions in this order of the rows whose bits are set."""
        return np.flatnonzero(np.unpackbits(bits, count=self.table.rows)[self.rows])


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Cut:
    """Shards of one set of owed requests; models that owe the same share one. Shard i: `ends[i-1]`..`ends[i]` - 1."""

    order: AskingOrder
    owed: Bits
    ends: NDArray[np.int64]
    """Counted in the owed requests, in asking order."""
    cost_s: NDArray[np.float64]
    """Of each shard."""

    @property
    def requests(self) -> int:
        """Requests in all shards."""
        return int(self.ends[-1]) if len(self.ends) else 0

    def places(self) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Task (its number in the table) and ordinal of every owed request, in asking order."""
        rows = self.order.rows[self.order.owed(self.owed)]
        starts = self.order.table.starts
        task = np.searchsorted(starts, rows, side="right") - 1
        return task.astype(np.int32), (rows - starts[task]).astype(np.int32)


class Shards(Sequence[Shard]):
    """The shards of one model, made when they are looked at; equal to any sequence of the same shards."""

    __slots__ = ("cut", "model")

    def __init__(self, model: str, cut: Cut) -> None:
        self.model: Final = model
        self.cut: Final = cut

    def __len__(self) -> int:
        return len(self.cut.ends)

    def __iter__(self) -> Iterator[Shard]:
        task, ordinal = self.cut.places()
        start = 0
        for i, stop in enumerate(self.cut.ends.tolist()):
            yield self._shard(i, task[start:stop], ordinal[start:stop])
            start = stop

    @overload
    def __getitem__(self, index: int) -> Shard: ...
    @overload
    def __getitem__(self, index: slice) -> list[Shard]: ...
    def __getitem__(self, index: int | slice) -> Shard | list[Shard]:
        if isinstance(index, slice):
            return list(self)[index]
        i = range(len(self))[index]
        task, ordinal = self.cut.places()
        ends = self.cut.ends
        chosen = slice(int(ends[i - 1]) if i else 0, int(ends[i]))
        return self._shard(i, task[chosen], ordinal[chosen])

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        theirs: list[object] = list(other)  # pyright: ignore[reportUnknownArgumentType]
        return len(self) == len(theirs) and all(a == b for a, b in zip(self, theirs, strict=True))

    __hash__ = None  # pyright: ignore[reportAssignmentType]

    def _shard(self, i: int, task: NDArray[np.int32], ordinal: NDArray[np.int32]) -> Shard:
        names = self.cut.order.table.fingerprints
        tasks: list[int] = task.tolist()
        ordinals: list[int] = ordinal.tolist()
        items = tuple((names[t], o) for t, o in zip(tasks, ordinals, strict=True))
        return Shard(id=shard_id(i), model=self.model, items=items, cost_s=float(self.cut.cost_s[i]))


def shard_id(number: int) -> str:
    """The name of a model's shard."""
    return f"{number:06d}"


def longest_documents_first(table: RequestTable, cost_s: NDArray[np.float64]) -> AskingOrder:
    """The order in which `balanced` asks: dear documents first, each one's requests side by side."""
    rows = np.flatnonzero(np.unpackbits(table.first, count=table.rows))
    sizes = [int(t.documents.max()) + 1 if len(t) else 0 for t in table.tasks]
    offsets = np.cumsum([0, *sizes])
    groups = np.zeros(table.rows, np.int64)
    for task, offset, start in zip(table.tasks, offsets.tolist(), table.starts.tolist(), strict=False):
        groups[start : start + len(task)] = task.documents + offset
    order = _by_group(groups[rows], cost_s[rows])
    rows = rows[order].astype(np.int32)
    return AskingOrder(table=table, rows=rows, cost_s=cost_s[rows])


def cut_owed(order: AskingOrder, owed: Bits, sizes: ShardSizes) -> Cut:
    """Cut the owed part of an order into shards of decreasing size."""
    cost = order.cost_s[order.owed(owed)]
    ends = np.array(list(guided_ends(cost, sizes)), dtype=np.int64)
    return Cut(order=order, owed=owed, ends=ends, cost_s=stretch_sums(cost, ends))


def cut_shards(
    model: str,
    owed: Sequence[OwedTask],
    *,
    workers: int = 1,
    min_s: float = MIN_SHARD_S,
    max_s: float = MAX_SHARD_S,
    max_requests: int = MAX_SHARD_REQUESTS,
) -> list[Shard]:
    """Shards that cover every owed request exactly once, in the order in which they should be asked."""
    tasks = [t for t in owed if len(t.ordinals)]
    if not tasks:
        return []
    cost = np.concatenate([t.cost_s for t in tasks])
    offsets = np.cumsum([0, *(int(t.documents.max()) + 1 for t in tasks[:-1])])
    order = _by_group(np.concatenate([t.documents + o for t, o in zip(tasks, offsets, strict=True)]), cost)
    which = np.repeat(np.arange(len(tasks)), [len(t.ordinals) for t in tasks])[order]
    ordinals = np.concatenate([t.ordinals for t in tasks])[order]
    sizes = ShardSizes(workers=workers, min_s=min_s, max_s=max_s, max_requests=max_requests)
    shards: list[Shard] = []
    start = 0
    for stop in guided_ends(cost[order], sizes):
        slice_tasks: list[int] = which[start:stop].tolist()
        slice_ordinals: list[int] = ordinals[start:stop].tolist()
        items = tuple((tasks[i].fingerprint, o) for i, o in zip(slice_tasks, slice_ordinals, strict=True))
        cost_s = float(cost[order[start:stop]].sum())
        shards.append(Shard(id=shard_id(len(shards)), model=model, items=items, cost_s=cost_s))
        start = stop
    return shards


def guided_ends(cost: NDArray[np.float64], sizes: ShardSizes) -> Iterator[int]:
    """Where each shard ends, given costs in asking order."""
    if not len(cost):
        return
    ends = np.cumsum(cost)
    total = float(ends[-1])
    largest = min(max(sizes.max_s, sizes.min_s), sizes.limit_s)
    start = 0
    while start < len(cost):
        done = float(ends[start - 1]) if start else 0.0
        size = min(largest, max(sizes.min_s, (total - done) / (SHARE * sizes.workers)))
        stop = int(np.searchsorted(ends, done + size, side="right"))
        start = min(max(stop, start + 1), start + sizes.max_requests, len(cost))
        yield start


def fitting_ends(cost: NDArray[np.float64], ends: NDArray[np.int64], limit_s: float) -> NDArray[np.int64]:
    """`ends` of stretches of requests, and those at which every stretch is cut that costs more than `limit_s`.

    Pieces are as long as fits. A single request above the limit stands alone.
    """
    found: list[int] = []
    start = 0
    for end in ends.tolist():
        summed = np.cumsum(cost[start:end])
        done, at = 0.0, 0
        while at < len(summed):
            # An even cut would leave no short piece, but could not promise that each fits.
            at = max(int(np.searchsorted(summed, done + limit_s, side="right")), at + 1)
            done = float(summed[at - 1])
            found.append(start + at)
        start = end
    return np.array(found, dtype=np.int64)


def stretch_sums(cost: NDArray[np.float64], ends: NDArray[np.int64]) -> NDArray[np.float64]:
    """Sum of each non-empty stretch that ends where `ends` says."""
    return np.add.reduceat(cost, np.concatenate([[0], ends[:-1]])) if len(ends) else np.empty(0, np.float64)


def _by_group(groups: NDArray[np.int64], cost: NDArray[np.float64]) -> NDArray[np.int64]:
    """The permutation that puts dear groups first and keeps each together, in its own order."""
    if not len(groups):
        return np.empty(0, np.int64)
    per_group = np.bincount(groups, weights=cost)
    place = np.empty(len(per_group), np.int32)
    place[np.argsort(-per_group, kind="stable")] = np.arange(len(per_group), dtype=np.int32)
    return np.argsort(place[groups], kind="stable")
