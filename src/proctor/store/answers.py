"""What the store knows about one model: which requests are answered, which are owed, and the answers."""

from __future__ import annotations

import contextlib
import os
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from proctor.errors import StoreError
from proctor.records import Answer, EngineInfo, Failure
from proctor.store import part, rows, struck
from proctor.store.durable import GONE, as_store_error, store_errors
from proctor.store.keys import KeyArray, KeyTable, key_array
from proctor.store.owner import Alive, alive
from proctor.store.rows import Damage
from proctor.store.scan import (
    KIND_ALIAS,
    KIND_PERMANENT,
    KIND_RESPONSE,
    KIND_RETRYABLE,
    Block,
    resolution_number,
    scan,
)
from proctor.store.segments import Listing, listing, open_segment

_ROUNDS: Final = 6
"""Listings taken before a file that came and went is believed to be gone."""
_ROUND_WAIT_S: Final = 0.05
_READ_BYTES: Final = 8 << 20
_READ_GAP: Final = 64 << 10
"""Rows nearer than this are read in one go."""


@dataclass(slots=True, eq=False)
class _Source:
    """A segment or part as far as it has been read."""

    name: str
    """Stem of a segment, file name of a part."""
    is_part: bool
    number: int
    end: int = 0
    finished: bool = False
    engines: list[EngineInfo] = field(default_factory=list[EngineInfo])
    damage: list[tuple[int, int]] = field(default_factory=list[tuple[int, int]])
    replaces: tuple[str, ...] = ()


