"""Real processes: killed at any instant, and claiming at the same time."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from proctor.records import Response
from proctor.store import Owner, Store, rows

WRITER = """
import asyncio, sys
from proctor.records import Response
from proctor.store import Owner, Store

async def main(path, weights, resolution, prefix):
    store = Store.open(path)

    async def append(n):
        key = f"{prefix}{n:062x}"
        await writer.append(Response(key=key, physical_key=key[::-1], text="x" * (n % 700)))
        print(key, flush=True)

    async with store.writer(weights, resolution, owner=Owner.here(), segment_bytes=40_000) as writer:
        n = 0
        async with asyncio.TaskGroup() as group:
            while True:
                for _ in range(20):
                    group.create_task(append(n))
                    n += 1
                await asyncio.sleep(0.001)

asyncio.run(main(*sys.argv[1:]))
"""

CLAIMER = """
import asyncio, json, random, sys, time
from proctor.store import Owner, Store

async def main(path, weights, seed, rounds, finish):
    draw = random.Random(int(seed))
    ledger = Store.open(path).ledger(weights, owner=Owner.here())
    for _ in range(int(rounds)):
        start = draw.randrange(200)
        keys = [f"{n:032x}" * 2 for n in range(start, start + draw.randrange(1, 60))]
        claim = await ledger.claim(keys)
        deferred = [key for held in claim.deferred.values() for key in held]
        assert sorted([*claim.granted, *deferred]) == sorted(keys)
        print(json.dumps(["granted", claim.seq, time.monotonic(), claim.granted]), flush=True)
        await asyncio.sleep(draw.random() * 0.01)
        if claim.seq is not None and draw.random() < float(finish):
            print(json.dumps(["finished", claim.seq, time.monotonic(), []]), flush=True)
            await ledger.finish(claim)
        if draw.random() < 0.1:
            await ledger.sweep(keep_s=30)
    print(json.dumps(["end", None, 0, []]), flush=True)
    sys.stdin.read()

asyncio.run(main(*sys.argv[1:]))
"""


def kill_a_writer(store: Store, weights: str, resolution: str, prefix: str, after_s: float) -> list[str]:
    """Start a writer, kill it, and return the keys whose rows it had seen acknowledged."""
    command = [sys.executable, "-c", WRITER, str(store.path), weights, resolution, prefix]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        first = "".join(child.stdout.readline() for _ in range(25))
        time.sleep(after_s)
        child.send_signal(signal.SIGKILL)
        lines = first + child.stdout.read()
    assert child.returncode == -signal.SIGKILL
    return [line for line in lines.splitlines() if len(line) == 64]


def check_kills(store: Store, weights: str, resolution: str, kills: int, seed: int) -> None:
    draw = random.Random(seed)
    acknowledged: list[str] = []
    answers = store.answers(weights, resolution)
    for n in range(kills):
        acknowledged += kill_a_writer(store, weights, resolution, f"{n:02x}", draw.random() * 0.2)
        answers.refresh()
        for seen in (answers, store.answers(weights, resolution)):
            assert seen.owed(acknowledged) == []
        if n % 3 == 1:
            store.compact(weights)
    assert len(acknowledged) > 20 * kills
    read = store.answers(weights, resolution).read(acknowledged)
    assert len(read) == len(acknowledged)
    assert all(isinstance(a, Response) and a.text == "x" * (int(key[2:], 16) % 700) for key, a in read.items())
    for _ in range(20):
        store.compact(weights)
        if store.summary()[0].segments == 0:
            break
        time.sleep(0.5)
    assert store.summary()[0].segments == 0, "what killed writers left is compacted too"
    assert store.answers(weights, resolution).owed(acknowledged) == []


def test_what_was_acknowledged_survives_kill_9(store: Store, weights: str, resolution: str) -> None:
    check_kills(store, weights, resolution, kills=2, seed=1)


@pytest.mark.slow
def test_what_was_acknowledged_survives_many_kills(store: Store, weights: str, resolution: str) -> None:
    check_kills(store, weights, resolution, kills=15, seed=2)


def test_cut_back_to_the_last_fsync(
    store: Store, weights: str, resolution: str, owner: Owner, response: Callable[..., Response], directory: Path
) -> None:
    """A machine that crashes keeps what was fsynced and any prefix, or NULs, of what was written after it."""
    synced = 0

    def fsync(fd: int) -> None:
        nonlocal synced
        synced = os.fstat(fd).st_size
        os.fsync(fd)

    acknowledged: list[Response] = []

    async def fill() -> None:
        async with store.writer(weights, resolution, owner=owner, fsync=fsync) as writer:
            for n in range(10):
                answer = response(n, text="x" * 37 * n)
                await writer.append(answer)
                acknowledged.append(answer)

    asyncio.run(fill())
    (segment,) = directory.glob("*.jsonl")
    whole = segment.read_bytes()
    assert len(whole) == synced
    late = rows.line(rows.answer_row(response("late"), resolution, 1_700_000_000_000_000))
    expected = {a.key: a for a in acknowledged}
    for tail in (late[:100], late[:1], bytes(200), late[:50] + bytes(100), bytes(10) + late):
        segment.write_bytes(whole + tail)
        answers = store.answers(weights, resolution)
        assert answers.read([*expected, response("late").key]).items() >= expected.items()
        assert sum(d.bytes for d in answers.damage) == len(tail.removesuffix(late))


def check_claims(store: Store, weights: str, processes: int, rounds: int, finish: float) -> int:
    """No key is ever held twice: from when a claim is granted until its owner sets out to finish it."""
    arguments = [str(store.path), weights]
    children = [
        subprocess.Popen(
            [sys.executable, "-c", CLAIMER, *arguments, str(seed), str(rounds), str(finish)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for seed in range(processes)
    ]
    granted: dict[int, tuple[float, list[str]]] = {}
    finished: dict[int, float] = {}
    for child in children:
        assert child.stdout is not None
        for line in child.stdout:
            what, seq, when, keys = json.loads(line)
            if what == "end":
                break
            if what == "finished":
                finished[seq] = when
            elif seq is not None:
                assert seq not in granted, "a number was used twice"
                granted[seq] = (when, keys)
        else:
            pytest.fail("a claimer died")
    for child in children:
        child.communicate("")
        assert child.returncode == 0
    assert sorted(granted) == list(range(1, len(granted) + 1))
    holds: dict[str, list[tuple[float, float, int]]] = {}
    for seq, (start, keys) in granted.items():
        for key in keys:
            holds.setdefault(key, []).append((start, finished.get(seq, float("inf")), seq))
    for times in holds.values():
        times.sort()
        for (_, end, first), (start, _, second) in itertools.pairwise(times):
            assert end <= start, f"claims {first} and {second} held the same key"
    return len(granted)


def test_processes_that_claim_at_once_never_hold_the_same_key(store: Store, weights: str) -> None:
    assert check_claims(store, weights, processes=3, rounds=25, finish=0.9) > 20


@pytest.mark.slow
def test_many_processes_claim_for_long(store: Store, weights: str) -> None:
    # How many are granted depends on how busy the machine is; that none overlap does not.
    assert check_claims(store, weights, processes=8, rounds=80, finish=0.99) > 80
