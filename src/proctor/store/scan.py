"""Reading segments: every good row, whatever lies between them."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final, Self

import numpy as np
from numpy.typing import NDArray

from proctor.records import EngineInfo
from proctor.store import rows
from proctor.store.keys import KeyArray, from_bytes, from_hex
from proctor.store.owner import Owner

CHUNK: Final = 16 << 20
"""Bytes read at a time: bounds memory, large enough for the vectorised path."""

_PROBE: Final = 64 << 10

KIND_RESPONSE: Final = 0
KIND_ALIAS: Final = 1
KIND_RETRYABLE: Final = 2
KIND_PERMANENT: Final = 3

_COLUMNS: Final = (
    (b'{"crc":"', 0),
    (b'","row":{"at":', 16),
    (b',"key":"', 46),
    (b'","resolution":"', 118),
    (b'","physical_key":"', 150),
    (b'","type":"', 232),
)
"""Constant text of an answer's line and where it stands; between them the fields of fixed width."""
_WIDTH: Final = 250
_AT: Final = slice(30, 46)
_KEY: Final = slice(54, 118)
_RESOLUTION: Final = slice(134, 150)
_PHYSICAL: Final = slice(168, 232)
_TYPE: Final = slice(242, 250)
_POWERS: Final = 10 ** np.arange(15, -1, -1, dtype=np.int64)


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """Answer rows of one file as columns of equal length; the rows' own bytes stay on disk."""

    key: KeyArray
    physical: KeyArray
    resolution: NDArray[np.uint64]
    at: NDArray[np.int64]
    """Time stamps, microseconds."""
    kind: NDArray[np.uint8]
    crc: NDArray[np.uint32]
    where: NDArray[np.int64]
    """Byte offset of the row itself in a segment; number of the row in a part."""
    size: NDArray[np.int32]
    """Bytes of the row itself."""

    def __len__(self) -> int:
        return len(self.at)

    @classmethod
    def empty(cls) -> Self:
        """No rows."""
        return cls(
            key=np.empty((0, 2), np.uint64),
            physical=np.empty((0, 2), np.uint64),
            resolution=np.empty(0, np.uint64),
            at=np.empty(0, np.int64),
            kind=np.empty(0, np.uint8),
            crc=np.empty(0, np.uint32),
            where=np.empty(0, np.int64),
            size=np.empty(0, np.int32),
        )

    @classmethod
    def joined(cls, blocks: list[Block]) -> Self:
        """The rows of all, in order."""
        if not blocks:
            return cls.empty()
        return cls(**{name: np.concatenate([getattr(b, name) for b in blocks]) for name in cls.__slots__})

    def take(self, chosen: NDArray[Any] | slice) -> Block:
        """The rows that a mask, an index array or a slice chooses."""
        return Block(**{name: getattr(self, name)[chosen] for name in Block.__slots__})


@dataclass(slots=True, kw_only=True)
class Scan:
    """What reading a segment from some offset on has found."""

    blocks: list[Block] = field(default_factory=list[Block])
    engines: list[EngineInfo] = field(default_factory=list[EngineInfo])
    owner: Owner | None = None
    damage: list[tuple[int, int]] = field(default_factory=list[tuple[int, int]])
    """(offset, bytes), in order, neighbours merged."""
    end: int = 0
    """Where to go on."""

    def damaged(self, start: int, end: int) -> None:
        """Note bytes that are no row."""
        if start >= end:
            return
        if self.damage and sum(self.damage[-1]) == start:
            start = self.damage.pop()[0]
        self.damage.append((start, end - start))


def resolution_number(resolution: str) -> int:
    """A resolution's 16 digits as the integer that blocks hold."""
    return int(rows.check_resolution(resolution), 16)


def scan(fd: int, start: int, *, complete: bool, limit: int | None = None) -> Scan:
    """Read the segment open at `fd` from `start` to its end.

    `complete`: nothing will be appended any more, so a last line without its end is damage (or a good
    row that only lost its newline); otherwise it is left for the next scan. `limit`: read no more than so
    many bytes. Raises OSError.
    """
    out = Scan(end=start)
    pending = b""
    while True:
        at = out.end + len(pending)
        # A size may be stale, so it only saves memory: reading goes on until nothing comes.
        size = min(CHUNK, max(os.fstat(fd).st_size - at, _PROBE))
        if limit is not None:
            size = min(size, start + limit - at)
        data = os.pread(fd, size, at) if size > 0 else b""
        if not data:
            break
        pending = pending + data if pending else data
        cut = pending.rfind(b"\n") + 1
        if cut:
            _lines(out, pending[:cut])
            out.end += cut
            pending = pending[cut:]
    if pending and complete:
        _broken(out, pending, out.end)
        out.end += len(pending)
    return out


def _lines(out: Scan, data: bytes) -> None:
    """Whole lines: take the good ones in bulk, look into the others one by one, keep the order of the file."""
    array = np.frombuffer(data, np.uint8)
    ends = np.flatnonzero(array == 10)
    starts = np.concatenate([np.zeros(1, ends.dtype), ends[:-1] + 1])
    good = _bulk(out, data, array, starts, ends)
    for number in np.flatnonzero(~good):
        begin, end = int(starts[number]), int(ends[number])
        if begin < end:
            _broken(out, data[begin : end + 1], out.end + begin)


