"""Two live claims never hold the same key."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import pytest

from proctor.errors import StoreError
from proctor.store import Owner, Store, alive, claims

Key = Callable[[object], str]


@pytest.fixture
def keys(key: Key) -> list[str]:
    return [key(n) for n in range(10)]


@pytest.fixture
def folder(directory: Path) -> Path:
    return directory / "claims"


class Known:
    """Answers that come to light on `refresh`."""

    def __init__(self, *answered: str) -> None:
        self.answered = answered
        self.fresh = False

    def refresh(self) -> None:
        self.fresh = True

    def owed(self, keys: Sequence[str]) -> list[str]:
        assert self.fresh, "what has been answered meanwhile is not known without a refresh"
        return [key for key in keys if key not in self.answered]


async def test_the_overlap_is_deferred(store: Store, weights: str, owner: Owner, keys: list[str]) -> None:
    one, two, three = (store.ledger(weights, owner=owner) for _ in range(3))
    first = await one.claim(keys[:6])
    second = await two.claim(keys[4:8])
    third = await three.claim(keys)
    assert (first.seq, first.granted, first.deferred) == (1, tuple(keys[:6]), {})
    assert (second.seq, second.granted, second.deferred) == (2, tuple(keys[6:8]), {1: tuple(keys[4:6])})
    assert (third.seq, third.granted) == (3, tuple(keys[8:]))
    assert third.deferred == {1: tuple(keys[:6]), 2: tuple(keys[6:8])}
    none = await two.claim(keys[:2])
    assert (none.seq, none.granted, none.deferred) == (None, (), {1: tuple(keys[:2])})
    await two.finish(none)
    await one.finish(first)
    assert (await two.claim(keys[:2])).granted == tuple(keys[:2])


async def test_what_was_answered_meanwhile_is_not_granted(
    store: Store, weights: str, owner: Owner, keys: list[str]
) -> None:
    one, two = (store.ledger(weights, owner=owner) for _ in range(2))
    await one.finish(await one.claim(keys[:5]))
    assert (await two.claim(keys, answers=Known(*keys[:5]))).granted == tuple(keys[5:])


async def test_a_dead_owner_s_claim_is_void(
    store: Store, weights: str, owner: Owner, dead_owner: Owner, keys: list[str]
) -> None:
    dead = await store.ledger(weights, owner=dead_owner).claim(keys)
    mine = store.ledger(weights, owner=owner)
    assert dead.seq is not None
    assert await mine.wait(dead.seq, timeout_s=5)
    again = await mine.claim(keys)
    assert (again.seq, again.granted) == (2, tuple(keys))
    assert (await store.ledger(weights, owner=owner).claim(keys)).deferred == {2: tuple(keys)}


async def test_who_cannot_be_judged_counts_as_alive_until_someone_vouches(
    store: Store, weights: str, owner: Owner, keys: list[str]
) -> None:
    stranger = dataclasses.replace(owner, host="elsewhere", machine="other", boot="other")
    theirs = await store.ledger(weights, owner=stranger).claim(keys)
    mine = store.ledger(weights, owner=owner)
    assert theirs.seq is not None
    assert (await mine.claim(keys)).deferred == {theirs.seq: tuple(keys)}
    assert not await mine.wait(theirs.seq, timeout_s=0.1)
    assert list(await mine.live()) == [theirs.seq]
    await mine.void(theirs.seq)
    assert await mine.live() == {}
    assert (await mine.claim(keys)).granted == tuple(keys)


async def test_another_judge_may_be_asked(tmp_path: Path, weights: str, owner: Owner, keys: list[str]) -> None:
    gone: set[str] = set()
    store = Store.open(tmp_path / "s", alive=lambda owner: owner.job not in gone)
    theirs = await store.ledger(weights, owner=dataclasses.replace(owner, job="17", restart=1)).claim(keys)
    mine = store.ledger(weights, owner=owner, segment="abc")
    waiting = asyncio.create_task(mine.wait(theirs.seq or 0))
    await asyncio.sleep(0.1)
    assert not waiting.done()
    gone.add("17")
    assert await asyncio.wait_for(waiting, 10)
    assert (await mine.claim(keys)).granted == tuple(keys)
    held = (await mine.live())[2]
    assert (held.owner, held.segment, len(held.keys)) == (owner, "abc", 10)


async def test_waiting_ends_when_the_claim_is_finished(
    store: Store, weights: str, owner: Owner, keys: list[str]
) -> None:
    one, two = (store.ledger(weights, owner=owner) for _ in range(2))
    claim = await one.claim(keys)
    waiting = asyncio.create_task(two.wait(1))
    await asyncio.sleep(0.1)
    assert not waiting.done()
    with pytest.raises(ValueError, match="our own"):
        await one.wait(1)
    await one.finish(claim)
    assert await asyncio.wait_for(waiting, 10)
    assert await one.wait(1)


async def test_who_comes_second_sees_the_winner(
    store: Store, weights: str, owner: Owner, keys: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between our listing and our link somebody else takes the number."""
    rival = store.ledger(weights, owner=owner)
    link = os.link
    raced = 0

    def racing(source: Path, target: Path) -> None:
        nonlocal raced
        if raced < 3:
            raced += 1
            monkeypatch.setattr(os, "link", link)
            rival._claim(keys[raced : raced + 1], None)
            monkeypatch.setattr(os, "link", racing)
        link(source, target)

    monkeypatch.setattr(os, "link", racing)
    claim = await store.ledger(weights, owner=owner).claim(keys)
    assert claim.seq == 4
    assert claim.granted == (keys[0], *keys[4:])
    assert claim.deferred == {1: (keys[1],), 2: (keys[2],), 3: (keys[3],)}