class Answers:
    """A snapshot of the answers under one resolution, moved forward by `refresh`.

    The first success for a key, and for a physical key, by time stamp, is its answer for ever; a success
    supersedes failures, and of failures the last one counts. Not safe for use by two threads at a time.
    """

    def __init__(self, directory: Path, resolution: str, *, alive: Alive = alive) -> None:
        """Read everything that is there. Raises StoreError if the store cannot be read."""
        self._directory = directory
        self._resolution = resolution_number(resolution)
        self._alive = alive
        self._sources: dict[str, _Source] = {}
        self._by_number: dict[int, _Source] = {}
        self._next_number = 0
        self._rows = Block.empty()
        self._source = np.empty(0, np.int32)
        self._struck: dict[str, struck.Struck] = {}
        self._read_damage: list[Damage] = []
        self._index()
        self.refresh()

    # --- what is known ---

    def answered(self, key: str) -> bool:
        """Whether a response to this key is stored."""
        return bool(self._find(key_array([key]))[0] >= 0)

    def has_physical(self, physical_key: str) -> bool:
        """Whether a response to this physical key is stored, under whatever resolution."""
        return bool(self._physical.find(key_array([physical_key]))[0] >= 0)

    def failure(self, key: str) -> Failure | None:
        """The last failure of a key that has no response. Raises StoreError if it cannot be read."""
        answer = self.read([key]).get(key)
        return answer if isinstance(answer, Failure) else None

    def owed(self, keys: Sequence[str]) -> list[str]:
        """Those of `keys` that can still be answered: nothing is stored, or a failure that a retry may help."""
        _, lost, permanent = self._split(key_array(keys))
        return [keys[i] for i in np.flatnonzero(lost & ~permanent).tolist()]

    def failed(self, keys: Sequence[str]) -> list[str]:
        """Those of `keys` that have failed for good; they are not owed."""
        _, _, permanent = self._split(key_array(keys))
        return [keys[i] for i in np.flatnonzero(permanent).tolist()]

    def read(self, keys: Sequence[str]) -> dict[str, Answer]:
        """The answers to those of `keys` that have one, failures included; one key is answered once.

        What proves damaged while being read is left out, listed in `damage`, and owed from then on.
        Raises StoreError if the store cannot be read.
        """
        out: dict[str, Answer] = {}
        left = list(dict.fromkeys(keys))
        for _ in range(_ROUNDS):
            array = key_array(left)
            found, lost, _ = self._split(array)
            found[lost] = self._failures.find(array[lost])
            known = np.flatnonzero(found >= 0)
            bad, gone = self._fetch([left[i] for i in known.tolist()], found[known], out)
            if gone:
                time.sleep(_ROUND_WAIT_S)
                self.refresh()
            if bad:
                self._strike(bad)
            if not bad and not gone:
                return out
            left = [key for key in left if key not in out]
        raise StoreError(
            f"the answers in {self._directory} keep changing while they are read",
            hint="is another program deleting files there?",
        )

    def engines(self) -> dict[str, EngineInfo]:
        """Every engine that rows refer to, by id."""
        return {engine.id: engine for source in self._sources.values() for engine in source.engines}

    @property
    def damage(self) -> list[Damage]:
        """What could not be understood, by file and offset."""
        found = [
            Damage(file=source.name, offset=offset, bytes=size)
            for source in self._sources.values()
            for offset, size in source.damage
        ]
        return sorted(found + self._read_damage, key=lambda d: (d.file, d.offset))

    @property
    def duplicates(self) -> int:
        """Responses to physical keys that had one already; they are kept and never used."""
        mine = self._rows.kind == KIND_RESPONSE
        surplus = int(mine.sum()) - len(self._physical)
        if not surplus:
            return 0
        chosen = self._rows.take(mine)
        order = np.lexsort((chosen.crc, chosen.at))
        at, crc = chosen.at[order], chosen.crc[order]
        return surplus - int(((at[1:] == at[:-1]) & (crc[1:] == crc[:-1])).sum())

    @property
    def counts(self) -> dict[str, int]:
        """Rows: responses (distinct physical keys), aliases, failures, and keys answered under this resolution."""
        kind = self._rows.kind
        return {
            "responses": len(self._physical),
            "aliases": int((kind == KIND_ALIAS).sum()),
            "failures": int((kind >= KIND_RETRYABLE).sum()),
            "answered": len(self._logical),
        }

    # --- bringing it up to date ---

    def refresh(self) -> None:
        """Take in new files and what open segments have gained. Raises StoreError if the store cannot be read."""
        changed = False
        with store_errors("read answers", self._directory):
            seen = listing(self._directory)
            for _ in range(_ROUNDS):
                gained, settled = self._load(seen)
                changed |= gained
                again = listing(self._directory)
                # Compaction may have moved rows from a file not yet listed to one no longer listed.
                if settled and again.parts == seen.parts and again.segments.keys() == seen.segments.keys():
                    break
                if not settled:
                    time.sleep(_ROUND_WAIT_S)
                    again = listing(self._directory)
                seen = again
            changed |= self._forget(seen)
        if changed:
            self._index()

    def _load(self, seen: Listing) -> tuple[bool, bool]:
        """Read what `seen` lists; whether rows came in, and whether every file was there."""
        changed, settled = False, True
        for name in sorted(seen.struck - self._struck.keys()):
            self._struck[name] = struck.load(self._directory / name)
            changed = True
        for name in sorted(seen.parts - self._sources.keys()):
            try:
                head, block = part.read_index(self._directory / name)
            except OSError as error:
                if error.errno not in GONE:
                    raise
                settled = False
                continue
            source = self._add_source(name, is_part=True)
            source.engines, source.replaces, source.finished = list(head.engines), head.replaces, True
            self._append(source, block)
            changed = True
        replaced = self._replaced()
        for stem, sealed in sorted(seen.segments.items()):
            source = self._sources.get(stem)
            if stem in replaced or (source is not None and source.finished):
                continue
            try:
                changed |= self._scan(stem, sealed)
            except FileNotFoundError:
                settled = False
        return changed, settled

    def _scan(self, stem: str, sealed: bool) -> bool:
        """Read on in a segment; whether it had more rows. FileNotFoundError if it is gone."""
        fd, sealed = open_segment(self._directory, stem)
        try:
            source = self._sources.get(stem) or self._add_source(stem, is_part=False)
            found = scan(fd, source.end, complete=sealed)
            if not sealed and found.end < os.fstat(fd).st_size:
                owner = found.owner or scan(fd, 0, complete=False).owner
                if owner is not None and self._alive(owner) is False:
                    tail = scan(fd, found.end, complete=True)
                    found.blocks += tail.blocks
                    found.engines += tail.engines
                    found.damage += tail.damage
                    found.end = tail.end
        finally:
            os.close(fd)
        source.end, source.finished = found.end, sealed
        source.engines += found.engines
        source.damage += found.damage
        self._append(source, Block.joined(found.blocks))
        return bool(found.blocks)

    def _forget(self, seen: Listing) -> bool:
        """Drop files that are replaced or gone."""
        there = (seen.parts | seen.segments.keys()) - self._replaced()
        gone = self._sources.keys() - there
        if not gone:
            return False
        numbers = [self._sources[name].number for name in gone]
        keep = ~np.isin(self._source, numbers)
        self._rows, self._source = self._rows.take(keep), self._source[keep]
        for name in gone:
            del self._by_number[self._sources.pop(name).number]
        return True

    def _replaced(self) -> set[str]:
        return {name for source in self._sources.values() for name in source.replaces}

    def _add_source(self, name: str, *, is_part: bool) -> _Source:
        source = _Source(name=name, is_part=is_part, number=self._next_number)
        self._next_number += 1
        self._sources[name] = self._by_number[source.number] = source
        return source

    def _append(self, source: _Source, block: Block) -> None:
        if len(block):
            self._rows = Block.joined([self._rows, block])
            self._source = np.concatenate([self._source, np.full(len(block), source.number, np.int32)])

    def _index(self) -> None:
        """Sort what is known."""
        kind, at = self._rows.kind, self._rows.at
        usable = ~self._struck_rows()
        mine = usable & (self._rows.resolution == np.uint64(self._resolution))

        def table(chosen: NDArray[np.bool_], keys: KeyArray, rank: NDArray[np.int64]) -> KeyTable:
            numbers = np.flatnonzero(chosen).astype(np.int64)
            return KeyTable(keys[numbers], numbers, rank[numbers])

        self._logical = table(mine & (kind <= KIND_ALIAS), self._rows.key, at)
        self._failures = table(mine & (kind >= KIND_RETRYABLE), self._rows.key, -at)
        self._physical = table(usable & (kind == KIND_RESPONSE), self._rows.physical, at)

    def _struck_rows(self) -> NDArray[np.bool_]:
        """Which rows are known to be damaged."""
        out = np.zeros(len(self._rows), np.bool_)
        for entry in {entry for entries in self._struck.values() for entry in entries}:
            source = self._sources.get(entry[0])
            if source is not None:
                out |= (self._source == source.number) & (self._rows.where == entry[1])
        return out

    # --- finding and fetching ---

    def _find(self, keys: KeyArray) -> NDArray[np.int64]:
        """The row that answers each key; -1 where there is none."""
        found = self._logical.find(keys)
        known = found >= 0
        found[known] = self._physical.find(self._rows.physical[found[known]])
        return found

    def _split(self, keys: KeyArray) -> tuple[NDArray[np.int64], NDArray[np.bool_], NDArray[np.bool_]]:
        """Rows that answer; which keys have none; which of those have failed for good."""
        found = self._find(keys)
        lost = found < 0
        permanent = np.zeros(len(keys), np.bool_)
        failures = self._failures.find(keys[lost])
        if len(self._rows):
            permanent[lost] = (failures >= 0) & (self._rows.kind[failures] == KIND_PERMANENT)
        return found, lost, permanent

    def _fetch(self, keys: list[str], numbers: NDArray[np.int64], out: dict[str, Answer]) -> tuple[list[int], bool]:
        """Put the answers that stand in these rows into `out`; say which are damaged, and whether a file is gone."""
        bad: list[int] = []
        gone = False
        owners = self._source[numbers]
        for owner in np.unique(owners).tolist():
            source = self._by_number[owner]
            mine = np.flatnonzero(owners == owner)
            mine = mine[np.argsort(self._rows.where[numbers[mine]], kind="stable")]
            try:
                for i, body in zip([int(i) for i in mine], self._bodies(source, numbers[mine]), strict=True):
                    answer = self._answer(int(numbers[i]), body, keys[i])
                    if answer is None:
                        bad.append(int(numbers[i]))
                    else:
                        out[keys[i]] = answer
            except OSError as error:
                if error.errno not in GONE:
                    raise as_store_error(error, "read answers", self._directory / source.name) from error
                gone = True
        return bad, gone

    def _answer(self, number: int, body: bytes | None, key: str) -> Answer | None:
        """The answer in a row's bytes; None if they are not the row that was stored."""
        if body is None or zlib.crc32(body) != self._rows.crc[number]:
            return None
        try:
            row = rows.parse(body)
            same = self._same(self._rows.key, number, row["key"])
            if row["type"] != rows.FAILURE:
                same &= self._same(self._rows.physical, number, row["physical_key"])
            return rows.answer_of(row, key=key) if same else None
        except (KeyError, TypeError, ValueError):
            return None

    @staticmethod
    def _same(column: KeyArray, number: int, key: str) -> bool:
        return int(column[number, 0]) == int(key[:16], 16) and int(column[number, 1]) == int(key[16:32], 16)

    def _bodies(self, source: _Source, numbers: NDArray[np.int64]) -> Iterator[bytes | None]:
        """The bytes of these rows of one file, which are in its order. Raises OSError."""
        where = self._rows.where[numbers]
        if source.is_part:
            unique, back = np.unique(where, return_inverse=True)
            bodies = part.read_rows(self._directory / source.name, unique)
            number, body = -1, None
            for wanted in back.tolist():
                while number < wanted:
                    number, body = number + 1, next(bodies)[1]
                yield body
            return
        fd, _ = open_segment(self._directory, source.name)
        try:
            yield from _segment_bodies(fd, where.tolist(), self._rows.size[numbers].tolist())
        finally:
            os.close(fd)

    def _strike(self, numbers: list[int]) -> None:
        """Never use these rows again, and tell later readers where the store can be written."""
        entries = {(self._by_number[int(self._source[n])].name, int(self._rows.where[n])) for n in numbers}
        self._read_damage += [
            Damage(
                file=self._by_number[int(self._source[n])].name,
                offset=int(self._rows.where[n]),
                bytes=int(self._rows.size[n]),
            )
            for n in sorted(set(numbers))
        ]
        in_parts = {entry for entry in entries if self._sources[entry[0]].is_part}
        name = ""
        if in_parts:
            # A reader may well be on a read-only mount; the damage is reported all the same.
            with contextlib.suppress(OSError):
                name = struck.save(self._directory, in_parts)
        self._struck[name] = self._struck.get(name, frozenset()) | entries
        self._index()


def _segment_bodies(fd: int, where: list[int], size: list[int]) -> Iterator[bytes]:
    """Rows at ascending offsets, neighbours read together. A file that has become shorter gives short rows."""
    start, data = 0, b""
    for i, (offset, length) in enumerate(zip(where, size, strict=True)):
        if offset + length > start + len(data):
            end = offset + length
            for j in range(i + 1, len(where)):
                if where[j] - end > _READ_GAP or where[j] + size[j] - offset > _READ_BYTES:
                    break
                end = max(end, where[j] + size[j])
            start, data = offset, os.pread(fd, end - offset, offset)
        yield data[offset - start : offset - start + length]
