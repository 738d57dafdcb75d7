"""An acknowledged row is on disk."""

from __future__ import annotations

import asyncio
import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from proctor.errors import StoreError, StoreFull
from proctor.records import EngineInfo, Response
from proctor.store import Owner, Store

Make = Callable[..., Response]


async def test_nothing_is_acknowledged_before_fsync_returns(
    store: Store, weights: str, resolution: str, owner: Owner, response: Make
) -> None:
    gate = threading.Event()
    gate.set()
    running = most = calls = 0

    def fsync(fd: int) -> None:
        nonlocal running, most, calls
        running += 1
        calls += 1
        most = max(most, running)
        gate.wait(10)
        os.fsync(fd)
        running -= 1

    async with store.writer(weights, resolution, owner=owner, fsync=fsync) as writer:
        gate.clear()
        first = asyncio.create_task(writer.append(response(0)))
        while running == 0:
            await asyncio.sleep(0.001)
        rest = [asyncio.create_task(writer.append(response(n))) for n in range(1, 500)]
        await asyncio.sleep(0.05)
        assert not first.done()
        assert not any(task.done() for task in rest)
        before = calls
        gate.set()
        await asyncio.gather(first, *rest)
        assert calls - before == 1, "all that arrived meanwhile is one batch"
        assert most == 1
    assert store.answers(weights, resolution).counts.responses == 500


async def test_an_acknowledged_row_is_visible_at_once(
    store: Store, weights: str, resolution: str, owner: Owner, response: Make
) -> None:
    async with store.writer(weights, resolution, owner=owner) as writer:
        answers = store.answers(weights, resolution)
        for n in range(20):
            await writer.append(response(n))
            answers.refresh()
            assert answers.answered(response(n).key)


async def test_segments_roll_and_each_names_its_engines(
    store: Store, weights: str, resolution: str, owner: Owner, response: Make, directory: Path
) -> None:
    used, unused = EngineInfo(engine="used", version="1"), EngineInfo(engine="unused", version="1")
    async with store.writer(weights, resolution, owner=owner, segment_bytes=2000) as writer:
        await writer.engine(used)
        await writer.engine(unused)
        for n in range(30):
            await writer.append(response(n, engine_id=used.id))
        assert [p.name for p in directory.glob("*.open")] in (
            [],
            [f"{writer.name}-{len(list(directory.iterdir())) - 1}.jsonl.open"],
        )
    segments = list(directory.iterdir())
    assert len(segments) > 3
    for segment in segments:
        text = segment.read_text()
        assert segment.suffix == ".jsonl"
        assert text.count('"engine":"used"') == 1
        assert text.index('"engine":"used"') < text.index('"type":"response"')
        assert '"engine":"unused"' not in text
        assert text.count('"type":"segment"') == 1
    answers = store.answers(weights, resolution)
    assert answers.counts.responses == 30
    assert answers.engines() == {used.id: used}


async def test_a_writer_without_rows_leaves_nothing(
    store: Store, weights: str, resolution: str, owner: Owner, directory: Path
) -> None:
    async with store.writer(weights, resolution, owner=owner):
        assert len(list(directory.iterdir())) == 1
    assert list(directory.iterdir()) == []


async def test_a_segment_has_its_name_only_when_it_says_whose_it_is(
    store: Store, weights: str, resolution: str, owner: Owner, directory: Path
) -> None:
    """A writer that is killed before would leave a segment that nobody could prove dead, and that stays for ever."""
    seen: list[list[str]] = []

    def fsync(fd: int) -> None:
        os.fsync(fd)
        seen.append([p.name for p in directory.iterdir() if not p.name.startswith(".")])

    async with store.writer(weights, resolution, owner=owner, fsync=fsync):
        (segment,) = directory.iterdir()
        assert segment.suffix == ".open"
        assert segment.read_bytes().endswith(b"\n")
    assert seen[0] == []


async def test_after_a_failed_fsync_the_file_is_given_up(
    store: Store, weights: str, resolution: str, owner: Owner, response: Make, directory: Path
) -> None:
    broken = False

    def fsync(fd: int) -> None:
        if broken:
            raise OSError(errno.EIO, "Input/output error")
        os.fsync(fd)

    async with store.writer(weights, resolution, owner=owner, fsync=fsync) as writer:
        await writer.append(response(0))
        broken = True
        with pytest.raises(StoreError, match="Input/output error"):
            await writer.append(response(1))
        broken = False
        with pytest.raises(StoreError, match="Input/output error"):
            await writer.append(response(2))
    assert [p.suffix for p in directory.iterdir()] == [".open"]
    answers = store.answers(weights, resolution)
    assert answers.answered(response(0).key)
    assert not answers.answered(response(2).key)


