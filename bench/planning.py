"""Planning --models checkpoints x --tasks tasks of --requests requests: time and peak memory of one process.

Three stores. `empty`: no model has answers. `half the models`: every second model is answered in full. `half of
each`: every model has half of its answers, each another half, so that no two owe the same; this is the worst case, its
cost is for each model (--different measures fewer). The recordings are real ones, written by the store. Of the answered
models the first one's store is real: --requests x --tasks responses, written, compacted and read by the store; the
others are directories of their own with hard links to its part, so the disk holds the rows once, and each has its own
copy of the summary file, which planning writes when it first opens a model (`first look`, measured on one model). For
`half of each` the answers are not on disk at all: the summaries are made up, one random half for each model, beside an
empty part.

What is measured is `make_plan`, with the reading of all recordings and summaries, and writing `plan.bits`.
Resolving models (reading weight files) is not in it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from bench.machine import heading, machine, versions
from bench.status import RUN, answer, record
from proctor.api.context import RunContext
from proctor.api.planning import make_plan
from proctor.api.targets import Target, resolve_targets
from proctor.records import Suite
from proctor.store import Store, completion

CASES = ("empty", "half the models", "half of each")


def prepare(root: Path, tasks: int, requests: int) -> None:
    """A model, a run and its recordings."""
    (root / "model").mkdir()
    (root / "model" / "config.json").write_text("{}")
    header = b'{"t":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    (root / "model" / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 4)
    (root / "run.yaml").write_text(RUN)
    store = RunContext.open(root / "run.yaml").store(create=True)
    for number in range(tasks):
        record(store, number, requests)


def targets_of(context: RunContext, store: Store, models: int) -> list[Target]:
    """The one model, as so many checkpoints with weights of their own."""
    (one,) = resolve_targets(context, store)
    return [replace(one, id=f"m@{i}", weights=f"{i:064x}") for i in range(models)]


def directory(store: Store, target: Target) -> Path:
    return store.path / "weights" / target.weights


def answered_models(context: RunContext, store: Store, targets: list[Target], fingerprints: list[str]) -> float:
    """Answer one model in full, link its part into the others, and look at it once: seconds of that look."""
    first = targets[0]
    for fingerprint in fingerprints:
        asyncio.run(answer(store, first.weights, first.resolution, store.read_recording(fingerprint)))
    store.compact(first.weights)
    outlines = {fp: store.recording_outline(fp) for fp in fingerprints}
    start = time.perf_counter()
    store.completion(first.weights, first.resolution, outlines, measure=True)
    took = time.perf_counter() - start
    for target in targets[1:]:
        directory(store, target).mkdir(parents=True)
        for path in directory(store, first).glob("*.parquet"):
            os.link(path, directory(store, target) / path.name)
        for path in directory(store, first).glob("done-*.bits"):
            (directory(store, target) / path.name).write_bytes(path.read_bytes())
    return took


def random_halves(store: Store, targets: list[Target], fingerprints: list[str]) -> None:
    """Summaries that say that a random half of each model is answered."""
    sizes = {fp: len(store.recording_outline(fp)) for fp in fingerprints}
    rng = np.random.default_rng(3)
    for target in targets:
        place = directory(store, target)
        place.mkdir(parents=True)
        (place / "part-none.parquet").write_bytes(b"")
        half = {fp: np.packbits(rng.integers(0, 2, n, np.uint8)) for fp, n in sizes.items()}
        found = completion.Completion(
            answered=half, failed={fp: np.zeros_like(b) for fp, b in half.items()}, rows=sum(sizes.values()) // 2,
            lengths={fingerprints[0]: completion.AnswerLengths(answers=1, characters=100, prompt_tokens=25)},
        )  # fmt: skip
        token = completion._token(place)  # pyright: ignore[reportPrivateUsage]
        assert token is not None
        packed = completion._packed(token, found)  # pyright: ignore[reportPrivateUsage]
        (place / f"done-{target.resolution}.bits").write_bytes(packed)


def peak_mb() -> int:
    """Peak memory of this program; what getrusage says may be that of the program which started it."""
    status = Path("/proc/self/status").read_text()
    return round(int(status.split("VmHWM:")[1].split()[0]) / 1024)


def measure(root: Path, models: int) -> dict[str, float]:
    """Plan, and write the plan, in this process."""
    context = RunContext.open(root / "run.yaml")
    store = context.store(create=False)
    targets = targets_of(context, store, models)
    fingerprints = sorted(p.stem for p in (store.path / "requests").iterdir())
    suite = Suite(
        id="5" * 64, source="native", names=("bench",), num_fewshot=0, recordings=tuple(fingerprints), settings="{}"
    )
    context.directory.create()
    start, began = time.perf_counter(), time.process_time()
    plan = make_plan(context, store, targets, [suite])
    forecast = plan.forecast
    planned, cpu = time.perf_counter(), time.process_time() - began
    context.directory.write_plan({m.model: m.shards for m in plan.models if m.shards})
    written = time.perf_counter()
    context.directory.read_shards(plan.models[-1].model)
    return {
        "plan_s": round(planned - start, 2),
        "write_s": round(written - planned, 2),
        "read_one_s": round(time.perf_counter() - written, 2),
        "cpu_s": round(cpu, 2),
        "peak_mb": peak_mb(),
        "owed": plan.owed,
        "shards": forecast.shards,
        "plan_file_mb": round(context.directory.plan.stat().st_size / 1e6, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=int, default=1000)
    parser.add_argument("--tasks", type=int, default=60)
    parser.add_argument("--requests", type=int, default=20_000, help="of each task")
    parser.add_argument("--different", type=int, help="models in `half of each` (default: all)")
    parser.add_argument("--cases", nargs="*", default=CASES, choices=CASES)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure, options.models)))
        return
    about, results = machine(), dict[str, dict[str, float]]()
    print(heading(about, versions("proctor", "numpy", "pyarrow")))
    with tempfile.TemporaryDirectory(prefix="proctor-bench-") as name:
        root = Path(name)
        prepare(root, options.tasks, options.requests)
        context = RunContext.open(root / "run.yaml")
        store = context.store(create=False)
        targets = targets_of(context, store, options.models)
        fingerprints = sorted(p.stem for p in (store.path / "requests").iterdir())
        for case in options.cases:
            extra: dict[str, float] = {}
            models = options.models
            if case == "half the models":
                extra["first_look_s"] = round(answered_models(context, store, targets[::2], fingerprints), 2)
            elif case == "half of each":
                (store.path / "weights").rename(root / "before")
                models = options.different or options.models
                random_halves(store, targets[:models], fingerprints)
            command = [sys.executable, "-m", "bench.planning", "--measure", str(root), "--models", str(models)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            results[case] = {"models": models} | json.loads(done.stdout) | extra
            print(f"{case:16}" + "  ".join(f"{k} {v:,}" for k, v in results[case].items()), flush=True)
    if options.json:
        options.json.write_text(json.dumps({"machine": about, "cases": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
