"""SHA-256 of files, each read once: the digest is kept in the user's cache for as long as the file is the same one."""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

from proctor.errors import ModelError
from proctor.interpreters import cache_directory

SETTLED_NS: Final = 2_000_000_000
"""A digest is kept only for a file that was left alone this long before it was read: a file system whose clock
ticks once a second would otherwise hide a later change from the key."""
_SHA256: Final = re.compile(r"[0-9a-f]{64}")
_THREADS: Final = 8


def file_digests(paths: Iterable[Path]) -> dict[Path, str]:
    """The SHA-256 of each file, in hexadecimal; several are read at a time. Raises ModelError."""
    todo = list(dict.fromkeys(paths))
    with ThreadPoolExecutor(max_workers=min(_THREADS, os.cpu_count() or 1)) as pool:
        return dict(zip(todo, pool.map(file_digest, todo), strict=True))


def file_digest(path: Path) -> str:
    """The SHA-256 of a file: by its name in a hub cache, from our cache, or by reading all of it.

    Raises ModelError if it cannot be read, or changes while it is read.
    """
    try:
        named = _hub_blob(path)
        if named is not None:
            return named
        before = path.stat()
        kept = _kept(before)
        if kept is not None:
            return kept
        started = time.time_ns()
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
            after = os.fstat(stream.fileno())
    except OSError as error:
        raise ModelError(f"cannot read {str(path)!r}: {error.strerror or error}") from error
    if _identity(before) != _identity(after):
        raise ModelError(f"{str(path)!r} changed while it was read", hint="wait until it is complete, then repeat")
    if started - max(after.st_mtime_ns, after.st_ctime_ns) > SETTLED_NS:
        _keep(after, digest)
    return digest


def _hub_blob(path: Path) -> str | None:
    """The hash that a hub cache's blob is named by: SHA-256 for large files, git's SHA-1 (no use here) for small."""
    if not path.is_symlink():
        return None
    blob = path.resolve(strict=True)
    in_cache = blob.parent.name == "blobs" and blob.parent.parent.name.startswith("models--")
    return blob.name if in_cache and _SHA256.fullmatch(blob.name) else None


def _identity(status: os.stat_result) -> tuple[int, int, int, int, int]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _entry(status: os.stat_result) -> Path:
    key = hashlib.sha256(repr(_identity(status)).encode("ascii")).hexdigest()
    return cache_directory() / "digests" / key[:2] / key


def _kept(status: os.stat_result) -> str | None:
    try:
        text = _entry(status).read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return None
    return text if _SHA256.fullmatch(text) else None


def _keep(status: os.stat_result, digest: str) -> None:
    entry = _entry(status)
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=entry.parent, prefix=".")
        with os.fdopen(handle, "w", encoding="ascii") as stream:
            stream.write(digest)
        os.replace(temporary, entry)
    except OSError:
        return  # The cache only saves time: without it (full, read-only) the file is read again.
