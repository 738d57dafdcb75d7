"""Compacted rows: parquet with the rows' own bytes, their checksums, and the columns an index needs."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from proctor.records import EngineInfo
from proctor.store import rows
from proctor.store.arrow import checked, opened, pa
from proctor.store.keys import from_bytes
from proctor.store.scan import Block

ROW_GROUP: Final = 8192
"""Rows read to get at one: about 5 MB, and a few hundred groups for a million rows."""

_META: Final = b"proctor"
_HINT: Final = "restore it from a backup, or move it out of the store: its answers are then asked again"
_INDEX: Final = ["key", "physical", "resolution", "at", "kind", "crc", "size"]
_SCHEMA: Final[Any] = pa.schema(
    [
        ("key", pa.binary(16)),
        ("physical", pa.binary(16)),
        ("resolution", pa.uint64()),
        ("at", pa.int64()),
        ("kind", pa.uint8()),
        ("crc", pa.uint32()),
        ("size", pa.int32()),
        ("row", pa.large_binary()),
    ]
)


@dataclass(frozen=True, slots=True, kw_only=True)
class PartHead:
    """What a part stands for."""

    replaces: tuple[str, ...]
    """Stems of segments and names of parts whose every good row is in this part."""
    engines: tuple[EngineInfo, ...]
    rows: int


def schema(replaces: Sequence[str], engines: Iterable[EngineInfo]) -> Any:
    """The arrow schema of a part, with its head."""
    meta = {"replaces": list(replaces), "engines": [rows.engine_row(e) for e in engines]}
    return _SCHEMA.with_metadata({_META: json.dumps(meta).encode()})


def read_head(path: Path) -> PartHead:
    """The head of the part at `path`. Raises OSError if it cannot be opened, StoreError if it is damaged."""
    with opened(path, _HINT) as file:
        return checked(path, _HINT, lambda: _head(file))


def read_index(path: Path) -> tuple[PartHead, Block]:
    """Head and index columns. Raises as `read_head`."""
    with opened(path, _HINT) as file:
        head = checked(path, _HINT, lambda: _head(file))
        return head, checked(path, _HINT, lambda: _index(file, head.rows))


def _index(file: Any, count: int) -> Block:
    table = file.read(columns=_INDEX, use_threads=False)
    if table.num_rows != count:
        raise ValueError(f"it holds {table.num_rows} rows, not {count}")
    column = {name: table.column(name).combine_chunks() for name in _INDEX}
    return Block(
        key=_fixed(column["key"]),
        physical=_fixed(column["physical"]),
        resolution=column["resolution"].to_numpy(),
        at=column["at"].to_numpy(),
        kind=column["kind"].to_numpy(),
        crc=column["crc"].to_numpy(),
        where=np.arange(count, dtype=np.int64),
        size=column["size"].to_numpy(),
    )


def read_rows(path: Path, numbers: NDArray[np.int64]) -> Iterator[tuple[int, bytes | None]]:
    """The bytes of the rows with these ascending numbers; None for rows in a damaged stretch. Raises OSError."""
    groups = numbers // ROW_GROUP
    with opened(path, _HINT) as file:
        for group in np.unique(groups).tolist():
            wanted = numbers[groups == group]
            try:
                column = file.read_row_group(group, columns=["row"], use_threads=False).column("row")
                taken = column.take(pa.array(wanted - group * ROW_GROUP)).to_pylist()
            except (pa.ArrowException, OSError) as error:
                if isinstance(error, OSError) and error.errno is not None:
                    raise
                yield from ((number, None) for number in wanted.tolist())
                continue
            yield from zip(wanted.tolist(), taken, strict=True)


def verify(path: Path, expected: NDArray[np.uint32]) -> bool:
    """Whether the part holds exactly the rows with these checksums, in order. Raises OSError."""
    number = 0
    with opened(path, _HINT) as file:
        for group in range(file.num_row_groups):
            bodies = file.read_row_group(group, columns=["row"], use_threads=False).column("row").to_pylist()
            for body in bodies:
                if number >= len(expected) or zlib.crc32(body) != expected[number]:
                    return False
                number += 1
    return number == len(expected)


def _head(file: Any) -> PartHead:
    # Parquet protects its pages with checksums, but not what says how to read them.
    if not file.schema_arrow.equals(_SCHEMA):
        raise ValueError("its columns are not those of a part")
    stored: dict[bytes, bytes] = file.schema_arrow.metadata or {}
    meta = json.loads(stored.get(_META, b"{}"))
    return PartHead(
        replaces=tuple(meta.get("replaces", ())),
        engines=tuple(rows.engine_of(e) for e in meta.get("engines", ())),
        rows=file.metadata.num_rows,
    )


def _fixed(array: Any) -> NDArray[np.uint64]:
    data = array.buffers()[1]
    width = array.type.byte_width
    raw = memoryview(data)[array.offset * width : (array.offset + len(array)) * width]
    return from_bytes(bytes(raw), width)
