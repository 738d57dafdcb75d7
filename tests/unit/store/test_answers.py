"""What is answered, what is owed, and which answer counts."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from proctor.errors import StoreError
from proctor.records import Boundary, Failure, Response
from proctor.store import Answers, Owner, Store, rows
from proctor.store.keys import key_array

Make = Callable[..., Response]
Key = Callable[[object], str]
OTHER = "f" * 16


@pytest.fixture
def fill(store: Store, weights: str, resolution: str, owner: Owner) -> Callable[..., None]:
    """Appends answers in a writer of its own."""

    def do(*answers: Response | Failure, under: str = resolution) -> None:
        async def append() -> None:
            async with store.writer(weights, under, owner=owner) as writer:
                await writer.append_many(answers)

        asyncio.run(append())

    return do


def failed(key: str, *, retryable: bool, message: str = "no") -> Failure:
    return Failure(key=key, boundary=Boundary.SERVER, message=message, retryable=retryable)


def test_an_empty_store_owes_everything(store: Store, weights: str, resolution: str, key: Key) -> None:
    answers = store.answers(weights, resolution)
    assert answers.owed([key(1), key(2)]) == [key(1), key(2)]
    assert answers.read([key(1)]) == {}
    assert not answers.answered(key(1))
    assert answers.counts.responses == answers.duplicates == 0


def test_failures(
    store: Store, weights: str, resolution: str, key: Key, response: Make, fill: Callable[..., None]
) -> None:
    again, never, later, mended = (key(n) for n in ("again", "never", "later", "mended"))
    fill(failed(again, retryable=True), failed(never, retryable=False), failed(later, retryable=True))
    fill(failed(later, retryable=False, message="last"), response("mended"))
    fill(failed(mended, retryable=False))
    answers = store.answers(weights, resolution)
    keys = [mended, later, never, again, key("unknown")]
    assert answers.owed(keys) == [again, key("unknown")]
    assert answers.failed(keys) == [later, never]
    assert answers.failure(later) == failed(later, retryable=False, message="last")
    assert answers.failure(mended) is None
    assert answers.failure(key("unknown")) is None
    assert answers.read(keys) == {
        mended: response("mended"),
        later: failed(later, retryable=False, message="last"),
        never: failed(never, retryable=False),
        again: failed(again, retryable=True),
    }
    # A success later on supersedes.
    fill(response("never"))
    answers.refresh()
    assert answers.failed(keys) == [later]
    assert answers.read([never]) == {never: response("never")}


def test_the_first_answer_stays(
    store: Store, weights: str, resolution: str, response: Make, fill: Callable[..., None]
) -> None:
    first, second = response(0, text="first"), response(0, text="second")
    fill(first)
    answers = store.answers(weights, resolution)
    fill(second)
    answers.refresh()
    for seen in (answers, store.answers(weights, resolution)):
        assert seen.read([first.key]) == {first.key: first}
        assert seen.duplicates == 1
        assert seen.counts.responses == 1


def test_a_stamp_stands_for_the_answers(
    store: Store, weights: str, resolution: str, key: Key, response: Make, fill: Callable[..., None]
) -> None:
    keys = key_array([key(0), key(1)])
    fill(response(0))
    answers = store.answers(weights, resolution)
    assert answers.stamp(keys) is None
    fill(response(1), response(2))
    answers.refresh()
    stamp = answers.stamp(keys)
    assert stamp is not None
    assert stamp != answers.stamp(key_array([key(0), key(2)]))
    fill(response(1, text="too late"))
    answers.refresh()
    store.compact(weights)
    for seen in (answers, store.answers(weights, resolution)):
        seen.refresh()
        assert seen.stamp(keys) == stamp


def test_an_answer_to_the_same_physical_request_is_shared(
    store: Store, weights: str, resolution: str, owner: Owner, key: Key, response: Make, fill: Callable[..., None]
) -> None:
    first = response("asked")
    fill(first, under=OTHER)
    answers = store.answers(weights, resolution)
    assert answers.physical_of([first.physical_key])
    assert not answers.physical_of([first.key])
    assert answers.owed([first.key]) == [first.key], "another resolution is another question"

    async def alias() -> None:
        async with store.writer(weights, resolution, owner=owner) as writer:
            await writer.alias(key("same"), first.physical_key)
            await writer.alias(key("dangling"), key("no such answer"))

    asyncio.run(alias())
    answers.refresh()
    assert answers.answered(key("same"))
    read = answers.read([key("same"), key("dangling")])
    assert list(read) == [key("same")]
    assert read[key("same")] == Response(key=key("same"), physical_key=first.physical_key, text="answer")
    assert answers.owed([key("same"), key("dangling")]) == [key("dangling")]


def test_refresh_reads_only_what_is_new(
    store: Store,
    weights: str,
    resolution: str,
    owner: Owner,
    response: Make,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def grow() -> None:
        async with store.writer(weights, resolution, owner=owner) as writer:
            await writer.append_many([response(n) for n in range(1000)])
            answers = store.answers(weights, resolution)
            read = 0
            pread = os.pread

            def counting(fd: int, size: int, offset: int) -> bytes:
                nonlocal read
                data = pread(fd, size, offset)
                read += len(data)
                return data

            monkeypatch.setattr(os, "pread", counting)
            await writer.append(response(1000))
            answers.refresh()
            assert answers.answered(response(1000).key)
            assert read < 20_000
        # Sealed by now, under another name.
        read = 0
        answers.refresh()
        assert read < 20_000
        assert answers.owed([response(n).key for n in range(1001)]) == []
        assert answers.counts.responses == 1001

    asyncio.run(grow())


def test_many_refreshes_fold_together(
    store: Store,
    weights: str,
    resolution: str,
    response: Make,
    fill: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("proctor.store.index._DELTA_ROWS", 7)
    answers = store.answers(weights, resolution)
    expected: dict[str, Response] = {}
    for step in range(12):
        new = [response(n, text=f"step {step}") for n in range(step * 2, step * 2 + 4)]
        fill(*new)
        for answer in new:
            expected.setdefault(answer.key, answer)
        answers.refresh()
        assert answers.read(list(expected)) == expected
        fresh = store.answers(weights, resolution)
        assert (answers.duplicates, answers.counts) == (fresh.duplicates, fresh.counts)


def test_a_torn_tail_is_reported_when_its_writer_is_dead(
    store: Store, weights: str, resolution: str, owner: Owner, dead_owner: Owner, response: Make, directory: Path
) -> None:
    directory.mkdir(parents=True)
    for name, who in (("dead", dead_owner), ("alive", owner)):
        good = rows.line(rows.answer_row(response(name), resolution, 1_700_000_000_000_000))
        torn = rows.line(rows.answer_row(response(f"torn {name}"), resolution, 1_700_000_000_000_001))[:-40]
        (directory / f"{name}-0.jsonl.open").write_bytes(rows.line(rows.segment_row(who, resolution)) + good + torn)
    answers = store.answers(weights, resolution)
    assert answers.answered(response("dead").key)
    assert answers.answered(response("alive").key)
    assert [d.file for d in answers.damage] == ["dead-0"]
    assert answers.damage[0].bytes == len(torn)
    assert answers.owed([response("torn dead").key]) == [response("torn dead").key]


def tamper(part: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    table = pq.read_table(part)
    pq.write_table(change(table), part, row_group_size=8192, write_page_checksum=True)


def edited(old: bytes, new: bytes) -> Callable[[pa.Table], pa.Table]:
    """One answer changed in the rows' bytes, the file otherwise rewritten faithfully."""

    def change(table: pa.Table) -> pa.Table:
        bodies = [body.replace(old, new) for body in table.column("row").to_pylist()]
        return table.set_column(table.schema.get_field_index("row"), "row", pa.array(bodies, pa.large_binary()))

    return change


