"""Files that survive: written under a temporary name, fsynced, renamed; errors in the store's words."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import uuid
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Final

from proctor.errors import StoreError, StoreFull

NO_SPACE: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
NOT_WRITABLE: Final = frozenset({errno.EROFS, errno.EACCES, errno.EPERM})
GONE: Final = frozenset({errno.ENOENT, errno.ESTALE})
"""What a file that another process deleted gives; on a shared file system also ESTALE."""

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


@contextlib.contextmanager
def store_errors(what: str, path: Path) -> Generator[None]:
    """Raise OSError as StoreFull (no space, quota) or StoreError; `what` is a phrase like 'write answers'."""
    try:
        yield
    except OSError as error:
        raise as_store_error(error, what, path) from error


def as_store_error(error: OSError, what: str, path: Path) -> StoreError:
    """The StoreError that says what could not be done, where and why."""
    reason = error.strerror or str(error)
    if error.errno in NO_SPACE:
        return StoreFull(
            f"cannot {what}: no space left for {path} ({reason})",
            hint="free some space (see `df` and your quota) and repeat the command; nothing is lost",
        )
    if error.errno in NOT_WRITABLE:
        return StoreError(
            f"cannot {what}: {path} is read-only or not permitted ({reason})",
            hint="choose a `store:` that you may write, or mount it writable",
        )
    return StoreError(f"cannot {what}: {path} ({reason})", hint="check the path and the file system")


def check_name(what: str, name: str) -> str:
    """Return `name` if it can be a file name in the store (a fingerprint or an id); StoreError otherwise."""
    if _NAME.fullmatch(name) is None:
        raise StoreError(
            f"{name!r} cannot be a {what} in the store: letters, digits, '.', '_' and '-' only, 128 at most"
        )
    return name


def sync_directory(path: Path) -> None:
    """Make the names in `path` durable. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    except OSError as error:
        # Some shared file systems refuse to fsync a directory; their metadata is synchronous then.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(fd)


def make_directory(path: Path) -> None:
    """Create `path` and its parents, each made durable in its parent. Raises OSError."""
    missing: list[Path] = []
    while not path.is_dir():
        missing.append(path)
        path = path.parent
    for child in reversed(missing):
        child.mkdir(exist_ok=True)
        sync_directory(child.parent)


def temporary(path: Path) -> Path:
    """A name beside `path` that no reader looks at and no other process uses."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")


def publish(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary file, make it durable, rename it to `path`. Raises OSError.

    Whoever sees `path` sees all of it, also after a crash of the machine.
    """
    temp = temporary(path)
    try:
        write(temp)
        fd = os.open(temp, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
        os.rename(temp, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temp.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def publish_bytes(path: Path, data: bytes) -> None:
    """`publish` of one byte string. Raises OSError."""

    def write(temp: Path) -> None:
        temp.write_bytes(data)

    publish(path, write)


def remove(path: Path) -> None:
    """Delete `path`; that it is gone already is fine. Raises OSError for anything else."""
    try:
        path.unlink()
    except OSError as error:
        if error.errno not in GONE:
            raise
