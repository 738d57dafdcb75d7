"""pyarrow, typed as Any: it ships no type information."""

from __future__ import annotations

from typing import Any, Final

import pyarrow as _pa
import pyarrow.parquet as _pq

pa: Final[Any] = _pa
pq: Final[Any] = _pq
