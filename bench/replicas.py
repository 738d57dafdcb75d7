"""Two replicas, of which one becomes five times slower, is killed, and comes back: how near to ideal the whole is.

The replicas are fake servers in processes of their own, with slots and a queue, as real ones have. A replica's
capacity is measured first, with enough in flight to keep its slots full. Ideal is the time in which the capacities
that were there, moment by moment, add up to the work: no client can be faster. Every answer is compared with what it
must be. `python -m bench.replicas --json FILE`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.request import urlopen

from bench.machine import heading, machine, versions
from bench.spread import spread
from proctor.infer.client import Client, Reply
from proctor.infer.server import Backend
from proctor.testing import ServerOptions
from proctor.testing.answers import Answerer, prompts_of

SLOTS: Final = 16
FIXED_S: Final = 0.05
RANDOM_S: Final = 0.05
"""Median of the log-normal part of a completion's time."""
SLOWER: Final = 5.0
CALIBRATION: Final = 600
SLOW_AT, KILL_AT, BACK_AT = 8.0, 16.0, 26.0
"""Seconds from the start at which one replica becomes slow, is killed, and is started again."""
PATH: Final = "/v1/completions"


class Replica:
    """One server process, always at the same port once it has one."""

    def __init__(self, directory: Path, name: str, seed: int) -> None:
        self._port_file = directory / f"{name}.port"
        self._seed = seed
        self._process: asyncio.subprocess.Process | None = None
        self.port = 0

    async def start(self) -> None:
        """Until it listens."""
        self._port_file.unlink(missing_ok=True)
        command = [sys.executable, "-m", "proctor.testing.server", "--port", str(self.port)]
        command += ["--port-file", str(self._port_file), "--metrics", "vllm", "--seed", str(self._seed)]
        command += ["--slots", str(SLOTS), "--fixed-s", str(FIXED_S), "--lognormal-s", str(RANDOM_S)]
        self._process = await asyncio.create_subprocess_exec(*command, stdout=subprocess.DEVNULL)
        self.port = await asyncio.to_thread(self._wait_for_port)

    async def kill(self) -> None:
        """As the system does it: without a word."""
        if self._process is not None:
            self._process.kill()
            await self._process.wait()
            self._process = None

    def _wait_for_port(self) -> int:
        while not self._port_file.exists():
            time.sleep(0.005)
        return int(self._port_file.read_text())

    def slow(self, factor: float) -> None:
        with urlopen(f"http://127.0.0.1:{self.port}/__slowness/{factor}"):
            pass

    @property
    def backend(self) -> Backend:
        return Backend(url=f"http://127.0.0.1:{self.port}")


def body(number: int) -> dict[str, Any]:
    """One request; each number is another one."""
    return {"prompt": f"Question {number}:", "max_tokens": 4, "temperature": 0}


def right(numbers: range) -> list[Any]:
    """The choices that a server must give."""
    answerer = Answerer(ServerOptions())
    return [answerer.completion(body(n), prompts_of(body(n)), chat=False).body["choices"] for n in numbers]


async def capacity(replica: Replica) -> float:
    """Completions a second with the slots kept full and no search for how that is done."""
    todo: Iterator[int] = iter(range(CALIBRATION))
    times: list[float] = []
    async with Client(lambda: [replica.backend], max_in_flight=3 * SLOTS) as client:

        async def ask() -> None:
            for number in todo:
                await client.post(PATH, body(-number))
                times.append(time.perf_counter())

        # Past the ramp of the window and before the drain at the end.
        await asyncio.gather(*(ask() for _ in range(3 * SLOTS)))
    first, last = CALIBRATION // 3, CALIBRATION - 3 * SLOTS
    return (last - first) / (times[last] - times[first])


