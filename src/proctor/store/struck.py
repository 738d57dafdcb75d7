"""Rows of parts that proved damaged when they were read: noted, so that every later reader owes them again."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable
from pathlib import Path

from proctor.store.durable import publish_bytes

Struck = frozenset[tuple[str, int]]
"""(part, number of the row)."""


def load(path: Path) -> Struck:
    """The rows that a file strikes; none if it cannot be understood. Raises OSError."""
    try:
        return frozenset((str(name), int(number)) for name, number in json.loads(path.read_bytes()))
    except (ValueError, TypeError):
        return frozenset()


def save(directory: Path, entries: Iterable[tuple[str, int]]) -> str:
    """Strike rows in a new file; its name. Raises OSError."""
    path = directory / f"struck-{uuid.uuid4().hex}.json"
    publish_bytes(path, json.dumps(sorted(entries)).encode())
    return path.name
