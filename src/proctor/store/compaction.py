"""Turning segments that nobody writes any more into parts: few files, and quick to open.

Whatever moment it is stopped at, every row is in a segment or in a part, or in both, which harms nothing.
"""

from __future__ import annotations

import contextlib
import os
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from proctor.errors import StoreError
from proctor.records import EngineInfo
from proctor.store import part, struck
from proctor.store.arrow import pa, pq
from proctor.store.durable import publish, remove, store_errors
from proctor.store.keys import to_bytes
from proctor.store.owner import Alive, alive
from proctor.store.scan import Block
from proctor.store.segments import Listing, listing, open_segment, scan_segment, segment_bodies

MERGE_PARTS: Final = 8
"""So many small parts are merged into one."""
MERGE_ROWS: Final = 2_000_000
"""A part with so many rows is left alone: merging it again costs more than opening it."""
_TEMPORARY_S: Final = 86400.0
"""Temporary files of a day ago were left by a process that died."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Compacted:
    """What a compaction did."""

    part: str | None
    """The new part's file name; None if there was nothing to do."""
    rows: int
    replaced: tuple[str, ...]
    """Segments and parts whose rows are in it now, and which are deleted."""
    damage: int
    """Bytes of the segments that were no rows and are gone with them."""


@dataclass(slots=True, eq=False)
class _Piece:
    """One segment or part that goes into the new part."""

    name: str
    is_part: bool
    block: Block
    engines: list[EngineInfo]
    damage: int = 0
    replaces: tuple[str, ...] = ()


@dataclass(slots=True, eq=False)
class _Plan:
    """What goes into one part."""

    pieces: list[_Piece] = field(default_factory=list[_Piece])

    @property
    def replaces(self) -> list[str]:
        return sorted({n for p in self.pieces for n in (p.name, *p.replaces)})

    @property
    def engines(self) -> list[EngineInfo]:
        return list({e.id: e for p in self.pieces for e in p.engines}.values())


def compact(directory: Path, *, alive: Alive = alive) -> Compacted:
    """Move the rows of sealed and abandoned segments of one weights directory into a part.

    Segments of living writers, and of writers that cannot be judged from here, are left alone. Raises
    StoreError; the rows are where they were then.
    """
    with store_errors("compact answers", directory):
        seen = listing(directory)
        _remove_replaced(directory, seen)
        _remove_temporary(directory)
        plan = _plan(directory, listing(directory), alive)
        if not plan.pieces:
            return Compacted(part=None, rows=0, replaced=(), damage=0)
        path = directory / f"part-{uuid.uuid4().hex}.parquet"
        crcs: list[NDArray[np.uint32]] = []

        def write(temp: Path) -> None:
            crcs.append(_write(directory, plan, temp))
            _check(temp, crcs[0])

        publish(path, write)
        _check(path, crcs[0])
        _remove_all(directory, plan.replaces)
    return Compacted(
        part=path.name,
        rows=len(crcs[0]),
        replaced=tuple(plan.replaces),
        damage=sum(piece.damage for piece in plan.pieces),
    )


def _plan(directory: Path, seen: Listing, alive: Alive) -> _Plan:
    """What to put into a new part. Files that another compaction takes away meanwhile are left out."""
    plan = _Plan()
    for stem in sorted(seen.segments):
        with contextlib.suppress(FileNotFoundError):
            found, finished = scan_segment(directory, stem, 0, alive)
            if finished:
                damage = sum(size for _, size in found.damage)
                plan.pieces.append(_Piece(stem, False, Block.joined(found.blocks), found.engines, damage))
    small: list[_Piece] = []
    for name in sorted(seen.parts):
        with contextlib.suppress(FileNotFoundError):
            if part.read_head(directory / name).rows < MERGE_ROWS:
                head, block = part.read_index(directory / name)
                left = tuple(n for n in head.replaces if n in seen.names)
                small.append(_Piece(name, True, block, list(head.engines), replaces=left))
    if len(small) >= MERGE_PARTS:
        plan.pieces[:0] = small
    _drop_struck(plan, directory, seen)
    return plan


def _drop_struck(plan: _Plan, directory: Path, seen: Listing) -> None:
    """Leave out the rows of parts that proved damaged."""
    bad: dict[str, set[int]] = {}
    for name in seen.struck:
        with contextlib.suppress(FileNotFoundError):
            for owner, number in struck.load(directory / name):
                bad.setdefault(owner, set()).add(number)
    for piece in plan.pieces:
        if piece.is_part and piece.name in bad:
            piece.block = piece.block.take(~np.isin(piece.block.where, list(bad[piece.name])))


