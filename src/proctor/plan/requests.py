"""All requests of a run, once for all of its models, and which of them a model owes, as bits.

A thousand checkpoints are asked the same questions. What depends on the questions alone is computed once; what a
model adds is one bit for each request. So a billion owed answers are a thousand rows of 150 kB, and models that owe
the same set share one plan.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Self

import numpy as np
from numpy.typing import NDArray

from proctor.plan.cost import CostModel, Lengths

Bits = NDArray[np.uint8]
"""One bit a row, packed as by `numpy.packbits`; every task begins at a word of its own."""

WORD: Final = 64
"""Rows of a machine word: bits are counted so many at a time."""
_FINE: Final = 64
"""Parts of a token that sums are made in."""


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
    """Recordings one after the other; a row is a request. Rows between two tasks, up to 63, are of no request."""

    tasks: tuple[TaskRequests, ...]
    starts: NDArray[np.int64]
    """First row of each task, and the number of rows: multiples of `WORD`."""
    first_in_task: Bits
    """Rows whose question no earlier row of the same task asks."""
    first: Bits
    """Rows whose question no earlier row of the run asks: these are the ones that are asked."""

    @classmethod
    def of(cls, tasks: Sequence[TaskRequests]) -> Self:
        """The table of these recordings, in this order."""
        sizes = np.array([-(-len(t) // WORD) * WORD for t in tasks], dtype=np.int64)
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
    def shares(self) -> bool:
        """Whether tasks have questions in common."""
        return not np.array_equal(self.first, self.first_in_task)

    @property
    def rows(self) -> int:
        """Rows, those between the tasks included."""
        return int(self.starts[-1])

    def bits(self, of_tasks: Sequence[Bits]) -> Bits:
        """One task's bits after the other's. Each has ⌈n/8⌉ bytes; ValueError otherwise."""
        out = np.zeros(self.rows // 8, np.uint8)
        for start, task, bits in zip(self.starts.tolist(), self.tasks, of_tasks, strict=False):
            if len(bits) != -(-len(task) // 8):
                raise ValueError(f"{len(bits)} bytes for {len(task)} rows")
            out[start // 8 : start // 8 + len(bits)] = bits
        return out

    def counts(self, bits: Bits) -> NDArray[np.int64]:
        """Set bits of each task."""
        return self.counts_of(np.bitwise_count(bits.view(np.uint64))[None])[0]

    def counts_of(self, words: NDArray[np.uint8]) -> NDArray[np.int64]:
        """Sums within each task, for each row of `words`: a number below 256 for each word."""
        # reduceat gives the element itself for an empty stretch, and refuses one at the very end.
        out = np.zeros((len(words), len(self.tasks)), np.int64)
        starts = self.starts // WORD
        filled = np.flatnonzero(starts[1:] > starts[:-1])
        if len(filled):
            out[:, filled] = np.add.reduceat(words, starts[filled], axis=1, dtype=np.int64)
        return out

    def column(self, of_tasks: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
        """A column of the table from each task's values; 0 between the tasks."""
        out = np.zeros(self.rows, np.float64)
        for start, values in zip(self.starts.tolist(), of_tasks, strict=False):
            out[start : start + len(values)] = values
        return out


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Totals:
    """Sums over some rows, of each task."""

    requests: NDArray[np.int64]
    cost_s: NDArray[np.float64]
    prompt_tokens: NDArray[np.float64]
    completion_tokens: NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Priced:
    """A request table under one cost model. A model's share of it is summed in a millisecond for a million rows."""

    table: RequestTable
    model: CostModel
    cost_us: NDArray[np.int64]
    """Of each row, in microseconds."""
    dearest: NDArray[np.int32]
    """Rows by cost, dear ones first."""
    prompt: NDArray[np.uint64]
    """Expected tokens as planes: see `_planes`."""
    completion: NDArray[np.uint64]

    @classmethod
    def of(cls, table: RequestTable, model: CostModel, measured: Mapping[str, Lengths] | None = None) -> Self:
        """Price every row; `measured` by task fingerprint."""
        known = measured or {}
        tokens = [model.tokens(t.characters, t.caps, known.get(t.fingerprint)) for t in table.tasks]
        cost = table.column([model.cost_s(t) for t in tokens])
        cost_us = np.rint(cost * 1e6).astype(np.int64)
        return cls(
            table=table,
            model=model,
            cost_us=cost_us,
            dearest=np.argsort(-cost_us, kind="stable").astype(np.int32),
            prompt=_planes(table.column([t.prompt for t in tokens])),
            completion=_planes(table.column([t.completion for t in tokens])),
        )

    def totals(self, bits: Bits) -> Totals:
        """What the rows whose bits are set come to."""
        count, words = self.table.counts(bits), bits.view(np.uint64)
        prompt, completion = (self._sums(planes, words) for planes in (self.prompt, self.completion))
        return Totals(
            requests=count,
            cost_s=self.model.total_s(count, prompt, completion),
            prompt_tokens=prompt,
            completion_tokens=completion,
        )

    def _sums(self, planes: NDArray[np.uint64], words: NDArray[np.uint64]) -> NDArray[np.float64]:
        found = np.empty((len(planes), len(words)), np.uint8)
        for plane, into in zip(planes, found, strict=True):
            np.bitwise_count(plane & words, out=into)
        counts = self.table.counts_of(found)
        return (counts << np.arange(len(planes))[:, None]).sum(axis=0) / _FINE

    def longest_s(self, bits: Bits) -> float:
        """The cost of the dearest row whose bit is set; 0 if there is none."""
        start, step = 0, 256
        while start < len(self.dearest):
            rows = self.dearest[start : start + step]
            found = np.flatnonzero((bits[rows >> 3] >> (7 - (rows & 7))) & 1)
            if len(found):
                return int(self.cost_us[rows[found[0]]]) / 1e6
            start, step = start + step, step * 8
        return 0.0


def _planes(column: NDArray[np.float64]) -> NDArray[np.uint64]:
    """A column of the table in whole parts of a token, plane by plane: plane i has bit i of every row's number.

    So the sum over some rows is a few counts of bits, which take a tenth of the time of adding numbers up.
    """
    whole = np.rint(column * _FINE).astype(np.uint64)
    count = int(whole.max(initial=0)).bit_length()
    planes = [np.packbits((whole >> np.uint64(i)).astype(np.uint8) & 1) for i in range(count)]
    return np.array(planes, np.uint8).reshape(count, len(column) // 8).view(np.uint64)


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