def test_a_tampered_row_of_a_part_is_found_when_read_and_owed_from_then_on(
    store: Store, weights: str, resolution: str, response: Make, fill: Callable[..., None], directory: Path
) -> None:
    made = [response(n, text=f"text {n}") for n in range(20)]
    fill(*made)
    part = store.compact(weights).part
    assert part is not None
    tamper(directory / part, edited(b"text 7", b"TEXT 7"))
    answers = store.answers(weights, resolution)
    keys = [answer.key for answer in made]
    read = answers.read(keys)
    assert read == {a.key: a for a in made if a is not made[7]}
    assert [(d.file, d.offset) for d in answers.damage] == [(part, 7)]
    assert answers.owed(keys) == [keys[7]]
    # Whoever opens the store later knows too.
    assert store.answers(weights, resolution).owed(keys) == [keys[7]]
    fill(made[7])
    answers.refresh()
    assert answers.read(keys) == {a.key: a for a in made}
    assert store.answers(weights, resolution).owed(keys) == []


def test_swapped_rows_of_a_part_are_found(
    store: Store, weights: str, resolution: str, response: Make, fill: Callable[..., None], directory: Path
) -> None:
    """Bytes and checksum fit each other, but not the key under which they are stored."""
    made = [response(n) for n in range(4)]
    fill(*made)
    part = store.compact(weights).part
    assert part is not None

    def swap(table: pa.Table) -> pa.Table:
        order = pa.array([1, 0, 2, 3])
        for name in ("row", "crc", "size"):
            at = table.schema.get_field_index(name)
            table = table.set_column(at, table.schema.field(at), table.column(name).take(order))
        return table

    tamper(directory / part, swap)
    answers = store.answers(weights, resolution)
    assert list(answers.read([a.key for a in made])) == [a.key for a in made[2:]]
    assert len(answers.damage) == 2


