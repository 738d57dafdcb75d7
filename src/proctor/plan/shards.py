"""The shards of one model, as values."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, overload

import numpy as np
from numpy.typing import NDArray

from proctor.plan.cuts import (
    MAX_SHARD_REQUESTS,
    MAX_SHARD_S,
    Cut,
    ShardSizes,
    by_group,
    floor_s,
    guided_ends,
    microseconds,
)
from proctor.records import Shard


@dataclass(frozen=True, slots=True, kw_only=True)
class OwedTask:
    """The owed part of one recording: arrays of one length n."""

    fingerprint: str
    ordinals: NDArray[np.int64]
    documents: NDArray[np.int64]
    cost_s: NDArray[np.float64]


class Shards(Sequence[Shard]):
    """The shards of one model, made when they are looked at; equal to any sequence of the same shards."""

    __slots__ = ("cut", "ids", "model")

    def __init__(self, model: str, cut: Cut, ids: Sequence[str] | None = None) -> None:
        """`ids`: names instead of `shard_id`."""
        self.model: Final = model
        self.cut: Final = cut
        self.ids: Final = ids

    def __len__(self) -> int:
        return len(self.cut.ends)

    def __bool__(self) -> bool:
        return self.cut.requests > 0

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
        names = self.cut.order.fingerprints
        tasks: list[int] = task.tolist()
        ordinals: list[int] = ordinal.tolist()
        items = tuple((names[t], o) for t, o in zip(tasks, ordinals, strict=True))
        name = shard_id(i) if self.ids is None else self.ids[i]
        return Shard(id=name, model=self.model, items=items, cost_s=int(self.cut.cost_us[i]) / 1e6)


def shard_id(number: int) -> str:
    """The name of a model's shard."""
    return f"{number:06d}"


def cut_shards(
    model: str,
    owed: Sequence[OwedTask],
    *,
    workers: int = 1,
    min_s: float | None = None,
    max_s: float = MAX_SHARD_S,
    max_requests: int = MAX_SHARD_REQUESTS,
) -> list[Shard]:
    """Shards that cover every owed request exactly once, in the order in which they should be asked.

    `min_s`: instead of `floor_s`.
    """
    tasks = [t for t in owed if len(t.ordinals)]
    if not tasks:
        return []
    cost = microseconds(np.concatenate([t.cost_s for t in tasks]))
    offsets = np.cumsum([0, *(int(t.documents.max()) + 1 for t in tasks[:-1])])
    order = by_group(np.concatenate([t.documents + o for t, o in zip(tasks, offsets, strict=True)]), cost)
    which = np.repeat(np.arange(len(tasks)), [len(t.ordinals) for t in tasks])[order]
    ordinals = np.concatenate([t.ordinals for t in tasks])[order]
    done = np.cumsum(cost[order])
    floor = floor_s(int(done[-1]) / 1e6, workers) if min_s is None else min_s
    sizes = ShardSizes(workers=workers, min_s=floor, max_s=max_s, max_requests=max_requests)
    shards: list[Shard] = []
    start = before = 0
    for stop in guided_ends(done, sizes):
        slice_tasks: list[int] = which[start:stop].tolist()
        slice_ordinals: list[int] = ordinals[start:stop].tolist()
        items = tuple((tasks[i].fingerprint, o) for i, o in zip(slice_tasks, slice_ordinals, strict=True))
        cost_s = (int(done[stop - 1]) - before) / 1e6
        shards.append(Shard(id=shard_id(len(shards)), model=model, items=items, cost_s=cost_s))
        start, before = stop, int(done[stop - 1])
    return shards
