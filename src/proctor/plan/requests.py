"""All requests of a run, once for all of its models, and which of them a model owes, as bits.

A thousand checkpoints are asked the same questions. What depends on the questions alone is computed once; what a
model adds is one bit for each request. So a billion owed answers are a thousand rows of 150 kB, and models that owe
the same set share one plan.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from proctor.plan.cost import CostModel, Lengths

Value = TypeVar("Value", np.int64, np.float64)

Bits = NDArray[np.uint8]
"""One bit a row, packed as by `numpy.packbits`; every task begins at a byte of its own."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TaskRequests:
    """One recording; arrays have one entry for each request, in order."""

    fingerprint: str
    task: str
    num_fewshot: int
    labels: tuple[str, ...] = ()
    keys: NDArray[np.uint64]
    """Shape (n, 2): equal keys are the same question."""
    documents: NDArray[np.int64]
    characters: NDArray[np.int64]
    caps: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.keys)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RequestTable:
    """Recordings one after the other; a row is a request. Rows between two tasks, up to 7, are of no request."""

    tasks: tuple[TaskRequests, ...]
    starts: NDArray[np.int64]
    """First row of each task, and the number of rows: multiples of 8."""
    first_in_task: Bits
    """Rows whose question no earlier row of the same task asks."""
    first: Bits
    """Rows whose question no earlier row of the run asks: these are the ones that are asked."""

    @classmethod
    def of(cls, tasks: Sequence[TaskRequests]) -> Self:
        """The table of these recordings, in this order."""
        sizes = np.array([-(-len(t) // 8) * 8 for t in tasks], dtype=np.int64)
        starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        rows = [np.arange(len(t), dtype=np.int64) + starts[i] for i, t in enumerate(tasks)]
        row = np.concatenate(rows) if rows else np.empty(0, np.int64)
        which = np.repeat(np.arange(len(tasks)), [len(t) for t in tasks])
        keys = np.concatenate([t.keys for t in tasks]) if tasks else np.empty((0, 2), np.uint64)
        in_task = np.zeros(int(starts[-1]), np.bool_)
        in_run = np.zeros(int(starts[-1]), np.bool_)
        in_task[row] = in_run[row] = True
        again, before = _repeated(keys)
        in_run[row[again]] = False
        in_task[row[again[which[again] == which[before]]]] = False
        return cls(tasks=tuple(tasks), starts=starts, first_in_task=np.packbits(in_task), first=np.packbits(in_run))

    @property
    def fingerprints(self) -> list[str]:
        """Of the tasks, in order."""
        return [t.fingerprint for t in self.tasks]

    @property
    def rows(self) -> int:
        """Rows, those between the tasks included."""
        return int(self.starts[-1])

    def bits(self, of_tasks: Sequence[Bits]) -> Bits:
        """One task's bits after the other's. Each has ⌈n/8⌉ bytes; ValueError otherwise."""
        found = np.concatenate([*of_tasks, np.empty(0, np.uint8)])
        if len(found) != self.rows // 8:
            raise ValueError(f"{len(found)} bytes for {self.rows} rows")
        return found

    def counts(self, bits: Bits) -> NDArray[np.int64]:
        """Set bits of each task."""
        return self.sums(np.bitwise_count(bits).astype(np.int64), 8)

    def sums(self, values: NDArray[np.int64], rows: int = 1) -> NDArray[np.int64]:
        """Sum of `values` within each task; each value stands for `rows` rows."""
        return _segment_sums(values, self.starts // rows)

    def column(self, of_tasks: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
        """A column of the table from each task's values; 0 between the tasks."""
        out = np.zeros(self.rows, np.float64)
        for start, values in zip(self.starts.tolist(), of_tasks, strict=False):
            out[start : start + len(values)] = values
        return out


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Priced:
    """A request table under one cost model: columns of seconds and expected tokens."""

    table: RequestTable
    model: CostModel
    cost_s: NDArray[np.float64]
    prompt_tokens: NDArray[np.float64]
    completion_tokens: NDArray[np.float64]

    @classmethod
    def of(cls, table: RequestTable, model: CostModel, measured: Mapping[str, Lengths] | None = None) -> Self:
        """Price every row; `measured` by task fingerprint."""
        known = measured or {}
        tokens = [model.tokens(t.characters, t.caps, known.get(t.fingerprint)) for t in table.tasks]
        return cls(
            table=table,
            model=model,
            cost_s=table.column([model.cost_s(t) for t in tokens]),
            prompt_tokens=table.column([t.prompt for t in tokens]),
            completion_tokens=table.column([t.completion for t in tokens]),
        )

    def totals(self, column: NDArray[np.float64], bits: Bits) -> NDArray[np.float64]:
        """Sum of a column over the set bits, of each task."""
        return _segment_sums(column * np.unpackbits(bits, count=self.table.rows), self.table.starts)


def _repeated(keys: NDArray[np.uint64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Positions of keys that an earlier position has too, and for each the last such position."""
    high = keys[:, 0]
    order = np.argsort(high)
    same = high[order][1:] == high[order][:-1]
    # Nearly all keys differ in their first half: only those that do not are sorted by the whole.
    close = np.zeros(len(order), np.bool_)
    close[1:] |= same
    close[:-1] |= same
    some = np.sort(order[close])
    some = some[np.lexsort((some, keys[some, 1], keys[some, 0]))]
    equal = (keys[some][1:] == keys[some][:-1]).all(axis=1)
    return some[1:][equal], some[:-1][equal]


def _segment_sums(values: NDArray[Value], starts: NDArray[np.int64]) -> NDArray[Value]:
    # reduceat gives the element itself for an empty stretch, and refuses one at the very end.
    out = np.zeros(len(starts) - 1, values.dtype)
    filled = np.flatnonzero(starts[1:] > starts[:-1])
    if len(filled):
        out[filled] = np.add.reduceat(values, starts[filled])
    return out