def _write(directory: Path, plan: _Plan, path: Path) -> NDArray[np.uint32]:
    """Write the part; the checksums of its rows in their order. Raises OSError, StoreError."""
    schema = part.schema(plan.replaces, plan.engines)
    crcs: list[NDArray[np.uint32]] = []
    with pq.ParquetWriter(path, schema, compression="zstd", write_page_checksum=True) as writer:
        for block, bodies in _groups(directory, _without_copies(plan)):
            writer.write_table(_table(block, bodies, schema), row_group_size=part.ROW_GROUP)
            crcs.append(block.crc)
    return np.concatenate(crcs) if crcs else np.empty(0, np.uint32)


def _without_copies(plan: _Plan) -> Iterator[tuple[_Piece, Block]]:
    """Each piece's rows without those that an earlier piece has, which an interrupted compaction leaves."""
    at = np.concatenate([piece.block.at for piece in plan.pieces])
    crc = np.concatenate([piece.block.crc for piece in plan.pieces])
    first = np.concatenate([piece.block.key[:, 0] for piece in plan.pieces])
    # Stable: among copies the one of the earliest piece comes first.
    order = np.lexsort((first, crc, at))
    new = np.ones(len(order), np.bool_)
    same = (at[order][1:] == at[order][:-1]) & (crc[order][1:] == crc[order][:-1])
    new[order[1:]] = ~(same & (first[order][1:] == first[order][:-1]))
    start = 0
    for piece in plan.pieces:
        end = start + len(piece.block)
        yield piece, piece.block.take(new[start:end])
        start = end


def _groups(directory: Path, pieces: Iterator[tuple[_Piece, Block]]) -> Iterator[tuple[Block, list[bytes]]]:
    """Rows in groups of exactly `ROW_GROUP`, the last one shorter, with their bytes."""
    blocks: list[Block] = []
    bodies: list[bytes] = []
    for piece, block in pieces:
        for i, body in enumerate(_bodies(directory, piece, block)):
            if body is None:
                raise StoreError(f"{directory / piece.name} changed while it was compacted", hint="run it again")
            bodies.append(body)
            if len(bodies) == part.ROW_GROUP:
                start = i + 1 - (part.ROW_GROUP - sum(map(len, blocks)))
                yield Block.joined([*blocks, block.take(slice(start, i + 1))]), bodies
                blocks, bodies = [], []
        rest = len(bodies) - sum(map(len, blocks))
        if rest:
            blocks.append(block.take(slice(len(block) - rest, None)))
    if bodies:
        yield Block.joined(blocks), bodies


def _bodies(directory: Path, piece: _Piece, block: Block) -> Iterator[bytes | None]:
    if piece.is_part:
        for _, body in part.read_rows(directory / piece.name, block.where):
            yield body
        return
    fd, _ = open_segment(directory, piece.name)
    try:
        yield from segment_bodies(fd, block.where.tolist(), block.size.tolist())
    finally:
        os.close(fd)


def _table(block: Block, bodies: list[bytes], schema: Any) -> Any:
    def fixed(data: bytes) -> Any:
        return pa.FixedSizeBinaryArray.from_buffers(pa.binary(16), len(block), [None, pa.py_buffer(data)])

    return pa.table(
        {
            "key": fixed(to_bytes(block.key)),
            "physical": fixed(to_bytes(block.physical)),
            "resolution": block.resolution,
            "at": block.at,
            "kind": block.kind,
            "crc": block.crc,
            "size": block.size,
            "row": pa.array(bodies, pa.large_binary()),
        },
        schema=schema,
    )


def _check(path: Path, expected: NDArray[np.uint32]) -> None:
    """Read back what was written, from the disk as far as the system lets us. Raises StoreError."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)
    if not part.verify(path, expected):
        remove(path)
        raise StoreError(
            f"a compacted part of {path.parent} did not read back as it was written; nothing was deleted",
            hint="check the disk or the file server before you go on",
        )


def _remove_replaced(directory: Path, seen: Listing) -> None:
    """Finish what an interrupted compaction has left: files whose rows are in a part."""
    for name in seen.parts:
        with contextlib.suppress(FileNotFoundError):
            head = part.read_head(directory / name)
            left = [n for n in head.replaces if n in seen.names]
            if left:
                _, block = part.read_index(directory / name)
                if not part.verify(directory / name, block.crc):
                    raise StoreError(
                        f"part {directory / name} is damaged; the segments that it replaces are still there",
                        hint="delete the part: its rows are in those segments",
                    )
                _remove_all(directory, left)


def _remove_all(directory: Path, names: list[str]) -> None:
    for name in names:
        if name.endswith(".parquet"):
            remove(directory / name)
        else:
            remove(directory / f"{name}.jsonl")
            remove(directory / f"{name}.jsonl.open")


def _remove_temporary(directory: Path) -> None:
    for path in directory.glob(".*.tmp"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > _TEMPORARY_S:
                remove(path)
