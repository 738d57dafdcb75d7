"""The index of a model's answer rows: sorted tables that say which row answers which key."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Self

import numpy as np
from numpy.typing import NDArray

from proctor.store.keys import KeyArray, KeyTable
from proctor.store.scan import KIND_ALIAS, KIND_PERMANENT, KIND_RESPONSE, KIND_RETRYABLE, Block

_DELTA_ROWS: Final = 1 << 16
"""New rows are sorted apart until they are this many, or a quarter of the rest: a refresh costs what is new."""

Mask = NDArray[np.bool_]
Numbers = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tables:
    """Keys to row numbers. Which row stands for a key is a function of the rows alone, not of their files."""

    logical: KeyTable
    """The first response or alias of a key, under our resolution."""
    failures: KeyTable
    """The last failure of a key, under our resolution."""
    physical: KeyTable
    """The first response to a physical key, under any resolution."""

    @classmethod
    def of(cls, rows: Block, resolution: int, usable: Mask, start: int) -> Self:
        """The tables of the rows from number `start` on."""
        chosen = rows.take(np.s_[start:])
        usable = usable[start:]
        mine = usable & (chosen.resolution == np.uint64(resolution))

        def table(which: Mask, keys: KeyArray, rank: Numbers) -> KeyTable:
            numbers = np.flatnonzero(which).astype(np.int64)
            return KeyTable(keys[numbers], numbers + start, rank[numbers])

        return cls(
            logical=table(mine & (chosen.kind <= KIND_ALIAS), chosen.key, chosen.at),
            failures=table(mine & (chosen.kind >= KIND_RETRYABLE), chosen.key, -chosen.at),
            physical=table(usable & (chosen.kind == KIND_RESPONSE), chosen.physical, chosen.at),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """What is known of some keys, in their order."""

    row: Numbers
    """The row that answers; -1 where there is none."""
    failure: Numbers
    """The last failure of a key without an answer; else -1."""
    permanent: Mask
    """Whether that failure is for good."""

    @property
    def owed(self) -> Mask:
        """Neither answered nor failed for good."""
        return (self.row < 0) & ~self.permanent


class Index:
    """Immutable: an addition gives a new one that shares the old one's tables, so readers need no lock."""

    __slots__ = ("_base", "_base_rows", "_delta", "_resolution", "_usable", "rows", "source")

    def __init__(
        self,
        resolution: int,
        rows: Block,
        source: NDArray[np.int32],
        usable: Mask,
        base: tuple[_Tables, int] | None = None,
    ) -> None:
        """`source` is the number of each row's file; rows that are not `usable` are never found.

        `base`: tables of the first rows, and how many rows that is.
        """
        self._resolution = resolution
        self._usable = usable
        self.rows: Final = rows
        self.source: Final = source
        if base is not None and len(rows) - base[1] > max(_DELTA_ROWS, base[1] // 4):
            base = None
        self._base, self._base_rows = base or (_Tables.of(rows, resolution, usable, 0), len(rows))
        self._delta = None
        if len(rows) > self._base_rows:
            self._delta = _Tables.of(rows, resolution, usable, self._base_rows)

    def added(self, block: Block, source: NDArray[np.int32], usable: Mask) -> Index:
        """The index with more rows."""
        return Index(
            self._resolution,
            Block.joined([self.rows, block]),
            np.concatenate([self.source, source]),
            np.concatenate([self._usable, usable]),
            (self._base, self._base_rows),
        )

    def kept(self, keep: Mask) -> Index:
        """The index of the rows that `keep` chooses."""
        return Index(self._resolution, self.rows.take(keep), self.source[keep], self._usable[keep])

    def without(self, numbers: Numbers) -> Index:
        """The index in which these rows are no longer found."""
        usable = self._usable.copy()
        usable[numbers] = False
        return Index(self._resolution, self.rows, self.source, usable)

    def split(self, keys: KeyArray) -> Split:
        """Find each key."""
        row = self.find(keys)
        failure = np.full(len(keys), -1, np.int64)
        lost = row < 0
        failure[lost] = self._look(keys[lost], "failures", later=True)
        permanent = failure >= 0
        permanent[permanent] = self.rows.kind[failure[permanent]] == KIND_PERMANENT
        return Split(row=row, failure=failure, permanent=permanent)

    def find(self, keys: KeyArray) -> Numbers:
        """The row that answers each key; -1 where there is none."""
        found = self._look(keys, "logical")
        known = found >= 0
        found[known] = self.physical(self.rows.physical[found[known]])
        return found

    def physical(self, keys: KeyArray) -> Numbers:
        """The row that answers each physical key; -1 where there is none."""
        return self._look(keys, "physical")

    def _look(self, keys: KeyArray, name: str, *, later: bool = False) -> Numbers:
        base: KeyTable = getattr(self._base, name)
        found = base.find(keys)
        if self._delta is None:
            return found
        delta: KeyTable = getattr(self._delta, name)
        new = delta.find(keys)
        at = self.rows.at
        better = at[new] > at[found] if later else at[new] < at[found]
        return np.where((new >= 0) & ((found < 0) | better), new, found)

    @property
    def responses(self) -> int:
        """How many distinct physical keys have a response."""
        return self._distinct("physical")

    @property
    def answered(self) -> int:
        """How many distinct keys have a response or alias under our resolution."""
        return self._distinct("logical")

    @property
    def duplicates(self) -> int:
        """Responses beyond the first of a physical key, not counting exact copies of a row."""
        which = np.flatnonzero(self._usable & (self.rows.kind == KIND_RESPONSE))
        surplus = len(which) - self.responses
        if not surplus:
            return 0
        at, crc = self.rows.at[which], self.rows.crc[which]
        order = np.lexsort((crc, at))
        at, crc = at[order], crc[order]
        return surplus - int(((at[1:] == at[:-1]) & (crc[1:] == crc[:-1])).sum())

    def _distinct(self, name: str) -> int:
        base: KeyTable = getattr(self._base, name)
        if self._delta is None:
            return len(base)
        delta: KeyTable = getattr(self._delta, name)
        return len(base) + int((base.find(delta.keys) < 0).sum())
