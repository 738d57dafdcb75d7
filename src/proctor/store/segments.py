"""What a weights directory holds: segments, open and sealed, and parts."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from proctor.store.durable import GONE

OPEN: Final = ".jsonl.open"
SEALED: Final = ".jsonl"
PART: Final = ".parquet"


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """The names in a weights directory at one moment; a shared file system may show an old moment."""

    segments: dict[str, bool]
    """Stem to whether it is sealed."""
    parts: frozenset[str]
    """File names."""
    struck: frozenset[str]
    """Files that name rows of parts which proved damaged."""


def listing(directory: Path) -> Listing:
    """List `directory`; one that does not exist is empty. Raises OSError."""
    segments: dict[str, bool] = {}
    parts: set[str] = set()
    struck: set[str] = set()
    try:
        names = os.listdir(directory)
    except OSError as error:
        if error.errno not in GONE:
            raise
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