def test_flipped_bytes_in_a_part(
    store: Store, weights: str, resolution: str, response: Make, fill: Callable[..., None], directory: Path
) -> None:
    made = [response(n, text=os.urandom(300).hex()) for n in range(200)]
    fill(*made)
    part = store.compact(weights).part
    assert part is not None
    data = bytearray((directory / part).read_bytes())
    data[len(data) // 2] ^= 1
    (directory / part).write_bytes(data)
    answers = store.answers(weights, resolution)
    assert answers.read([a.key for a in made]) == {}, "the page's checksum tells, so its rows are not trusted"
    assert len(answers.owed([a.key for a in made])) == 200


def test_a_part_that_cannot_be_opened_stops(
    store: Store, weights: str, resolution: str, response: Make, fill: Callable[..., None], directory: Path
) -> None:
    fill(response(0))
    part = store.compact(weights).part
    assert part is not None
    (directory / part).write_bytes((directory / part).read_bytes()[:-3])
    with pytest.raises(StoreError, match="is damaged") as error:
        store.answers(weights, resolution)
    assert part in str(error.value)
    assert "backup" in str(error.value)


def test_damage_that_comes_after_the_scan_is_found_when_read(
    store: Store, weights: str, resolution: str, response: Make, fill: Callable[..., None], directory: Path
) -> None:
    fill(response(0, text="right"), response(1))
    answers = store.answers(weights, resolution)
    segment = next(directory.glob("*.jsonl"))
    segment.write_bytes(segment.read_bytes().replace(b"right", b"wrong"))
    assert list(answers.read([response(0).key, response(1).key])) == [response(1).key]
    assert answers.owed([response(0).key]) == [response(0).key]
    assert [d.file for d in answers.damage] == [segment.stem]


def test_a_file_that_is_gone_is_no_answer(
    store: Store, weights: str, resolution: str, response: Make, fill: Callable[..., None], directory: Path
) -> None:
    fill(response(0))
    answers: Answers = store.answers(weights, resolution)
    for segment in directory.glob("*.jsonl"):
        segment.unlink()
    assert answers.read([response(0).key]) == {}
    assert answers.owed([response(0).key]) == [response(0).key]


def test_a_stale_file_handle_is_listed_again(
    store: Store,
    weights: str,
    resolution: str,
    response: Make,
    fill: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What a shared file system says of a file that another machine has deleted."""
    fill(response(0))
    answers = store.answers(weights, resolution)
    fill(response(1))
    pread, stale = os.pread, 2

    def sometimes(fd: int, size: int, offset: int) -> bytes:
        nonlocal stale
        if stale:
            stale -= 1
            raise OSError(errno.ESTALE, "Stale file handle")
        return pread(fd, size, offset)

    monkeypatch.setattr(os, "pread", sometimes)
    answers.refresh()
    assert answers.answered(response(1).key)
    stale = 1
    assert len(answers.read([response(0).key, response(1).key])) == 2
