"""`proctor status` and `proctor plan` over a store of --rows responses, half of them compacted, as whole commands.

Prints a table of wall time and peak memory; --json FILE writes the numbers.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
import time
from pathlib import Path

from bench.store import TEXT
from proctor.api.context import RunContext
from proctor.api.recording import _tasks_digest  # pyright: ignore[reportPrivateUsage]
from proctor.api.targets import resolve_targets
from proctor.records import Instance, Kind, Recording, Request, Response, Suite
from proctor.store import Owner, Store

RUN = """
name: million
store: ./store
runs: ./runs
models: {m: {path: ./model}}
tasks: [{native: demo:opposites}]
engine: {type: fake}
"""
TASKS = 10


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
    (root / "model").mkdir()
    (root / "model" / "config.json").write_text("{}")
    header = b'{"t":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    (root / "model" / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 4)
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
    return config


def measure(verb: str, config: Path) -> dict[str, float]:
    """Wall time and peak memory of one command."""
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
    return {"wall_s": time.perf_counter() - start, "peak_mb": usage.ru_maxrss / 1024}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    numbers: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory(prefix="proctor-bench-") as name:
        config = build(Path(name), options.rows)
        for verb in ("status", "plan"):
            numbers[verb] = [measure(verb, config) for _ in range(options.runs)]
            walls = sorted(n["wall_s"] for n in numbers[verb])
            peak = max(n["peak_mb"] for n in numbers[verb])
            print(f"{verb:8} {options.rows:>9,} responses  median {walls[len(walls) // 2]:6.2f} s", end="  ")
            print(f"({walls[0]:.2f} to {walls[-1]:.2f})  peak {peak:,.0f} MB")
    if options.json:
        options.json.write_text(json.dumps({"rows": options.rows, **numbers}, indent=1))


if __name__ == "__main__":
    main()
