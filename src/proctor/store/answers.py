"""What the store knows about one model: which requests are answered, which are owed, and the answers."""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
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
from proctor.store.index import Index, Mask, Numbers, Split
from proctor.store.keys import KeyArray, folded, key_array
from proctor.store.owner import Alive, alive
from proctor.store.rows import Damage
from proctor.store.scan import KIND_ALIAS, KIND_RETRYABLE, Block, resolution_number
from proctor.store.segments import Listing, listing, open_segment, scan_segment, segment_bodies, writer_of

_ROUNDS: Final = 6
"""Listings taken before a file that came and went is believed to be gone."""
_ROUND_WAIT_S: Final = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """Rows of one model."""

    responses: int
    """Distinct physical keys with a response."""
    answered: int
    """Distinct keys answered under the resolution that was asked for."""
    aliases: int
    failures: int
    duplicates: int


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


@dataclass(slots=True, eq=False)
class _Gain:
    """Rows that a refresh has found."""

    blocks: list[Block] = field(default_factory=list[Block])
    sources: list[NDArray[np.int32]] = field(default_factory=list[NDArray[np.int32]])

    def add(self, source: _Source, block: Block) -> None:
        if len(block):
            self.blocks.append(block)
            self.sources.append(np.full(len(block), source.number, np.int32))


