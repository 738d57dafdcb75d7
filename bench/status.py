"""`proctor status` and `proctor plan` as whole commands, over two stores.

`responses`: --rows responses of one model, half of them compacted. `shards`: a run of --shards shards, a hundred
checkpoints that are each half through with theirs, with the events that --workers workers left in --minutes minutes:
every half second each says how far it is. Of the answers one model's are real; the others have hard links to its part.

Prints wall time, time on a processor and peak memory; --json FILE writes the numbers.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import struct
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path

from bench.machine import heading, machine, versions
from bench.store import TEXT
from proctor.api.context import RunContext
from proctor.api.foreseeing import keep_forecast
from proctor.api.planning import make_plan
from proctor.api.recording import _tasks_digest  # pyright: ignore[reportPrivateUsage]
from proctor.api.targets import resolve_targets
from proctor.records import Instance, Kind, Recording, Request, Response, Suite
from proctor.store import Owner, Store
from proctor.worker.events import INTERVAL_S, Event

RUN = """
name: million
store: ./store
runs: ./runs
models: {m: {path: ./model}}
tasks: [{native: demo:opposites}]
engine: {type: fake}
"""
SWEEP = RUN.replace("million", "sweep").replace(
    "{path: ./model}", "{path: ./models, checkpoints: {pattern: 'checkpoint_{step}'}}"
)
TASKS = 10
MODELS = 100
REQUESTS = 10
"""Of each shard."""


def record(store: Store, number: int, documents: int) -> Recording:
    """A recording of `documents` generations."""
    instances: list[Instance] = []
    for n in range(documents):
        text = f"task {number} document {n} {TEXT}"
        request = Request(kind=Kind.GENERATE, text=text, arguments='{"max_gen_toks":64}')
        instances.append(Instance(request=request, key=request.key, doc_id=n, index=0))
    fingerprint = f"{number:064x}"
    recording = Recording(
        fingerprint=fingerprint,
        source="native",
        source_version="1",
        task=f"task{number}",
        task_version="1",
        num_fewshot=0,
        settings="{}",
        instances=tuple(instances),
        documents="[]",
    )
    store.write_recording(recording)
    return recording


async def answer(store: Store, weights: str, resolution: str, recording: Recording) -> None:
    """Answer every request of a recording, in rows of about 600 bytes."""
    async with store.writer(weights, resolution, owner=Owner.here(run="bench")) as writer:
        for start in range(0, len(recording.instances), 10_000):
            await writer.append_many(
                [
                    Response(
                        key=i.key,
                        physical_key=i.key,
                        text=TEXT[:199],
                        finish_reason="stop",
                        prompt_tokens=100,
                        completion_tokens=40,
                        engine_id="0123456789abcdef",
                        latency_s=0.25,
                        created=1_800_000_000.5,
                    )
                    for i in recording.instances[start : start + 10_000]
                ]
            )


def build(root: Path, rows: int) -> Path:
    """A run whose tasks have `rows` requests, all answered, half of the answers compacted."""
    write_model(root / "model", 0)
    config = root / "run.yaml"
    config.write_text(RUN)
    context = RunContext.open(config)
    store = context.store(create=True)
    (target,) = resolve_targets(context, store)
    fingerprints: list[str] = []
    for number in range(TASKS):
        recording = record(store, number, rows // TASKS)
        fingerprints.append(recording.fingerprint)
        asyncio.run(answer(store, target.weights, target.resolution, recording))
        if number == TASKS // 2 - 1:
            store.compact(target.weights)
    write_suite(context, store, fingerprints)
    return config


def write_model(directory: Path, number: int) -> None:
    """A model of one number."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text("{}")
    header = b'{"t":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    weights = struct.pack("<Q", len(header)) + header + struct.pack("<f", number)
    (directory / "model.safetensors").write_bytes(weights)


def write_suite(context: RunContext, store: Store, fingerprints: list[str]) -> Suite:
    """What the run asks."""
    suite = Suite(
        id="5" * 64,
        source="native",
        names=("bench",),
        num_fewshot=0,
        recordings=tuple(fingerprints),
        settings="{}",
    )
    store.write_suite(suite)
    context.directory.create()
    kept = {"tasks": _tasks_digest(context), "suites": [suite.id]}
    context.directory.write(context.directory.suites, json.dumps(kept))
    return suite


