"""Even slices, and longest-processing-time-first assignment."""

from __future__ import annotations

import heapq
from collections.abc import Sequence


def even_bounds(total: int, parts: int) -> list[tuple[int, int]]:
    """`parts` slices of `total` items: slice i is ⌊total·i/parts⌋ .. ⌊total·(i+1)/parts⌋ - 1. Some may be empty."""
    if parts < 1:
        raise ValueError(f"{parts} parts")
    return [(total * i // parts, total * (i + 1) // parts) for i in range(parts)]


def longest_first(lengths: Sequence[float], workers: int, *, weights: Sequence[float] | None = None) -> list[list[int]]:
    """The items of each worker: by descending length × weight, each to the worker with the least so far.

    Equal costs keep their order, equal loads go to the lower number. The makespan is at most 4/3 - 1/(3·workers)
    of the best one (Graham, 1969). ValueError for workers < 1 or weights of another length.
    """
    if workers < 1:
        raise ValueError(f"{workers} workers")
    costs = list(lengths) if weights is None else [n * w for n, w in zip(lengths, weights, strict=True)]
    loads = [(0.0, worker) for worker in range(workers)]
    assigned: list[list[int]] = [[] for _ in range(workers)]
    for item in sorted(range(len(costs)), key=lambda i: -costs[i]):
        load, worker = heapq.heappop(loads)
        assigned[worker].append(item)
        heapq.heappush(loads, (load + costs[item], worker))
    return assigned
