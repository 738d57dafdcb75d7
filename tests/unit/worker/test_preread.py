"""Weights in the page cache: what is read, how much of it, and when it stops."""

from __future__ import annotations

import asyncio
import ctypes
import mmap
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from proctor.worker import preread as module
from proctor.worker.preread import CHUNK, Preread, free_memory, preread, weight_files

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="page caches are looked at as Linux shows them")
PAGE = mmap.PAGESIZE
PLENTY = 1 << 40


def write(path: Path, size: int) -> Path:
    with path.open("wb") as file:
        file.write(os.urandom(size))
        file.flush()
        os.fsync(file.fileno())
    return path


def resident(path: Path) -> float:
    """The part of the file's pages that are in memory, by mincore(2); looking brings none there."""
    size = path.stat().st_size
    with path.open("r+b") as file, mmap.mmap(file.fileno(), size) as mapped:
        pages = -(-size // PAGE)
        found = (ctypes.c_ubyte * pages)()
        anchor = ctypes.c_char.from_buffer(mapped)
        libc = ctypes.CDLL(None, use_errno=True)
        code = libc.mincore(ctypes.c_void_p(ctypes.addressof(anchor)), ctypes.c_size_t(size), found)
        del anchor
        assert code == 0, os.strerror(ctypes.get_errno())
        return sum(byte & 1 for byte in found) / pages


def forget(path: Path) -> None:
    """Put the file out of the page cache, where the file system has one of its own."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if resident(path) > 0:
        pytest.skip("this file system keeps its files in memory")


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.01)


async def test_what_was_read_is_in_memory(tmp_path: Path) -> None:
    files = [write(tmp_path / f"model-{i}.safetensors", 3 * CHUNK + 5000) for i in range(2)]
    for file in files:
        forget(file)
    async with preread(files, room=lambda: PLENTY) as found:
        await until(found.finished.is_set)
    assert found.bytes == 2 * (3 * CHUNK + 5000)
    # A kernel that is short of memory may take a page back before we look.
    assert min(resident(file) for file in files) > 0.9


async def test_no_more_than_there_is_room_for(tmp_path: Path) -> None:
    file = write(tmp_path / "model.gguf", 5 * CHUNK)
    forget(file)
    async with preread([file], room=lambda: 3 * CHUNK - 1) as found:
        await until(found.finished.is_set)
    assert found.bytes == 2 * CHUNK
    async with preread([file], room=lambda: -1) as found:
        await until(found.finished.is_set)
    assert found.bytes == 0


async def test_it_ends_when_others_need_the_memory(tmp_path: Path) -> None:
    file = write(tmp_path / "model.gguf", 8 * CHUNK)
    rooms = [8 * CHUNK, 8 * CHUNK, 8 * CHUNK, 2 * CHUNK]
    async with preread([file], room=lambda: rooms.pop(0) if len(rooms) > 1 else rooms[0]) as found:
        await until(found.finished.is_set)
    assert found.bytes == 2 * CHUNK


async def test_leaving_stops_it_at_once(tmp_path: Path) -> None:
    file = write(tmp_path / "model.gguf", 8 * CHUNK)
    looks = threading.Semaphore(3)  # one at the beginning and one before each chunk: then the reader waits

    def room() -> int:
        assert looks.acquire(timeout=60)
        return PLENTY

    async with preread([file], room=room) as found:
        await until(lambda: found.bytes == 2 * CHUNK)
        asyncio.get_running_loop().call_later(0.05, looks.release, 100)
    assert found.bytes <= 3 * CHUNK
    assert not [t for t in threading.enumerate() if t.name == "preread"]


async def test_a_worker_that_drains_stops_it_before_it_leaves(tmp_path: Path) -> None:
    file = write(tmp_path / "model.gguf", 2 * CHUNK)
    begin = asyncio.Event()
    async with preread([file], begin=begin, room=lambda: PLENTY) as found:
        found.stop()
        begin.set()
        await until(found.finished.is_set)
    assert found.bytes == 0


async def test_a_read_that_hangs_holds_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A named pipe that nobody writes to: what a server of files that is gone looks like."""
    monkeypatch.setattr(module, "_LEAVE_S", 0.05)
    os.mkfifo(tmp_path / "model.gguf")
    async with preread([tmp_path / "model.gguf"], room=lambda: PLENTY) as found:
        await asyncio.sleep(0.05)
    assert found.bytes == 0
    os.close(os.open(tmp_path / "model.gguf", os.O_WRONLY | os.O_NONBLOCK))  # lets the thread go
    await until(found.finished.is_set)


async def test_nothing_is_read_before_it_is_time(tmp_path: Path) -> None:
    file = write(tmp_path / "model.gguf", CHUNK)
    forget(file)
    begin = asyncio.Event()
    async with preread([file], begin=begin, room=lambda: PLENTY) as found:
        await asyncio.sleep(0.05)
        assert (found.bytes, resident(file)) == (0, 0)
        begin.set()
        await until(found.finished.is_set)
    assert resident(file) > 0.9
    async with preread([file], begin=asyncio.Event(), room=lambda: PLENTY) as found:
        pass
    assert found.bytes == 0


async def test_errors_are_nobodys_business(tmp_path: Path) -> None:
    good = write(tmp_path / "b.gguf", 100)
    async with preread([tmp_path / "a.gguf", good], room=lambda: PLENTY) as found:
        await until(found.finished.is_set)
    assert found.bytes == 0

    def fails() -> int:
        raise OSError("no /proc")

    async with preread([good], room=fails) as found:
        await until(found.finished.is_set)
    async with preread([]) as found:
        assert isinstance(found, Preread)
        await until(found.finished.is_set)


async def test_the_worker_itself_keeps_its_priority(tmp_path: Path) -> None:
    before = os.getpriority(os.PRIO_PROCESS, 0)
    async with preread([write(tmp_path / "m.gguf", 10)], room=lambda: PLENTY) as found:
        await until(found.finished.is_set)
    assert os.getpriority(os.PRIO_PROCESS, 0) == before


def test_files_of_a_model(tmp_path: Path) -> None:
    directory = tmp_path / "model"
    directory.mkdir()
    for name in ("model-00002-of-00002.safetensors", "model-00001-of-00002.safetensors", "config.json", "optimizer.pt"):
        (directory / name).write_bytes(b"x")
    names = [p.name for p in weight_files(str(directory))]
    assert names[:2] == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert "config.json" not in names
    for name in ("m-00001-of-00002.gguf", "m-00002-of-00002.gguf", "m-00001-of-00003.gguf", "one.gguf"):
        (tmp_path / name).write_bytes(b"x")
    parts = weight_files(str(tmp_path / "m-00001-of-00002.gguf"))
    assert [p.name for p in parts] == ["m-00001-of-00002.gguf", "m-00002-of-00002.gguf"]
    assert weight_files(str(tmp_path / "one.gguf")) == [tmp_path / "one.gguf"]


@pytest.mark.parametrize("path", ["http://localhost:8000/v1", "org/model", "/no/such/model.gguf", "nul\0byte", ""])
def test_what_is_not_here_has_no_files(path: str) -> None:
    assert weight_files(path) == []


def test_free_memory_is_less_than_what_is_available() -> None:
    assert free_memory() < psutil.virtual_memory().available


@pytest.mark.parametrize(
    ("listing", "group", "files"),
    [
        ("0::/job\n", "job", {"memory.max": "1000000\n", "memory.stat": "anon 300000\nfile_mapped 100000\nfile 5\n"}),
        (
            "7:cpu:/x\n9:memory:/job\n",
            "memory/job",
            {"memory.limit_in_bytes": "1000000\n", "memory.stat": "total_rss 300000\ntotal_mapped_file 100000\n"},
        ),
    ],
    ids=["v2", "v1"],
)
def test_the_limit_of_a_job_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, listing: str, group: str, files: dict[str, str]
) -> None:
    place = tmp_path / group
    place.mkdir(parents=True)
    for name, text in files.items():
        (place / name).write_text(text)
    (place.parent / "memory.max").write_text("max\n")
    real = module._lines
    monkeypatch.setattr(module, "_CONTROLLERS", tmp_path)
    monkeypatch.setattr(module, "_lines", lambda p: listing.splitlines() if p == Path("/proc/self/cgroup") else real(p))
    assert free_memory() == 1_000_000 - 400_000 - 100_000
