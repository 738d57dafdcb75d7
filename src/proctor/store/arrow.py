"""pyarrow, typed as Any: it ships no type information."""

from __future__ import annotations

from collections.abc import Callable
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
