"""Proctor's own worker in one process: recording in, journal out, and what it costs. A program of its own per run.

The real Session, Feed, Store, Writer and engine, put together as `worker.shift` does, on a recorded native task and a
server that runs already. Prints one line of JSON: requests a second and milliseconds of CPU a request, of this whole
process with all threads, from the start of the session to the last durable answer; and the memory on the way.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import tempfile
import time
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any, Final

import psutil

from bench.documents import write_documents
from bench.mock_server import MODEL, cpu_seconds
from bench.stages import sampled
from proctor.catalog.native import NativeSource
from proctor.config.spec import EndpointServer, NativeTaskRef, OpenAIEngine
from proctor.records import Recording, Shard
from proctor.store import Owner, Store
from proctor.worker.build import engine_for, server_for
from proctor.worker.events import EventLog
from proctor.worker.job import Job
from proctor.worker.session import Session

WEIGHTS: Final = "b" * 64
RESOLUTION: Final = "0123456789abcdef"
SHARD: Final = 5_000
"""Requests in a shard: what a plan of 20,000 short ones is cut into."""
SAMPLE_S: Final = 0.25


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


def job(root: Path, url: str, *, in_flight: int, tokenizer: str | None) -> Job:
    """What a worker would be told."""
    spec = OpenAIEngine(server=EndpointServer(), max_in_flight=in_flight, max_length=32_768)
    return Job(
        run="bench",
        run_directory=str(root / "run"),
        store=str(root / "store"),
        model=MODEL,
        display_name=MODEL,
        weights=WEIGHTS,
        resolution=RESOLUTION,
        engine=spec.model_dump(mode="json"),
        path=url,
        served_model=MODEL,
        tokenizer=tokenizer,
    )


@contextlib.asynccontextmanager
async def memory(session: Session) -> AsyncGenerator[list[tuple[int, float]]]:
    """Pairs of answers and resident megabytes, every quarter of a second."""
    process = psutil.Process()
    seen: list[tuple[int, float]] = []

    def look() -> None:
        seen.append((session.outcome.answered, process.memory_info().rss / 2**20))

    async def watch() -> None:
        while True:
            look()
            await asyncio.sleep(SAMPLE_S)

    watching = asyncio.create_task(watch())
    try:
        yield seen
    finally:
        watching.cancel()
        look()


async def measure(root: Path, options: argparse.Namespace) -> dict[str, Any]:
    """One session over all requests. Raises SystemExit unless all of them are answered."""
    store = Store.open(root / "store")
    chat = options.route == "chat"
    todo = shards(record(root / "task", store, requests=options.requests, chat=chat))
    told = job(root, options.url, in_flight=options.in_flight, tokenizer=options.tokenizer)
    owner = Owner.here(run="bench")
    async with contextlib.AsyncExitStack() as stack:
        events = stack.enter_context(EventLog(root / "events.jsonl", worker="bench", model=MODEL))
        server = server_for(told, worker="bench")
        if server is not None:
            await stack.enter_async_context(server)
        engine = await stack.enter_async_context(engine_for(told, server, worker="bench"))
        writer = await stack.enter_async_context(store.writer(WEIGHTS, RESOLUTION, owner=owner))
        session = Session(
            store=store,
            answers=store.answers(WEIGHTS, RESOLUTION),
            ledger=store.ledger(WEIGHTS, owner=owner, segment=writer.name),
            writer=writer,
            engine=engine,
            server=server,
            events=events,
        )
        stack.enter_context(sampled(options.stacks))
        async with memory(session) as seen:
            used, start = cpu_seconds(), time.perf_counter()
            outcome = await session.work(todo)
            took, used = time.perf_counter() - start, cpu_seconds() - used
    if outcome.answered != options.requests or outcome.left:
        raise SystemExit(f"{outcome.answered} of {options.requests} requests were answered")
    return {
        "requests_per_s": options.requests / took,
        "cpu_ms": 1000 * used / options.requests,
        "rss_mb": thinned(seen),
    }


def thinned(seen: list[tuple[int, float]], points: int = 21) -> list[tuple[int, float]]:
    """The first sample at or after each equal share of the answers, and the last."""
    last = seen[-1][0]
    wanted = [last * i // (points - 1) for i in range(points)]
    return [(n, round(mb, 1)) for n, mb in dict(next(s for s in seen if s[0] >= w) for w in wanted).items()]


def main() -> None:
    """Parse, measure, print JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--url", required=True)
    parser.add_argument("--route", choices=("chat", "completions"), default="chat")
    parser.add_argument("--tokenizer", help="directory with tokenizer.json: token ids are sent instead of text")
    parser.add_argument("--stacks", type=Path, help="sample the session's stacks into this file, for bench.stages")
    parser.add_argument("--in-flight", type=int, default=256)
    parser.add_argument("--requests", type=int, default=20_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="proctor-bench-") as root:
        print(json.dumps(asyncio.run(measure(Path(root), options))))


if __name__ == "__main__":
    main()
