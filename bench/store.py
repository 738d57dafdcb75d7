"""How fast the store appends, opens and answers. Prints a table; --json FILE writes the numbers.

Appending: rows a second with many concurrent appenders, each waiting until its row is on disk, with the disk's
own fsync and with 5 and 50 ms added to each, as on shared file systems. Opening: a store of --rows responses,
half of it compacted, and what all keys of it owe, in a process of its own, with that process's peak memory.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from proctor.records import Response
from proctor.store import Owner, Store

RESOLUTION = "0123456789abcdef"
WEIGHTS = "f" * 64
ROW_BYTES = 600
TEXT = "The quick brown fox jumps over the lazy dog, says the model, and goes on. " * 5


def response(number: int) -> Response:
    """A response whose line is about `ROW_BYTES` long."""
    key = hashlib.sha256(b"%d" % number).hexdigest()
    return Response(
        key=key,
        physical_key=hashlib.sha256(key.encode()).hexdigest(),
        text=f"{number} {TEXT}"[:199],
        finish_reason="stop",
        prompt_tokens=100,
        completion_tokens=40,
        engine_id="0123456789abcdef",
        latency_s=0.25,
        created=1_800_000_000.5,
    )


async def append(root: Path, rows: int, appenders: int, delay_s: float) -> dict[str, float]:
    """Rows a second until the last one is acknowledged."""
    fsyncs = 0

    def fsync(fd: int) -> None:
        nonlocal fsyncs
        fsyncs += 1
        os.fsync(fd)
        time.sleep(delay_s)

    store = Store.open(root)
    answers = [response(n) for n in range(rows)]
    todo = iter(answers)

    async def appender() -> None:
        for answer in todo:
            await writer.append(answer)

    async with store.writer(WEIGHTS, RESOLUTION, owner=Owner.here(run="bench"), fsync=fsync) as writer:
        start = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for _ in range(appenders):
                group.create_task(appender())
        took = time.perf_counter() - start
    size = sum(path.stat().st_size for path in (root / "weights" / WEIGHTS).glob("*.jsonl"))
    return {
        "rows_per_s": round(rows / took),
        "mean_row_bytes": round(size / rows),
        "fsyncs": fsyncs,
        "seconds": round(took, 3),
    }


async def fill(store: Store, first: int, last: int) -> None:
    """Store responses first..last-1."""
    async with store.writer(WEIGHTS, RESOLUTION, owner=Owner.here(run="bench")) as writer:
        for start in range(first, last, 10_000):
            await writer.append_many([response(n) for n in range(start, min(start + 10_000, last))])


def build(root: Path, rows: int) -> dict[str, float]:
    """A store of `rows` responses, half compacted; seconds for the compaction."""
    store = Store.open(root)
    asyncio.run(fill(store, 0, rows // 2))
    start = time.perf_counter()
    compacted = store.compact(WEIGHTS)
    took = time.perf_counter() - start
    asyncio.run(fill(store, rows // 2, rows))
    return {"compact_s": round(took, 3), "compacted_rows": compacted.rows}


def query(root: Path, rows: int) -> dict[str, float]:
    """Open, ask what is owed, read some, refresh: seconds and peak memory of this process."""
    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    keys = [hashlib.sha256(b"%d" % n).hexdigest() for n in range(rows)]
    start = time.perf_counter()
    store = Store.open(root, create=False)
    answers = store.answers(WEIGHTS, RESOLUTION)
    opened = time.perf_counter()
    owed = answers.owed(keys)
    asked = time.perf_counter()
    answers.refresh()
    refreshed = time.perf_counter()
    read = answers.read(keys[:: max(1, rows // 10_000)])
    done = time.perf_counter()
    summary = store.summary()
    summed = time.perf_counter()
    if owed or summary[0].responses != rows:
        raise SystemExit(f"{len(owed)} of {rows} keys are missing")
    return {
        "open_s": round(opened - start, 3),
        "owed_s": round(asked - opened, 3),
        "refresh_s": round(refreshed - asked, 3),
        f"read_{len(read)}_s": round(done - refreshed, 3),
        "summary_s": round(summed - done, 3),
        "rss_mb_before": round(base / 1024),
        "rss_mb_peak": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
    }


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--rows", type=int, default=1_000_000, help="responses in the store that is opened")
    parser.add_argument("--append-rows", type=int, default=100_000, help="rows appended for each rate")
    parser.add_argument("--appenders", type=int, default=4096, help="concurrent appenders")
    parser.add_argument("--directory", type=Path, help="where to make the stores (default: a temporary directory)")
    parser.add_argument("--json", type=Path, help="write the numbers here")
    parser.add_argument("--query", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.query:
        print(json.dumps(query(options.query, options.rows)))
        return
    root = Path(tempfile.mkdtemp(prefix="proctor-bench-", dir=options.directory))
    results: dict[str, dict[str, float]] = {}
    try:
        for delay_ms in (0, 5, 50):
            name = f"append, fsync + {delay_ms} ms" if delay_ms else "append, fsync as it is"
            results[name] = asyncio.run(
                append(root / f"append-{delay_ms}", options.append_rows, options.appenders, delay_ms / 1000)
            )
            show(name, results[name])
            shutil.rmtree(root / f"append-{delay_ms}")
        results["compact"] = build(root / "big", options.rows)
        show("compact", results["compact"])
        command = [sys.executable, __file__, "--query", str(root / "big"), "--rows", str(options.rows)]
        name = f"open {options.rows} rows"
        results[name] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        show(name, results[name])
    finally:
        shutil.rmtree(root)
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


def show(name: str, numbers: dict[str, float]) -> None:
    """One line of the table."""
    print(f"{name:24}" + "  ".join(f"{key} {value:,}" for key, value in numbers.items()), flush=True)


if __name__ == "__main__":
    main()