class Answers:
    """A snapshot of the answers under one resolution, moved forward by `refresh`.

    The first success for a key, and for a physical key, by time stamp, is its answer for ever; a success
    supersedes failures, and of failures the last one counts. One thread may refresh while others look up.
    """

    def __init__(self, directory: Path, resolution: str, *, alive: Alive = alive, without: str | None = None) -> None:
        """Read everything that is there, but the segments of the writer `without`: who writes them knows them.

        Raises StoreError if the store cannot be read.
        """
        self._directory = directory
        self._alive = alive
        self._without = without
        self._sources: dict[str, _Source] = {}
        self._by_number: dict[int, _Source] = {}
        self._struck: dict[str, struck.Struck] = {}
        self._read_damage: list[Damage] = []
        self._moving = threading.Lock()
        self._index = Index(resolution_number(resolution), Block.empty(), np.empty(0, np.int32), np.empty(0, np.bool_))
        self.refresh()

    # --- what is known ---

    def answered(self, key: str) -> bool:
        """Whether a response to this key is stored."""
        return bool(self._index.find(key_array([key]))[0] >= 0)

    def physical_of(self, physical_keys: Sequence[str]) -> set[str]:
        """Those of `physical_keys` to which a response is stored, under whatever resolution."""
        rows = self._index.physical(key_array(physical_keys))
        return {physical_keys[i] for i in np.flatnonzero(rows >= 0).tolist()}

    def failure(self, key: str) -> Failure | None:
        """The last failure of a key that has no response. Raises StoreError if it cannot be read."""
        answer = self.read([key]).get(key)
        return answer if isinstance(answer, Failure) else None

    def owed(self, keys: Sequence[str]) -> list[str]:
        """Those of `keys` that can still be answered: nothing is stored, or a failure that a retry may help."""
        return [keys[i] for i in np.flatnonzero(self._index.split(key_array(keys)).owed).tolist()]

    def failed(self, keys: Sequence[str]) -> list[str]:
        """Those of `keys` that have failed for good; they are not owed."""
        return [keys[i] for i in np.flatnonzero(self._index.split(key_array(keys)).permanent).tolist()]

    def split(self, keys: KeyArray) -> Split:
        """What is known of each key of an array: which row answers it, and what has failed for good."""
        return self._index.split(keys)

    def stamp(self, keys: KeyArray) -> str | None:
        """A digest of the stored bytes that answer `keys`; None unless each is answered. Others have another one."""
        index = self._index
        row = index.find(keys)
        if (row < 0).any():
            return None
        return hashlib.sha256(index.rows.crc[row].tobytes() + index.rows.at[row].tobytes()).hexdigest()

    def reading_order(self, rows: Numbers) -> Numbers:
        """Positions in `rows`, which `split` gave, in the order in which their files hold them."""
        return np.lexsort((self._index.rows.where[rows], self._index.source[rows]))

    def read(self, keys: Sequence[str]) -> dict[str, Answer]:
        """The answers to those of `keys` that have one, failures included, in the order of `keys`.

        What proves damaged while being read is left out, listed in `damage`, and owed from then on.
        Raises StoreError if the store cannot be read.
        """
        out: dict[str, Answer] = {}
        left = list(dict.fromkeys(keys))
        for _ in range(_ROUNDS):
            index, by_number = self._index, self._by_number
            split = index.split(key_array(left))
            found = np.where(split.row >= 0, split.row, split.failure)
            known = np.flatnonzero(found >= 0)
            reader = _Reader(directory=self._directory, index=index, sources=by_number)
            bad, gone = reader.fetch([left[i] for i in known.tolist()], found[known], out)
            if bad:
                self._strike(index, by_number, bad)
            if gone:
                time.sleep(_ROUND_WAIT_S)
                self.refresh()
            if not bad and not gone:
                return {key: out[key] for key in keys if key in out}
            left = [key for key in left if key not in out]
        raise StoreError(
            f"the answers in {self._directory} keep changing while they are read",
            hint="is another program deleting files there?",
        )

    def engines(self) -> dict[str, EngineInfo]:
        """Every engine that rows refer to, by id."""
        return {engine.id: engine for source in list(self._sources.values()) for engine in source.engines}

    @property
    def damage(self) -> list[Damage]:
        """What could not be understood, by file and offset; rows that an earlier reader struck have 0 bytes."""
        found = [
            Damage(file=source.name, offset=offset, bytes=size)
            for source in list(self._sources.values())
            for offset, size in source.damage
        ]
        found += self._read_damage
        known = {(d.file, d.offset) for d in found}
        struck_before = {entry for entries in list(self._struck.values()) for entry in entries} - known
        found += [Damage(file=f, offset=n, bytes=0) for f, n in struck_before if f in self._sources]
        return sorted(found, key=lambda d: (d.file, d.offset))

    @property
    def duplicates(self) -> int:
        """Responses to physical keys that had one already; they are kept and never used."""
        return self._index.duplicates

    @property
    def counts(self) -> Counts:
        """How many rows of each kind there are."""
        index = self._index
        return Counts(
            responses=index.responses,
            answered=index.answered,
            aliases=int((index.rows.kind == KIND_ALIAS).sum()),
            failures=int((index.rows.kind >= KIND_RETRYABLE).sum()),
            duplicates=index.duplicates,
        )

    # --- bringing it up to date ---

    def refresh(self) -> None:
        """Take in new files and what open segments have gained. Raises StoreError if the store cannot be read."""
        gain = _Gain()
        with self._moving, store_errors("read answers", self._directory):
            seen = listing(self._directory)
            for _ in range(_ROUNDS):
                settled = self._load(seen, gain)
                if not settled:
                    time.sleep(_ROUND_WAIT_S)
                again = listing(self._directory)
                # Compaction may have moved rows from a file not yet listed to one no longer listed.
                if settled and again.names == seen.names:
                    break
                seen = again
            self._take_in(seen, gain)

    def _load(self, seen: Listing, gain: _Gain) -> bool:
        """Read what `seen` lists; whether every file was there."""
        settled = True
        for name in sorted(seen.struck - self._struck.keys()):
            with contextlib.suppress(FileNotFoundError):
                self._struck[name] = struck.load(self._directory / name)
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
            gain.add(source, block)
        replaced = self._replaced()
        for stem in sorted(seen.segments):
            source = self._sources.get(stem)
            if stem in replaced or writer_of(stem) == self._without or (source is not None and source.finished):
                continue
            try:
                self._scan(stem, gain)
            except FileNotFoundError:
                settled = False
        return settled

    def _scan(self, stem: str, gain: _Gain) -> None:
        """Read on in a segment. FileNotFoundError if it is gone."""
        source = self._sources.get(stem)
        found, finished = scan_segment(self._directory, stem, source.end if source else 0, self._alive)
        source = source or self._add_source(stem, is_part=False)
        source.end, source.finished = found.end, finished
        source.engines += found.engines
        source.damage += found.damage
        gain.add(source, Block.joined(found.blocks))

    def _take_in(self, seen: Listing, gain: _Gain) -> None:
        """Move to an index with the new rows and without those of files that are replaced or gone."""
        index = self._index
        if gain.blocks:
            block, source = Block.joined(gain.blocks), np.concatenate(gain.sources)
            index = index.added(block, source, ~self._struck_rows(block, source))
        gone = self._sources.keys() - ((seen.parts | seen.segments.keys()) - self._replaced())
        if gone:
            numbers = [self._sources.pop(name).number for name in gone]
            index = index.kept(~np.isin(index.source, numbers))
        self._index = index

    def _struck_rows(self, block: Block, source: NDArray[np.int32]) -> Mask:
        """Which of these rows are known to be damaged."""
        out = np.zeros(len(block), np.bool_)
        for name, number in {entry for entries in self._struck.values() for entry in entries}:
            if name in self._sources:
                out |= (source == self._sources[name].number) & (block.where == number)
        return out

    def _replaced(self) -> set[str]:
        return {name for source in self._sources.values() for name in source.replaces}

    def _add_source(self, name: str, *, is_part: bool) -> _Source:
        source = _Source(name=name, is_part=is_part, number=len(self._by_number))
        self._sources[name] = self._by_number[source.number] = source
        return source

    def _strike(self, index: Index, by_number: dict[int, _Source], numbers: list[int]) -> None:
        """Never use these rows again, and tell later readers where the store can be written."""
        found = [
            Damage(
                file=by_number[int(index.source[n])].name,
                offset=int(index.rows.where[n]),
                bytes=int(index.rows.size[n]),
            )
            for n in sorted(set(numbers))
        ]
        in_parts = {(d.file, d.offset) for d in found if d.file.endswith(".parquet")}
        with self._moving:
            self._read_damage += found
            if in_parts:
                # A reader may well be on a read-only mount; the damage is reported all the same.
                with contextlib.suppress(OSError):
                    self._struck[struck.save(self._directory, in_parts)] = frozenset(in_parts)
            bad = {(d.file, d.offset) for d in found}
            now = self._index
            names = {source.number: source.name for source in self._sources.values()}
            same = [
                n
                for n in np.flatnonzero(np.isin(now.rows.where, [d.offset for d in found])).tolist()
                if (names.get(int(now.source[n])), int(now.rows.where[n])) in bad
            ]
            self._index = now.without(np.array(same, np.int64))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Reader:
    """Fetches the answers that an index points at."""

    directory: Path
    index: Index
    sources: dict[int, _Source]

    def fetch(self, keys: list[str], numbers: Numbers, out: dict[str, Answer]) -> tuple[list[int], bool]:
        """Put the answers that stand in these rows into `out`; say which are damaged, and whether a file is gone."""
        bad: list[int] = []
        gone = False
        owners = self.index.source[numbers]
        for owner in np.unique(owners).tolist():
            source = self.sources[owner]
            mine = np.flatnonzero(owners == owner)
            mine = mine[np.argsort(self.index.rows.where[numbers[mine]], kind="stable")]
            bodies = self._bodies(source, numbers[mine])
            try:
                for i, body in zip([int(i) for i in mine], bodies, strict=True):
                    answer = self._answer(int(numbers[i]), body, keys[i])
                    if answer is None:
                        bad.append(int(numbers[i]))
                    else:
                        out[keys[i]] = answer
            except OSError as error:
                if error.errno not in GONE:
                    raise as_store_error(error, "read answers", self.directory / source.name) from error
                gone = True
        return bad, gone

    def _answer(self, number: int, body: bytes | None, key: str) -> Answer | None:
        """The answer in a row's bytes; None if they are not the row that was stored."""
        index = self.index
        if body is None or zlib.crc32(body) != index.rows.crc[number]:
            return None
        try:
            row = rows.parse(body)
            same = row["key"] == key or _same(index.rows.key, number, row["key"])  # an alias has another key
            if row["type"] != rows.FAILURE:
                same &= _same(index.rows.physical, number, row["physical_key"])
            return rows.answer_of(row, key=key) if same else None
        except (KeyError, TypeError, ValueError):
            return None

    def _bodies(self, source: _Source, numbers: Numbers) -> Iterator[bytes | None]:
        """The bytes of these rows of one file, which are in its order. Raises OSError."""
        where = self.index.rows.where[numbers]
        if source.is_part:
            unique, back = np.unique(where, return_inverse=True)
            bodies = part.read_rows(self.directory / source.name, unique)
            number, body = -1, None
            for wanted in back.tolist():
                while number < wanted:
                    number, body = number + 1, next(bodies)[1]
                yield body
            return
        fd, _ = open_segment(self.directory, source.name)
        try:
            yield from segment_bodies(fd, where.tolist(), self.index.rows.size[numbers].tolist())
        finally:
            os.close(fd)


def _same(column: KeyArray, number: int, key: str) -> bool:
    return (int(column[number, 0]), int(column[number, 1])) == folded(key)
