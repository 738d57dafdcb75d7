"""Appending: one writer per file, an acknowledged row is on disk."""

from __future__ import annotations

import asyncio
import bisect
import contextlib
import errno
import os
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, Self, TypeVar

from proctor.errors import StoreError, StoreFull
from proctor.records import Answer, EngineInfo, Response
from proctor.store import rows
from proctor.store.durable import as_store_error, make_directory, store_errors, sync_directory, temporary
from proctor.store.owner import Owner
from proctor.store.segments import OPEN

SEGMENT_BYTES: Final = 256 << 20
"""A segment is sealed at this size: large enough for few files, small enough to compact while a run goes on."""

_CLOCK_TOLERANCE_NS: Final = 1_000_000_000
"""File times are coarse; a smaller difference between the file system's clock and ours is no difference."""


_T = TypeVar("_T")


@dataclass(slots=True, eq=False)
class _Partial:
    """Bytes of a batch that could be written before an error, to the end of an entry."""

    kept: int
    error: OSError


@dataclass(slots=True, eq=False)
class _Entry:
    """What one call appends, and who waits for it."""

    data: bytes
    engines: tuple[str, ...]
    done: asyncio.Future[None]


class Writer:
    """Appends answers of one weights fingerprint under one resolution. An async context manager.

    Group commit: one fsync is in flight at a time, and all that arrives meanwhile goes into the next. After
    an error nothing more is accepted: what was acknowledged stands, the rest is owed.
    """

    def __init__(
        self,
        directory: Path,
        resolution: str,
        owner: Owner,
        *,
        segment_bytes: int = SEGMENT_BYTES,
        fsync: Callable[[int], None] = os.fsync,
    ) -> None:
        self.name: Final = uuid.uuid4().hex[:16]
        """Segments of this writer are `<name>-<n>`; claims name it."""
        self._directory = directory
        self._resolution = rows.check_resolution(resolution)
        self._header = rows.line(rows.segment_row(owner, resolution))
        self._segment_bytes = segment_bytes
        self._fsync = fsync
        self._pending: list[_Entry] = []
        self._engines: dict[str, bytes] = {}
        self._committer: asyncio.Task[None] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="proctor-store")
        self._error: StoreError | None = None
        self._closed = True
        self._clock_ns = 0
        self._last_at = 0
        # The rest belongs to the commit thread.
        self._number = 0
        self._fd = -1
        self._path = directory
        self._size = 0
        self._rows = 0
        self._written_engines: set[str] = set()

    async def __aenter__(self) -> Self:
        """Create the first segment. Raises StoreError where the store cannot be written."""
        try:
            await self._in_thread(self._create)
        except BaseException:
            self._thread.shutdown()
            raise
        self._closed = False
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Commit what is pending, seal the segment. Raises StoreError if that fails and nothing else has."""
        self._closed = True
        try:
            while self._committer is not None and not self._committer.done():
                await asyncio.wait([self._committer])
        finally:
            try:
                await self._in_thread(self._finish)
            except StoreError:
                if kind is None:
                    raise
            finally:
                self._thread.shutdown(wait=False)

    async def append(self, answer: Answer) -> None:
        """Store one answer; returns when it is on disk.

        Raises StoreFull or StoreError if it may not be: it is owed then. ValueError for a malformed key.
        """
        line = rows.line(rows.answer_row(answer, self._resolution, self._now()))
        engine = answer.engine_id if isinstance(answer, Response) else ""
        await self._commit(line, (engine,) if engine else ())

    async def append_many(self, answers: Sequence[Answer]) -> None:
        """Store several answers; returns when all are on disk. Raises as `append`; some may be stored then."""
        if answers:
            lines = rows.answer_lines(answers, self._resolution, self._now(len(answers)))
            engines = {a.engine_id for a in answers if isinstance(a, Response)}
            await self._commit(b"".join(lines), tuple(engines - {""}))

    async def alias(self, key: str, physical_key: str) -> None:
        """Store that `key` is answered by what `physical_key` has been answered with already. Raises as `append`."""
        await self._commit(rows.line(rows.alias_row(key, physical_key, self._resolution, self._now())), ())

    async def engine(self, info: EngineInfo) -> None:
        """Make an engine known; it is written once in each segment, before the first answer that names it."""
        self._engines[info.id] = rows.line(rows.engine_row(info))

    def _now(self, count: int = 1) -> int:
        """The first of `count` time stamps in microseconds by the file system's clock, later than all before."""
        first = max(self._last_at + 1, (time.time_ns() + self._clock_ns) // 1000)
        self._last_at = first + count - 1
        return first

    async def _commit(self, data: bytes, engines: tuple[str, ...]) -> None:
        if self._error is not None:
            raise self._error
        if self._closed:
            raise StoreError("answers are appended only inside `async with store.writer(...)`")
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._pending.append(_Entry(data, engines, done))
        if self._committer is None or self._committer.done():
            self._committer = asyncio.create_task(self._commit_all())
        await done

    async def _commit_all(self) -> None:
        """Write batch after batch until nothing is pending."""
        # One turn of the loop lets everyone who is ready join the first batch.
        await asyncio.sleep(0)
        while self._pending:
            batch, self._pending = self._pending, []
            durable = 0
            try:
                if self._error is None:
                    durable, self._error = await self._in_thread(lambda batch=batch: self._write(batch))
            finally:
                for entry in batch[:durable]:
                    if not entry.done.done():
                        entry.done.set_result(None)
                for entry in batch[durable:]:
                    if not entry.done.done():
                        entry.done.set_exception(self._error or StoreError("the writer was stopped"))

    async def _in_thread(self, work: Callable[[], _T]) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    # --- in the commit thread ---

    def _create(self) -> None:
        """Open the next segment; its header and its name are durable when this returns."""
        with store_errors("write answers", self._directory):
            make_directory(self._directory)
            self._path = self._directory / f"{self.name}-{self._number}{OPEN}"
            # Renamed when its header stands: a segment without one could never be told from a living writer's.
            temp = temporary(self._path)
            flags = os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_WRONLY | os.O_CLOEXEC
            self._fd = os.open(temp, flags, 0o644)
            try:
                written = os.write(self._fd, self._header)
                if written != len(self._header):
                    raise OSError(errno.ENOSPC, "short write", str(self._path))
                # Servers that share a file system have one clock in common: the one that dates its files.
                skew = os.fstat(self._fd).st_mtime_ns - time.time_ns()
                self._clock_ns = skew if abs(skew) > _CLOCK_TOLERANCE_NS else 0
                self._fsync(self._fd)
                os.rename(temp, self._path)
                sync_directory(self._directory)
            except OSError:
                os.close(self._fd)
                self._fd = -1
                for path in (temp, self._path):
                    with contextlib.suppress(OSError):
                        path.unlink()
                raise
        self._number += 1
        self._size = len(self._header)
        self._rows = 0
        self._written_engines = set()

    def _write(self, batch: list[_Entry]) -> tuple[int, StoreError | None]:
        """Write and fsync; how many entries, from the first, are durable, and the error that ended it."""
        try:
            if self._fd < 0:
                self._create()
            data, ends = self._encode(batch)
            with store_errors("write answers", self._path):
                failed = self._write_bytes(data, ends)
                # After a failed fsync nobody knows what is on disk, and a second one may lie: the file is given up.
                self._fsync(self._fd)
            size = self._size + (ends[-1] if failed is None else failed.kept)
            durable = bisect.bisect_right(ends, size - self._size)
            self._size = size
            self._rows += durable
        except StoreError as error:
            return 0, error
        if failed is not None:
            return durable, as_store_error(failed.error, "write answers", self._path)
        if self._size >= self._segment_bytes:
            try:
                self._seal()
            except StoreError as error:
                return durable, error
        return durable, None

    def _encode(self, batch: list[_Entry]) -> tuple[bytes, list[int]]:
        """The bytes of a batch, and where each entry's end."""
        lines: list[bytes] = []
        ends: list[int] = []
        size = 0
        for entry in batch:
            for engine in entry.engines:
                if engine not in self._written_engines and engine in self._engines:
                    self._written_engines.add(engine)
                    lines.append(self._engines[engine])
                    size += len(self._engines[engine])
            lines.append(entry.data)
            size += len(entry.data)
            ends.append(size)
        return b"".join(lines), ends

    def _write_bytes(self, data: bytes, ends: list[int]) -> _Partial | None:
        """Write all, or as much as there is room for, cut back to the end of an entry. Raises OSError."""
        view = memoryview(data)
        done = 0
        try:
            while done < len(data):
                done += os.write(self._fd, view[done:])
        except OSError as error:
            fitting = bisect.bisect_right(ends, done)
            kept = ends[fitting - 1] if fitting else 0
            os.ftruncate(self._fd, self._size + kept)
            return _Partial(kept, error)
        return None

    def _seal(self) -> None:
        """Close the segment and say by its name that it is complete."""
        with store_errors("seal a segment", self._path):
            os.close(self._fd)
            self._fd = -1
            os.rename(self._path, self._path.with_name(self._path.name.removesuffix(".open")))
            sync_directory(self._directory)

    def _finish(self) -> None:
        """Seal the segment, or remove it if it holds no row. A file that was given up keeps its name."""
        if self._fd < 0:
            return
        if self._rows:
            if self._error is None or isinstance(self._error, StoreFull):
                self._seal()
        else:
            with store_errors("remove an empty segment", self._path):
                self._path.unlink(missing_ok=True)
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