async def ask_all(client: Client, count: int) -> list[Reply]:
    """Every request once, with a little more under way than may be in flight, as the engine does."""
    found: dict[int, Reply] = {}
    pending: set[asyncio.Task[None]] = set()

    async def ask(number: int) -> None:
        reply = await client.post(PATH, body(number), hedge=True)
        assert isinstance(reply, Reply), reply
        found[number] = reply

    for number in range(count):
        while len(pending) > client.wanted * 3 // 2:
            _, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
        pending.add(asyncio.create_task(ask(number)))
    client.tail()
    await asyncio.gather(*pending)
    return [found[number] for number in range(count)]


@dataclass(slots=True)
class Events:
    """When it happened, in seconds from the start."""

    slow: float = float("inf")
    killed: float = float("inf")
    back: float = float("inf")


async def disturb(replica: Replica, start: float, events: Events) -> None:
    await asyncio.sleep(SLOW_AT - (time.perf_counter() - start))
    await asyncio.to_thread(replica.slow, SLOWER)
    events.slow = time.perf_counter() - start
    await asyncio.sleep(KILL_AT - (time.perf_counter() - start))
    await replica.kill()
    events.killed = time.perf_counter() - start
    await asyncio.sleep(BACK_AT - (time.perf_counter() - start))
    await replica.start()
    events.back = time.perf_counter() - start


def ideal(count: int, rates: tuple[float, float], events: Events) -> float:
    """Seconds in which the capacities that were there add up to `count`."""
    steady, other = rates
    phases = [
        (events.slow, steady + other),
        (events.killed, steady + other / SLOWER),
        (events.back, steady),
        (float("inf"), steady + other),
    ]
    start = 0.0
    for end, rate in phases:
        if count <= (end - start) * rate:
            break
        count -= int((end - start) * rate)
        start = end
    return start + count / rate


async def run(count: int, seed: int) -> dict[str, Any]:
    """One show."""
    with tempfile.TemporaryDirectory() as directory:
        replicas = [Replica(Path(directory), f"r{n}", 2 * seed + n) for n in range(2)]
        try:
            for replica in replicas:
                await replica.start()
            rates = (await capacity(replicas[0]), await capacity(replicas[1]))
            expected = right(range(count))
            events = Events()
            backends = [r.backend for r in replicas]
            async with Client(lambda: backends) as client:
                start = time.perf_counter()
                disturbing = asyncio.create_task(disturb(replicas[1], start, events))
                replies = await ask_all(client, count)
                took = time.perf_counter() - start
                load = client.load()
                disturbing.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await disturbing
        finally:
            for replica in replicas:
                await replica.kill()
    assert [r.value["choices"] for r in replies] == expected, "a wrong answer"
    best = ideal(count, rates, events)
    return {
        "seconds": round(took, 3),
        "ideal": round(best, 3),
        "ratio": round(took / best, 4),
        "capacities": [round(r, 1) for r in rates],
        "events": {"slow": events.slow, "killed": events.killed, "back": events.back},
        "most_attempts": max(r.attempts for r in replies),
        "attempts": sum(r.attempts for r in replies),
        "answered": [entry.answered for entry in load.values()],
        "hedged": sum(entry.hedged for entry in load.values()),
        "limits": [f"{entry.limit} ({entry.why})" for entry in load.values()],
    }


def main() -> None:
    """The program."""
    parser = argparse.ArgumentParser(prog="python -m bench.replicas", description=__doc__)
    parser.add_argument("--requests", type=int, default=8000)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", type=Path)
    told = parser.parse_args()
    what, packages = machine(), versions("aiohttp", "orjson")
    print(heading(what, packages))
    runs: list[dict[str, Any]] = []
    for seed in range(told.runs):
        runs.append(asyncio.run(run(told.requests, seed)))
        print(json.dumps(runs[-1]))
    ratio = spread([r["ratio"] for r in runs])
    print(f"\n{told.requests} requests, whole time over ideal: {ratio}")
    if told.json is not None:
        result = {"machine": what, "versions": packages, "requests": told.requests, "ratio": ratio.as_json()}
        told.json.write_text(json.dumps(result | {"runs": runs}, indent=1) + os.linesep)


if __name__ == "__main__":
    main()
