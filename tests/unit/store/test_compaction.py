"""Whatever moment compaction is stopped at, nothing is lost, counted twice or answered differently."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from proctor.errors import StoreError
from proctor.records import Boundary, EngineInfo, Failure, Response
from proctor.store import Owner, Store, compaction, durable, part

Make = Callable[..., Response]
ENGINE = EngineInfo(engine="fake", version="1")


class Stopped(BaseException):
    """The process ends here."""


def fill(store: Store, weights: str, resolution: str, owner: Owner, answers: list[Response]) -> None:
    async def append() -> None:
        async with store.writer(weights, resolution, owner=owner) as writer:
            await writer.engine(ENGINE)
            await writer.append_many(answers)

    asyncio.run(append())


def test_rows_move_into_one_part(
    store: Store, weights: str, resolution: str, owner: Owner, response: Make, directory: Path
) -> None:
    made = [response(n, engine_id=ENGINE.id) for n in range(100)]
    for start in range(0, 100, 25):
        fill(store, weights, resolution, owner, made[start : start + 25])
    answers = store.answers(weights, resolution)
    done = store.compact(weights)
    assert (done.rows, len(done.replaced), done.damage) == (100, 4, 0)
    assert [p.name for p in directory.iterdir()] == [done.part]
    keys = [a.key for a in made]
    # An index that was made before reads on, though its files are gone.
    assert answers.read(keys) == {a.key: a for a in made}
    fresh = store.answers(weights, resolution)
    assert fresh.read(keys) == {a.key: a for a in made}
    assert fresh.engines() == answers.engines() == {ENGINE.id: ENGINE}
    assert fresh.duplicates == answers.duplicates == 0
    assert store.compact(weights).part is None


def test_several_row_groups(
    store: Store,
    weights: str,
    resolution: str,
    owner: Owner,
    response: Make,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(part, "ROW_GROUP", 16)
    made = [response(n, text=str(n)) for n in range(100)]
    for start, end in ((0, 5), (5, 6), (6, 22), (22, 100)):
        fill(store, weights, resolution, owner, made[start:end])
    assert store.compact(weights).rows == 100
    answers = store.answers(weights, resolution)
    for step in (1, 3, 17, 50):
        assert answers.read([a.key for a in made[::step]]) == {a.key: a for a in made[::step]}


async def test_a_living_writer_is_left_alone(
    store: Store, weights: str, resolution: str, owner: Owner, response: Make
) -> None:
    async with store.writer(weights, resolution, owner=owner) as writer:
        await writer.append(response(0))
        assert store.compact(weights).part is None
        await writer.append(response(1))
    assert store.compact(weights).rows == 2


def leave_open(
    store: Store, weights: str, resolution: str, owner: Owner, answers: list[Response], directory: Path
) -> Path:
    """A segment as a killed process leaves it, cut in its last line."""
    before = set(directory.glob("*")) if directory.exists() else set[Path]()
    fill(store, weights, resolution, owner, answers)
    (segment,) = set(directory.glob("*.jsonl")) - before
    path = segment.with_name(segment.name + ".open")
    segment.rename(path)
    path.write_bytes(path.read_bytes()[:-30])
    return path


def test_what_a_dead_writer_left_is_compacted(
    store: Store, weights: str, resolution: str, owner: Owner, dead_owner: Owner, response: Make, directory: Path
) -> None:
    made = [response(n) for n in range(10)]
    leave_open(store, weights, resolution, dead_owner, made[:5], directory)
    living = leave_open(store, weights, resolution, owner, made[5:], directory)
    done = store.compact(weights)
    assert done.rows == 4
    assert done.damage > 0
    assert sorted(p.name for p in directory.iterdir()) == sorted([done.part, living.name])
    assert store.answers(weights, resolution).owed([a.key for a in made]) == [made[4].key, made[9].key]


def stop_at(monkeypatch: pytest.MonkeyPatch, module: object, name: str, times: int, *, after: bool) -> None:
    """Let the `times`-th call of a function be where the process ends."""
    real = getattr(module, name)
    count = 0

    def stopping(*args: object, **kwargs: object) -> object:
        nonlocal count
        count += 1
        if count == times and not after:
            raise Stopped
        result = real(*args, **kwargs)
        if count == times:
            raise Stopped
        return result

    monkeypatch.setattr(module, name, stopping)


@pytest.mark.parametrize(
    ("module", "name", "times", "after"),
    [
        (compaction, "_write", 1, False),
        (compaction, "_write", 1, True),
        (compaction, "_check", 1, True),
        (durable.os, "rename", 1, False),
        (durable.os, "rename", 1, True),
        (durable, "sync_directory", 1, False),
        (compaction, "_check", 2, True),
        (compaction, "remove", 1, True),
        (compaction, "remove", 3, True),
        (compaction, "remove", 5, True),
    ],
)
def test_stopped_anywhere(
    store: Store,
    weights: str,
    resolution: str,
    owner: Owner,
    response: Make,
    directory: Path,
    module: object,
    name: str,
    times: int,
    after: bool,
) -> None:
    made = [response(n) for n in range(40)]
    lost = Failure(key=response("lost").key, boundary=Boundary.SERVER, message="x", retryable=True)
    for start in range(0, 40, 10):
        fill(store, weights, resolution, owner, [*made[start : start + 10], lost])  # type: ignore[list-item]
    keys = [a.key for a in made]
    expected = {a.key: a for a in made} | {lost.key: lost}
    early = store.answers(weights, resolution)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
        stop_at(patch, module, name, times, after=after)
        store.compact(weights)
    for _ in range(2):
        for answers in (early, store.answers(weights, resolution)):
            answers.refresh()
            assert answers.duplicates == 0
            assert answers.owed(keys) == []
            assert answers.read([*keys, lost.key]) == expected
        # The repetition finishes what is left.
        store.compact(weights)
        assert [p.suffix for p in directory.iterdir() if not p.name.startswith(".")] == [".parquet"]
        assert store.summary()[0].failures == 4


def test_small_parts_are_merged(
    store: Store, weights: str, resolution: str, owner: Owner, response: Make, directory: Path
) -> None:
    made = [response(n, engine_id=ENGINE.id) for n in range(compaction.MERGE_PARTS + 2)]
    answers = store.answers(weights, resolution)
    for answer in made:
        fill(store, weights, resolution, owner, [answer])
        store.compact(weights)
        answers.refresh()
    assert len(list(directory.iterdir())) < compaction.MERGE_PARTS
    for seen in (answers, store.answers(weights, resolution)):
        assert seen.read([a.key for a in made]) == {a.key: a for a in made}
        assert seen.duplicates == 0
        assert seen.engines() == {ENGINE.id: ENGINE}


def test_a_part_that_does_not_read_back_replaces_nothing(
    store: Store,
    weights: str,
    resolution: str,
    owner: Owner,
    response: Make,
    directory: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fill(store, weights, resolution, owner, [response(0)])
    monkeypatch.setattr(part, "verify", lambda path, expected: False)
    with pytest.raises(StoreError, match="did not read back"):
        store.compact(weights)
    assert [p.suffix for p in directory.iterdir()] == [".jsonl"]
    assert store.answers(weights, resolution).answered(response(0).key)


def test_readers_while_it_happens(store: Store, weights: str, resolution: str, owner: Owner, response: Make) -> None:
    """Open, refresh and read all the time while rows are appended and compacted: nothing known is ever missing."""
    stop = threading.Event()
    known: list[Response] = []
    failures: list[str] = []

    def reading() -> None:
        answers = store.answers(weights, resolution)
        while not stop.is_set():
            expected = list(known)
            keys = [a.key for a in expected]
            answers.refresh()
            for seen in (answers, store.answers(weights, resolution)):
                if seen.owed(keys) or seen.duplicates or seen.read(keys) != {a.key: a for a in expected}:
                    failures.append(f"{len(seen.owed(keys))} of {len(keys)} missing")

    readers = [threading.Thread(target=reading) for _ in range(2)]
    for reader in readers:
        reader.start()
    for step in range(20):
        new = [response((step, n)) for n in range(5)]
        fill(store, weights, resolution, owner, new)
        known.extend(new)
        if step % 2:
            store.compact(weights)
    stop.set()
    for reader in readers:
        reader.join()
    assert failures == []


def test_leftover_temporary_files_are_removed_after_a_day(
    store: Store, weights: str, resolution: str, owner: Owner, response: Make, directory: Path
) -> None:
    fill(store, weights, resolution, owner, [response(0)])
    old, new = directory / ".part-a.parquet.1.tmp", directory / ".part-b.parquet.2.tmp"
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (1, 1))
    store.compact(weights)
    assert not old.exists()
    assert new.exists()
