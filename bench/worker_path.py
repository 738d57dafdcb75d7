"""Proctor's own worker in one process: recording in, journal out, and what it costs. A program of its own per run.

The real worker (`worker.shift`: session, feed, engine, client, journal) on a recorded native task and a server that
runs already, told by files as `proctor run` tells it. Prints one line of JSON: requests a second and milliseconds of
CPU a request of this whole process with all threads, from before the worker reads its files until the last answer is
on disk and the journal is sealed; and the memory on the way.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any, Final

import psutil

from bench.documents import write_documents
from bench.mock_server import MODEL, cpu_seconds
from bench.stages import sampled
from proctor.catalog.native import NativeSource
from proctor.config.spec import EndpointServer, NativeTaskRef, OpenAIEngine
from proctor.processes.garbage import collect_seldom
from proctor.records import Recording, Shard
from proctor.store import Store
from proctor.worker.assignment import Assignment
from proctor.worker.attempt import Attempt
from proctor.worker.job import Job
from proctor.worker.run_directory import RunDirectory
from proctor.worker.shift import Shift

WEIGHTS: Final = "b" * 64
RESOLUTION: Final = "0123456789abcdef"
SHARD: Final = 5_000
"""Requests in a shard: what a plan of 20,000 short ones is cut into."""
SAMPLE_S: Final = 0.25
POINTS: Final = 21


def record(directory: Path, store: Store, *, requests: int, chat: bool) -> Recording:
    """Record the generated task and keep it."""
    write_documents(directory, requests)
    task = NativeTaskRef(native=(str(directory / "bench-native.yaml"),), apply_chat_template=chat)
    (recording,) = NativeSource().record(task)[1]
    store.write_recording(recording)
    return recording


def shards(recording: Recording) -> list[Shard]:
    """The whole recording in its own order."""
    count = len(recording.instances)
    return [
        Shard(
            id=f"s{start:08}",
            model=MODEL,
            items=tuple((recording.fingerprint, i) for i in range(start, min(start + SHARD, count))),
        )
        for start in range(0, count, SHARD)
    ]


def prepare(root: Path, options: argparse.Namespace) -> Shift:
    """Everything that `proctor run` does before its worker begins; the worker."""
    store = Store.open(root / "store")
    recording = record(root / "task", store, requests=options.requests, chat=options.route == "chat")
    directory = RunDirectory(root / "run")
    directory.create()
    directory.write_plan({MODEL: shards(recording)})
    spec = OpenAIEngine(server=EndpointServer(), max_in_flight=options.in_flight, max_length=32_768)
    job = Job(
        run="bench",
        run_directory=str(directory.root),
        store=str(store.path),
        model=MODEL,
        display_name=MODEL,
        weights=WEIGHTS,
        resolution=RESOLUTION,
        engine=spec.model_dump(mode="json"),
        path=options.url,
        served_model=MODEL,
        tokenizer=options.tokenizer,
    )
    job.write(directory.jobs / "mock.json")
    assignment = Assignment(shape="mock", jobs=("mock.json",), costs=(1.0,))
    return Shift(directory, assignment, Attempt.here(0, os.environ, None))


async def watched(shift: Shift, seen: list[float]) -> bool:
    """Work to the end; resident megabytes of this process into `seen`, every quarter of a second."""
    process = psutil.Process()

    async def watch() -> None:
        while True:
            seen.append(process.memory_info().rss / 2**20)
            await asyncio.sleep(SAMPLE_S)

    watching = asyncio.create_task(watch())
    try:
        return await shift.work()
    finally:
        watching.cancel()
        seen.append(process.memory_info().rss / 2**20)


def measure(root: Path, options: argparse.Namespace) -> dict[str, Any]:
    """One worker over all requests. Raises SystemExit unless all of them are answered."""
    shift = prepare(root, options)
    seen: list[float] = []
    with sampled(options.stacks):
        used, start = cpu_seconds(), time.perf_counter()
        done = asyncio.run(watched(shift, seen))
        took, used = time.perf_counter() - start, cpu_seconds() - used
    if not done or shift.totals.answered != options.requests:
        raise SystemExit(f"{shift.totals.answered} of {options.requests} requests were answered")
    return {
        "requests_per_s": options.requests / took,
        "cpu_ms": 1000 * used / options.requests,
        "rss_mb": [round(seen[(len(seen) - 1) * i // (POINTS - 1)], 1) for i in range(POINTS)],
    }


def main() -> None:
    """Parse, measure, print JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--url", required=True)
    parser.add_argument("--route", choices=("chat", "completions"), default="chat")
    parser.add_argument("--tokenizer", help="directory with tokenizer.json: token ids are sent instead of text")
    parser.add_argument("--stacks", type=Path, help="sample the worker's stacks into this file, for bench.stages")
    parser.add_argument("--in-flight", type=int, default=256)
    parser.add_argument("--requests", type=int, default=20_000)
    options = parser.parse_args()
    collect_seldom()
    with tempfile.TemporaryDirectory(prefix="proctor-bench-") as root:
        print(json.dumps(measure(Path(root), options)))


if __name__ == "__main__":
    main()
