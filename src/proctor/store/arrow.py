"""pyarrow, typed as Any: it ships no type information."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, Final, TypeVar

import pyarrow as _pa
import pyarrow.parquet as _pq

from proctor.errors import StoreError

pa: Final[Any] = _pa
pq: Final[Any] = _pq

_T = TypeVar("_T")


def checked(path: Path, hint: str, work: Callable[[], _T]) -> _T:
    """Read a parquet file; StoreError with `hint` if it is damaged. Raises OSError as `work` does."""
    try:
        return work()
    except (pa.ArrowException, KeyError, TypeError, ValueError) as error:
        raise StoreError(f"{path} is damaged: {error}", hint=hint) from error
    except OSError as error:
        # Arrow reports a damaged page as an OSError without a number.
        if error.errno is None:
            raise StoreError(f"{path} is damaged: {error}", hint=hint) from error
        raise


@contextlib.contextmanager
def opened(path: Path, hint: str) -> Generator[Any]:
    """The parquet file at `path`, whose pages' checksums are verified when they are read. Raises as `checked`."""
    # Opened here, so that it is closed for certain.
    with checked(path, hint, lambda: _native(path)) as source:
        yield checked(path, hint, lambda: pq.ParquetFile(source, page_checksum_verification=True))


def read_table(path: Path, hint: str, columns: list[str] | None = None) -> Any:
    """The whole table, or these columns of it. Raises as `checked`."""
    with opened(path, hint) as file:
        return checked(path, hint, lambda: file.read(columns=columns, use_threads=False))


def _native(path: Path) -> Any:
    """A file of Arrow's own, not Python's.

    Arrow's threads outlive what they read: one that lets go of a Python object while the interpreter ends aborts the
    process (https://github.com/apache/arrow/issues/34314).
    """
    try:
        return pa.OSFile(str(path))
    except OSError as error:
        if error.errno is None:
            raise
        # Arrow's own text says path and number once more.
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from error