@pytest.mark.parametrize("error", [FileExistsError(17, "File exists"), OSError(5, "Input/output error")])
async def test_a_link_whose_reply_is_lost_has_happened(
    store: Store, weights: str, owner: Owner, keys: list[str], monkeypatch: pytest.MonkeyPatch, error: OSError
) -> None:
    link = os.link

    def lost(source: Path, target: Path) -> None:
        link(source, target)
        raise error

    monkeypatch.setattr(os, "link", lost)
    claim = await store.ledger(weights, owner=owner).claim(keys)
    assert (claim.seq, claim.granted) == (1, tuple(keys))


async def test_a_link_that_fails_is_an_error(
    store: Store, weights: str, owner: Owner, keys: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(source: Path, target: Path) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "link", fail)
    with pytest.raises(StoreError, match="Input/output error"):
        await store.ledger(weights, owner=owner).claim(keys)
    assert list(folder.iterdir()) == []


async def test_a_claim_in_the_middle_of_a_stale_listing_is_read_all_the_same(
    store: Store, weights: str, owner: Owner, keys: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rival = store.ledger(weights, owner=owner)
    for n in range(4):
        await rival.claim(keys[n : n + 1])
    monkeypatch.setattr(claims.os, "listdir", lambda path: ["00000001.claim", "00000003.claim"])
    claim = await store.ledger(weights, owner=owner).claim(keys)
    assert (claim.seq, claim.granted) == (5, tuple(keys[4:]))


async def test_sweeping_keeps_numbers_unique(
    store: Store, weights: str, owner: Owner, dead_owner: Owner, keys: list[str], folder: Path
) -> None:
    mine, dead = store.ledger(weights, owner=owner), store.ledger(weights, owner=dead_owner)
    done = [await mine.claim([k]) for k in keys[:2]]
    await dead.claim(keys[2:3])
    live = await mine.claim(keys[3:4])
    done += [await mine.claim([k]) for k in keys[4:6]]
    for claim in done:
        await mine.finish(claim)
    assert await mine.sweep() == 0, "recent ones stay"
    assert await mine.sweep(keep_s=0) == 3, "up to the first live one"
    assert {p.name for p in folder.iterdir()} == {
        "00000004.claim",
        *(f"0000000{n}.claim{end}" for n in (5, 6) for end in ("", ".done")),
    }
    await mine.finish(live)
    assert await mine.sweep(keep_s=0) == 2, "never the highest"
    claim = await store.ledger(weights, owner=owner).claim(keys)
    assert (claim.seq, claim.granted) == (7, tuple(keys))


async def test_a_claim_that_was_swept_is_not_remembered(
    store: Store, weights: str, owner: Owner, keys: list[str]
) -> None:
    one, two = (store.ledger(weights, owner=owner) for _ in range(2))
    first = await one.claim(keys[:5])
    assert list((await two.claim(keys)).deferred) == [1]
    await one.finish(first)
    await one.sweep(keep_s=0)
    assert await two.wait(1)
    assert (await two.claim(keys[:5])).granted == tuple(keys[:5])


async def test_a_claimant_that_was_stopped_too_long_starts_over(
    store: Store, weights: str, owner: Owner, keys: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may have won a number that was used and swept, without having seen the claims after it."""
    rival = store.ledger(weights, owner=owner)
    link, clock = os.link, time.clock_gettime
    late = 0.0

    def stopped(source: Path, target: Path) -> None:
        nonlocal late
        monkeypatch.setattr(os, "link", link)
        for n in (0, 1):
            claim = rival._claim(keys[n : n + 1], None)
            if n == 0:
                rival._mark(claim.seq or 0, "done")
        rival._sweep(0)
        late = 2 * claims.KEEP_S
        link(source, target)

    monkeypatch.setattr(os, "link", stopped)
    monkeypatch.setattr(time, "clock_gettime", lambda which: clock(which) + late)
    claim = await store.ledger(weights, owner=owner).claim(keys)
    assert claim.seq == 3
    assert claim.granted == (keys[0], *keys[2:])
    assert claim.deferred == {2: (keys[1],)}


async def test_a_damaged_claim_stops(store: Store, weights: str, owner: Owner, keys: list[str], folder: Path) -> None:
    await store.ledger(weights, owner=owner).claim(keys)
    path = folder / "00000001.claim"
    path.write_bytes(path.read_bytes()[:-5])
    mine = store.ledger(weights, owner=owner)
    with pytest.raises(StoreError, match=r"damaged.*\n.*touch .*00000001\.claim\.void"):
        await mine.claim(keys)
    path.with_name("00000001.claim.void").touch()
    assert (await mine.claim(keys)).granted == tuple(keys)


def test_alive(owner: Owner) -> None:
    assert alive(owner) is True
    assert alive(dataclasses.replace(owner, started=owner.started - 60)) is False, "the pid was used again"
    assert alive(dataclasses.replace(owner, boot="before")) is False, "this machine was restarted"
    assert alive(dataclasses.replace(owner, boot="other", host="elsewhere")) is None
    assert alive(dataclasses.replace(owner, boot="other", machine="other")) is None
    assert alive(dataclasses.replace(owner, namespace="pid:[1]")) is None, "a pid of another container"
    assert Owner.from_json(owner.to_json() | {"later": 1}) == owner


def test_a_zombie_is_dead(owner: Owner) -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    process = psutil.Process(child.pid)
    theirs = dataclasses.replace(owner, pid=child.pid, started=process.create_time())
    while process.status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    assert alive(theirs) is False
    child.wait()
    assert alive(theirs) is False


async def test_many_keys(store: Store, weights: str, owner: Owner) -> None:
    keys = [f"{n:016x}" * 4 for n in range(100_000)]
    one, two = (store.ledger(weights, owner=owner) for _ in range(2))
    await one.claim(keys[::2])
    claim = await two.claim(keys)
    assert claim.granted == tuple(keys[1::2])
    assert claim.deferred == {1: tuple(keys[::2])}
