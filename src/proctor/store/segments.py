"""What a weights directory holds: segments, open and sealed, and parts."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from proctor.store.durable import GONE
from proctor.store.owner import Alive
from proctor.store.scan import Scan, scan

OPEN: Final = ".jsonl.open"
SEALED: Final = ".jsonl"
PART: Final = ".parquet"

HEADER_BYTES: Final = 8 << 10
"""Enough for a segment's first row, which says who writes it."""
_READ_BYTES: Final = 8 << 20
_READ_GAP: Final = 64 << 10
"""Rows nearer than this are read in one go."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """The names in a weights directory at one moment; a shared file system may show an old moment."""

    segments: dict[str, bool]
    """Stem to whether it is sealed."""
    parts: frozenset[str]
    """File names."""
    struck: frozenset[str]
    """Files that name rows of parts which proved damaged."""

    @property
    def names(self) -> frozenset[str]:
        """Parts and the stems of segments: what rows are in."""
        return self.parts | self.segments.keys()


def writer_of(stem: str) -> str:
    """The name of the writer of a segment `<writer>-<n>`."""
    return stem.rpartition("-")[0]


def listing(directory: Path) -> Listing:
    """List `directory`; one that does not exist is empty. Raises OSError."""
    segments: dict[str, bool] = {}
    parts: set[str] = set()
    struck: set[str] = set()
    try:
        names = os.listdir(directory)
    except FileNotFoundError:
        names = []
    for name in names:
        if name.startswith("."):
            continue
        if name.endswith(SEALED):
            segments[name.removesuffix(SEALED)] = True
        elif name.endswith(OPEN):
            segments.setdefault(name.removesuffix(OPEN), False)
        elif name.startswith("part-") and name.endswith(PART):
            parts.add(name)
        elif name.startswith("struck-") and name.endswith(".json"):
            struck.add(name)
    return Listing(segments=segments, parts=frozenset(parts), struck=frozenset(struck))


def open_segment(directory: Path, stem: str) -> tuple[int, bool]:
    """A descriptor of the segment and whether it is sealed. FileNotFoundError if it is gone under both names."""
    # A writer may seal it between our listing and now, so both names are tried, the later one twice.
    for suffix in (SEALED, OPEN):
        try:
            return os.open(directory / (stem + suffix), os.O_RDONLY | os.O_CLOEXEC), suffix == SEALED
        except OSError as error:
            if error.errno not in GONE:
                raise
    try:
        return os.open(directory / (stem + SEALED), os.O_RDONLY | os.O_CLOEXEC), True
    except OSError as error:
        if error.errno not in GONE:
            raise
        raise FileNotFoundError(error.errno, "segment is gone", str(directory / stem)) from error


def scan_segment(directory: Path, stem: str, start: int, alive: Alive) -> tuple[Scan, bool]:
    """What stands in a segment from `start` on, and whether it will never grow again.

    It will not if it is sealed or its writer proven dead; then a torn last line is damage, otherwise it may
    be a line on its way. FileNotFoundError if the segment is gone.
    """
    fd, sealed = open_segment(directory, stem)
    try:
        if sealed:
            return scan(fd, start, complete=True), True
        owner = scan(fd, 0, complete=False, limit=HEADER_BYTES).owner
        # Asked before reading: what a dead writer has left is complete, what a living one has may grow meanwhile.
        dead = owner is not None and alive(owner) is False
        return scan(fd, start, complete=dead), dead
    except OSError as error:
        if error.errno in GONE:
            raise FileNotFoundError(error.errno, "segment is gone", str(directory / stem)) from error
        raise
    finally:
        os.close(fd)


def segment_bodies(fd: int, where: list[int], size: list[int]) -> Iterator[bytes]:
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
