"""The next model's weights in the page cache of this node before its server asks for them.

A server that starts reads its weights from a shared file system at a few hundred megabytes a second; from memory it is
seconds. While one model's last requests are asked, a thread reads the next one's files and throws away what it
read: the kernel keeps it. It takes only memory that nothing else uses, and nobody waits for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import sys
import threading
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Final

import psutil

from proctor.catalog.checkpoints import children, is_weight_file
from proctor.errors import ModelError

CHUNK: Final = 4 << 20
"""Bytes between two looks at whether to stop: some milliseconds of reading."""
SPARE_SHARE: Final = 0.1
"""Of the memory there is, this part stays free for what servers and engines still allocate."""
_LEAVE_S: Final = 1.0
"""How long leaving waits for the thread: one read of a file system that hangs must not hold a worker."""
_NICE: Final = 19
_CONTROLLERS: Final = Path("/sys/fs/cgroup")
_SPLIT: Final = re.compile(r"(?P<stem>.*)-\d{5}-of-(?P<count>\d{5})\.gguf", re.DOTALL)

Room = Callable[[], int]
"""Bytes that the page cache may still grow by without taking from what is in use."""


def weight_files(path: str) -> list[Path]:
    """The weight files of a model's directory or GGUF file (all parts of it) on this node, in the order in which they
    are loaded; none for what is not here, such as a URL or a hub id."""
    place = Path(path)
    try:
        if place.is_dir():
            return [p for p in children(place) if is_weight_file(p.name)]
        split = _SPLIT.fullmatch(place.name)
        parts = [place]
        if split is not None:
            numbers = range(1, int(split["count"]) + 1)
            parts = [place.with_name(f"{split['stem']}-{i:05d}-of-{split['count']}.gguf") for i in numbers]
        return [p for p in parts if p.is_file()]
    except (OSError, ValueError, ModelError):
        return []


class Preread:
    """A reading: what has been read so far."""

    def __init__(self) -> None:
        self.bytes = 0
        self.stopped = threading.Event()
        self.finished = threading.Event()
        """Set when nothing more will be read."""

    def stop(self) -> None:
        """Read no more than the chunk at hand: the worker ends, or needs the disk."""
        self.stopped.set()


@contextlib.asynccontextmanager
async def preread(
    paths: Sequence[Path], *, begin: asyncio.Event | None = None, room: Room | None = None
) -> AsyncGenerator[Preread]:
    """Read the files into the page cache, in their order, while the body runs; leaving stops it at once.

    `begin`: not before this is set. At most `room()` bytes are read, `free_memory` unless given, and no more once that
    has shrunk to what was read. Never an error: a file that cannot be read ends the reading.
    """
    found = Preread()
    # Not a thread of the loop's pool: its priority could not be raised again.
    thread = threading.Thread(target=_read, args=(paths, found, room or free_memory), name="preread", daemon=True)

    async def start() -> None:
        if begin is not None:
            await begin.wait()
        if paths:
            thread.start()
        else:
            found.finished.set()

    starting = asyncio.create_task(start())
    try:
        yield found
    finally:
        found.stop()
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)
        if thread.ident is not None:
            await asyncio.to_thread(thread.join, _LEAVE_S)


def _read(paths: Sequence[Path], found: Preread, room: Room) -> None:
    with contextlib.suppress(OSError, ValueError):
        if sys.platform == "linux":  # elsewhere a thread's number is no process's
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
        chunks = chain.from_iterable(map(_chunks, paths))
        most = room()
        while not found.stopped.is_set() and found.bytes + CHUNK <= min(most, room()):
            size = next(chunks, 0)
            if not size:
                break
            found.bytes += size
    found.finished.set()


def _chunks(path: Path) -> Iterator[int]:
    """Read the file through, a chunk at a time with the next one asked for ahead; the bytes of each."""
    buffer = bytearray(CHUNK)
    with path.open("rb", buffering=0) as file:
        place = 0
        while True:
            if sys.platform == "linux":
                os.posix_fadvise(file.fileno(), place + CHUNK, CHUNK, os.POSIX_FADV_WILLNEED)
            size = file.readinto(buffer)
            if not size:
                return
            place += size
            yield size


def free_memory() -> int:
    """Bytes of memory that are free or hold what nobody has mapped, less a tenth of all; of this machine and of every
    control group that this process is in. Files that a server has mapped, such as its weights, count as in use."""
    memory = psutil.virtual_memory()
    rooms = [memory.available - _mapped() - int(SPARE_SHARE * memory.total)]
    for group in _groups():
        limit, used = _limit_and_use(group)
        if limit is not None and limit < memory.total:
            rooms.append(limit - used - int(SPARE_SHARE * limit))
    return min(rooms)


def _mapped() -> int:
    for line in _lines(Path("/proc/meminfo")):
        if line.startswith("Mapped:"):
            return int(line.split()[1]) << 10
    return 0


def _groups() -> list[Path]:
    """The directories of this process's memory control group and those above it."""
    found: list[Path] = []
    for line in _lines(Path("/proc/self/cgroup")):
        number, names, path = line.split(":", 2)
        if number == "0" or "memory" in names.split(","):
            root = _CONTROLLERS if number == "0" else _CONTROLLERS / "memory"
            place = root / path.lstrip("/")
            found += [p for p in (place, *place.parents) if p == root or root in p.parents]
    return found


def _limit_and_use(group: Path) -> tuple[int | None, int]:
    """The limit in bytes (None: there is none) and what cannot be given up: memory of processes and mapped files."""
    fields = dict(line.split(" ", 1) for line in _lines(group / "memory.stat") if " " in line)
    names = ("anon", "file_mapped", "shmem") if "anon" in fields else ("total_rss", "total_mapped_file", "total_shmem")
    used = sum(int(fields.get(name, 0)) for name in names)
    for name in ("memory.max", "memory.limit_in_bytes"):
        for text in _lines(group / name):
            return (int(text) if text.isdecimal() else None), used
    return None, used


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return []