def build_shards(root: Path, shards: int, workers: int, minutes: float) -> Path:
    """A run that was planned and is half answered, evenly: of every shard something is owed."""
    for number in range(MODELS):
        write_model(root / "models" / f"checkpoint_{number}", number)
    each = shards // MODELS
    strategy = f"{{strategy: workers, num_worker: {each}, num_split: {each}, min_task_size: 1, split: true}}"
    config = root / "run.yaml"
    config.write_text(SWEEP + f"plan: {strategy}\n")
    context = RunContext.open(config)
    store = context.store(create=True)
    targets = resolve_targets(context, store)
    recording = record(store, 0, each * REQUESTS)
    suite = write_suite(context, store, [recording.fingerprint])
    plan = make_plan(context, store, targets, [suite])
    context.directory.write_plan({m.model: m.shards for m in plan.models})
    keep_forecast(context, plan)
    first, *others = targets
    half = replace(recording, instances=recording.instances[::2])
    asyncio.run(answer(store, first.weights, first.resolution, half))
    store.compact(first.weights)
    place = store.path / "weights"
    for target in others:
        for path in (place / first.weights).glob("*.parquet"):
            os.link(path, place / target.weights / path.name)
    context.directory.events.mkdir(exist_ok=True)
    for number in range(workers):
        write_events(context.directory.events / f"w{number}.jsonl", targets[number % MODELS].id, minutes)
    make_plan(context, store, targets, [suite])  # whoever looks first at new parts writes their summary
    return config


def write_events(path: Path, model: str, minutes: float) -> None:
    """What one worker says until now: every half second, how far it is."""
    count = round(minutes * 60 / INTERVAL_S)
    begin = time.time() - count * INTERVAL_S
    with path.open("w", encoding="utf-8") as file:
        for n in range(count):
            event = Event(
                worker=path.stem, model=model, phase="starting" if n == 0 else "asking", time=begin + n * INTERVAL_S,
                requests=10 * n, prompt_tokens=1000 * n, completion_tokens=400 * n, in_flight=64,
            )  # fmt: skip
            file.write(json.dumps(asdict(event)) + "\n")


def measure(verb: str, config: Path) -> dict[str, float]:
    """Wall time, time on a processor and peak memory of one command."""
    start = time.perf_counter()
    pid = os.posix_spawn(
        sys.executable,
        [sys.executable, "-m", "proctor", verb, str(config)],
        os.environ,
        file_actions=[(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)],
    )
    _, status, usage = os.wait4(pid, 0)
    if status:
        raise SystemExit(f"proctor {verb} ended with status {status}")
    took = time.perf_counter() - start
    return {"wall_s": took, "cpu_s": usage.ru_utime + usage.ru_stime, "peak_mb": usage.ru_maxrss / 1024}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--rows", type=int, default=1_000_000, help="0: without this case")
    parser.add_argument("--shards", type=int, default=100_000, help="0: without this case")
    parser.add_argument("--workers", type=int, default=32)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    about = machine()
    print(heading(about, versions("proctor", "numpy", "pyarrow")))
    numbers: dict[str, dict[str, list[dict[str, float]]]] = {}
    for case, size in (("responses", options.rows), ("shards", options.shards)):
        if not size:
            continue
        with tempfile.TemporaryDirectory(prefix="proctor-bench-") as name:
            root = Path(name)
            config = build(root, size) if case == "responses" else build_shards(
                root, size, options.workers, options.minutes
            )  # fmt: skip
            for verb in ("status", "plan"):
                found = numbers.setdefault(case, {})[verb] = [measure(verb, config) for _ in range(options.runs)]
                walls = sorted(n["wall_s"] for n in found)
                cpu = sorted(n["cpu_s"] for n in found)[len(found) // 2]
                peak = max(n["peak_mb"] for n in found)
                print(f"{verb:8} {size:>9,} {case:9}  median {walls[len(walls) // 2]:6.2f} s", end="  ")
                print(f"({walls[0]:.2f} to {walls[-1]:.2f})  cpu {cpu:.2f} s  peak {peak:,.0f} MB", flush=True)
    if options.json:
        options.json.write_text(
            json.dumps({"machine": about} | vars(options) | {"json": None, "cases": numbers}, indent=1)
        )


if __name__ == "__main__":
    main()
