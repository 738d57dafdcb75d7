"""Cut what one model owes into shards.

Order inside a model: documents longest first, so that the tail is short; a document's requests stay side
by side, so that a prefix cache serves all its choices. Sizes follow guided self-scheduling (Polychronopoulos
and Kuck, 1987): each next shard is the remaining cost over twice the number of workers, so the first ones are
large and the last ones small, and never below a floor that pays for claiming one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from proctor.records import Shard

MIN_SHARD_S = 2.0
MAX_SHARD_S = 600.0
MAX_SHARD_REQUESTS = 20_000
"""A claim names every key: this keeps one under half a megabyte."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OwedTask:
    """The owed part of one recording: arrays of one length n."""

    fingerprint: str
    ordinals: NDArray[np.int64]
    documents: NDArray[np.int64]
    cost_s: NDArray[np.float64]


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
    order, cost = _asking_order(tasks)
    which = np.concatenate([np.full(len(t.ordinals), i) for i, t in enumerate(tasks)])[order]
    ordinals = np.concatenate([t.ordinals for t in tasks])[order]
    shards: list[Shard] = []
    for start, stop in _bounds(cost, workers=workers, min_s=min_s, max_s=max_s, max_requests=max_requests):
        slice_tasks: list[int] = which[start:stop].tolist()
        slice_ordinals: list[int] = ordinals[start:stop].tolist()
        items = tuple((tasks[i].fingerprint, o) for i, o in zip(slice_tasks, slice_ordinals, strict=True))
        shards.append(Shard(id=f"{len(shards):06d}", model=model, items=items, cost_s=float(cost[start:stop].sum())))
    return shards


def _asking_order(tasks: Sequence[OwedTask]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The permutation of all requests, and their costs in that order."""
    cost = np.concatenate([t.cost_s for t in tasks])
    # One number for each (task, document), then the document's whole cost for each of its requests.
    sizes = [int(t.documents.max()) + 1 for t in tasks]
    offsets = np.cumsum([0, *sizes[:-1]])
    groups = np.concatenate([t.documents + o for t, o in zip(tasks, offsets, strict=True)])
    per_group = np.bincount(groups, weights=cost)
    position = np.arange(len(cost))
    order = np.lexsort((position, groups, -per_group[groups]))
    return order, cost[order]


def _bounds(
    cost: NDArray[np.float64], *, workers: int, min_s: float, max_s: float, max_requests: int
) -> Iterator[tuple[int, int]]:
    ends = np.cumsum(cost)
    total = float(ends[-1])
    start = 0
    while start < len(cost):
        done = float(ends[start - 1]) if start else 0.0
        size = min(max(max_s, min_s), max(min_s, (total - done) / (2 * workers)))
        stop = int(np.searchsorted(ends, done + size, side="right"))
        stop = min(max(stop, start + 1), start + max_requests, len(cost))
        yield start, stop
        start = stop