async def test_a_cancelled_append_harms_no_other(
    store: Store, weights: str, resolution: str, owner: Owner, response: Make
) -> None:
    async with store.writer(weights, resolution, owner=owner) as writer:
        tasks = [asyncio.create_task(writer.append(response(n))) for n in range(50)]
        await asyncio.sleep(0)
        for task in tasks[::2]:
            task.cancel()
        done = await asyncio.gather(*tasks, return_exceptions=True)
        assert [isinstance(d, asyncio.CancelledError) for d in done[:4]] == [True, False, True, False]
        assert done[1::2] == [None] * 25
    answers = store.answers(weights, resolution)
    assert all(answers.answered(response(n).key) for n in range(1, 50, 2))


async def test_what_is_pending_at_the_end_is_stored(
    store: Store, weights: str, resolution: str, owner: Owner, response: Make
) -> None:
    with pytest.raises(RuntimeError, match="the worker broke"):
        async with store.writer(weights, resolution, owner=owner) as writer:
            task = asyncio.create_task(writer.append(response(0)))
            await asyncio.sleep(0)
            raise RuntimeError("the worker broke")
    await task
    assert store.answers(weights, resolution).answered(response(0).key)
    with pytest.raises(StoreError, match="only inside"):
        await writer.append(response(1))


async def test_malformed_keys_stop_nobody_else(
    store: Store, weights: str, resolution: str, owner: Owner, response: Make
) -> None:
    async with store.writer(weights, resolution, owner=owner) as writer:
        with pytest.raises(ValueError, match="64 hexadecimal"):
            await writer.append(Response(key="k", physical_key="p"))
        await writer.append(response(1))
        await writer.append_many([])


async def test_time_stamps_follow_the_file_system_s_clock(
    store: Store, weights: str, resolution: str, owner: Owner, response: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A writer on a machine whose clock is an hour behind must not displace what is there."""
    first, second = response(0, text="first"), response(0, text="second")
    async with store.writer(weights, resolution, owner=owner) as writer:
        await writer.append(first)
    real = __import__("time").time_ns
    monkeypatch.setattr("proctor.store.writer.time.time_ns", lambda: real() - 3_600_000_000_000)
    async with store.writer(weights, resolution, owner=owner) as writer:
        await writer.append(second)
    answers = store.answers(weights, resolution)
    assert answers.read([first.key]) == {first.key: first}
    assert answers.duplicates == 1


async def test_a_full_disk(
    tmp_path: Path, weights: str, resolution: str, owner: Owner, response: Make, mount: Callable[..., None]
) -> None:
    point = tmp_path / "small"
    point.mkdir()
    mount(point, "-t", "tmpfs", "-o", "size=256k", "tmpfs")
    store = Store.open(point / "store")
    acknowledged: list[str] = []
    refused: list[str] = []

    async def append(n: int) -> None:
        answer = response(n, text="x" * 500)
        try:
            await writer.append(answer)
        except StoreFull as error:
            assert "no space left" in str(error)
            refused.append(answer.key)
        else:
            acknowledged.append(answer.key)

    async with store.writer(weights, resolution, owner=owner) as writer:
        for start in range(0, 500, 50):
            await asyncio.gather(*(append(n) for n in range(start, start + 50)))
    assert len(acknowledged) > 100
    assert len(refused) > 100
    answers = store.answers(weights, resolution)
    assert answers.damage == []
    assert answers.owed(acknowledged) == []
    assert answers.owed(refused) == refused
    assert len(answers.read(acknowledged)) == len(acknowledged)
    with pytest.raises(StoreFull, match="no space left"):
        async with store.writer(weights, resolution, owner=owner) as writer:
            await writer.append_many([response(n, text="x" * 500) for n in range(1000, 1300)])
    # Room again: the same command goes on.
    mount(point, "-o", "remount,size=2m")
    async with store.writer(weights, resolution, owner=owner) as writer:
        await writer.append_many([response(n, text="x" * 500) for n in range(500)])
    answers.refresh()
    assert answers.owed(refused) == []
    assert answers.duplicates == len(acknowledged)


async def test_a_read_only_store(
    store: Store,
    tmp_path: Path,
    weights: str,
    resolution: str,
    owner: Owner,
    response: Make,
    mount: Callable[..., None],
) -> None:
    async with store.writer(weights, resolution, owner=owner) as writer:
        await writer.append(response(0))
    point = tmp_path / "read-only"
    point.mkdir()
    mount(point, "--bind", str(store.path))
    mount(point, "-o", "remount,bind,ro")
    frozen = Store.open(point)
    answers = frozen.answers(weights, resolution)
    assert answers.read([response(0).key]) == {response(0).key: response(0)}
    with pytest.raises(StoreError, match="read-only"):
        async with frozen.writer(weights, resolution, owner=owner):
            pass
    with pytest.raises(StoreError, match="read-only"):
        await frozen.ledger(weights, owner=owner).claim([response(1).key])
    with pytest.raises(StoreError, match="read-only"):
        Store.open(point / "new")
    with pytest.raises(StoreError, match="read-only"):
        frozen.compact(weights)