def _bulk(
    out: Scan, data: bytes, array: NDArray[np.uint8], starts: NDArray[np.int64], ends: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """Add the response and alias rows whose line is as it was written; say which lines these were."""
    good = ends - starts >= _WIDTH
    if not good.any():
        return good
    chosen = np.flatnonzero(good)
    window = np.lib.stride_tricks.sliding_window_view(array, _WIDTH)
    heads = window[starts[chosen]]
    fits = np.ones(len(chosen), np.bool_)
    for text, at in _COLUMNS:
        fits &= (heads[:, at : at + len(text)] == np.frombuffer(text, np.uint8)).all(axis=1)
    response = (heads[:, _TYPE] == np.frombuffer(b"response", np.uint8)).all(axis=1)
    alias = (heads[:, _TYPE] == np.frombuffer(b'alias"}}', np.uint8)).all(axis=1)
    fits &= response | alias
    digits = heads[:, _AT] - np.uint8(48)
    fits &= (digits < 10).all(axis=1)
    fields: dict[str, NDArray[np.uint8]] = {}
    for name, span in (
        ("crc", slice(8, 16)),
        ("key", _KEY),
        ("resolution", _RESOLUTION),
        ("physical", _PHYSICAL),
    ):
        fields[name], valid = from_hex(heads[:, span])
        fits &= valid
    crc = fields["crc"].view(">u4")[:, 0].astype(np.uint32)
    first = starts[chosen] + rows.HEAD
    last = ends[chosen] - 1
    view = memoryview(data)
    crc32 = zlib.crc32
    actual = np.fromiter(
        (crc32(view[a:b]) for a, b in zip(first.tolist(), last.tolist(), strict=True)), np.uint32, len(chosen)
    )
    fits &= (actual == crc) & (array[last] == ord("}"))
    good[chosen] = fits
    out.blocks.append(
        Block(
            key=from_bytes(fields["key"].tobytes(), 32),
            physical=from_bytes(fields["physical"].tobytes(), 32),
            resolution=fields["resolution"].view(">u8")[:, 0].astype(np.uint64),
            at=digits.astype(np.int64) @ _POWERS,
            kind=np.where(response, KIND_RESPONSE, KIND_ALIAS).astype(np.uint8),
            crc=crc,
            where=first + out.end,
            size=(last - first).astype(np.int32),
        ).take(fits)
    )
    return good


def _broken(out: Scan, data: bytes, offset: int) -> None:
    """A line that is not an intact response or alias: other rows, or good rows among damage.

    Rows never hold a newline, so none spans two lines; but one line may hold several rows whose newlines
    are lost.
    """
    text = data.decode("latin-1")
    done = 0
    at = data.find(rows.MARK)
    while at >= 0:
        end = _row_end(data, text, at)
        if end is not None and _add(out, data[at + rows.HEAD : end], offset + at + rows.HEAD):
            out.damaged(offset + done, offset + at)
            done = end + len(_tail(data, end))
        at = data.find(rows.MARK, max(at + 1, done))
    if data[done:].strip(b"\n"):
        out.damaged(offset + done, offset + len(data))


def _row_end(data: bytes, text: str, at: int) -> int | None:
    """Where the row that starts at the mark `at` ends, if its checksum agrees."""
    body = at + rows.HEAD
    if data[body - len(rows.MIDDLE) : body] != rows.MIDDLE:
        return None
    try:
        crc = int(data[at + len(rows.MARK) : at + len(rows.MARK) + 8], 16)
        if data.endswith(b"}\n") and zlib.crc32(data[body:-2]) == crc:
            return len(data) - 2
        _, end = _DECODER.raw_decode(text, body)
    except (ValueError, RecursionError):
        return None
    return end if zlib.crc32(data[body:end]) == crc else None


def _tail(data: bytes, end: int) -> bytes:
    """What closes a row's line, as far as it is there."""
    for close in (b"}\n", b"}"):
        if data.startswith(close, end):
            return close
    return b""


def _add(out: Scan, body: bytes, where: int) -> bool:
    """Take one row whose checksum is right; False if it is none that this version understands."""
    try:
        row = rows.parse(body)
        adder = _ADDERS.get(row["type"])
        if adder is not None:
            adder(out, row, body, where)
    except (KeyError, TypeError, ValueError):
        return False
    return True


def _add_answer(out: Scan, row: dict[str, Any], body: bytes, where: int) -> None:
    kind = KIND_ALIAS if row["type"] == rows.ALIAS else KIND_RESPONSE
    if row["type"] == rows.FAILURE:
        kind = KIND_RETRYABLE if row["retryable"] else KIND_PERMANENT
    physical = row["physical_key"] or "0" * 64
    out.blocks.append(
        Block(
            key=from_bytes(bytes.fromhex(rows.check_key(row["key"])), 32),
            physical=from_bytes(bytes.fromhex(rows.check_key(physical)), 32),
            resolution=np.array([resolution_number(row["resolution"])], np.uint64),
            at=np.array([row["at"]], np.int64),
            kind=np.array([kind], np.uint8),
            crc=np.array([zlib.crc32(body)], np.uint32),
            where=np.array([where], np.int64),
            size=np.array([len(body)], np.int32),
        )
    )


def _add_engine(out: Scan, row: dict[str, Any], body: bytes, where: int) -> None:
    out.engines.append(rows.engine_of(row))


def _add_segment(out: Scan, row: dict[str, Any], body: bytes, where: int) -> None:
    out.owner = Owner.from_json(row["owner"])


_ADDERS: Final[dict[str, Callable[[Scan, dict[str, Any], bytes, int], None]]] = {
    rows.RESPONSE: _add_answer,
    rows.ALIAS: _add_answer,
    rows.FAILURE: _add_answer,
    rows.ENGINE: _add_engine,
    rows.SEGMENT: _add_segment,
}
_DECODER: Final = json.JSONDecoder()
