"""Whole runs on a real Slurm cluster (that of the tests: Linux, root): do workers that come and go share the work?

--requests generations whose latencies are log-normal with --sigma, each its own, for --workers workers, each with a
server that works on --slots at a time. The plan cannot foresee a latency: it takes all requests for equal.

`all`: every array element starts. `one pending`: one waits for the whole run, the others do everything. `one late`: it
starts when a third of the work is done.

Bound: what the servers that were there could at best have done, with the start-up that these workers had (the median
from a worker's first line of Python to its first request): (work + Σ (begin + start-up)) / workers, from the first
worker's begin. The makespan ends with the last answer. Prints both, their ratio, what each worker did, and how busy the
machine was: above 50 % the latencies are no longer what the servers were told.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil
from tests.slurm.cluster import Cluster
from tests.slurm.lab import SlurmLab
from tests.slurm.layout import Shape

from bench.machine import heading, machine, versions
from proctor.testing.openai_server import drawn
from proctor.worker.events import Event, read_events

CASES = ("all", "one pending", "one late")
CAP = 32
"""Tokens that may be generated: the plan's guess at a request's cost then is right on average."""


class Busy:
    """How busy the machine and the programs of one directory are, until told to stop."""

    def __init__(self, root: Path) -> None:
        self._root = str(root)
        self._stop = threading.Event()
        self._machine: list[float] = []
        self._own: dict[int, float] = {}
        self._thread = threading.Thread(target=self._watch)
        self._began = time.time()
        self._thread.start()

    def _watch(self) -> None:
        psutil.cpu_percent()
        while not self._stop.wait(2.0):
            self._machine.append(psutil.cpu_percent())
            for process in psutil.process_iter():
                try:
                    if any(self._root in word for word in process.cmdline()):
                        self._own[process.pid] = sum(process.cpu_times()[:2])
                except psutil.Error:
                    continue

    def stop(self) -> dict[str, float]:
        """Shares of the machine, in per cent."""
        self._stop.set()
        self._thread.join()
        seconds = (time.time() - self._began) * (os.cpu_count() or 1)
        return {
            "machine_percent": round(statistics.mean(self._machine), 1),
            "own_percent": round(100 * sum(self._own.values()) / seconds, 1),
        }


def prepare(root: Path, cluster: Cluster, options: argparse.Namespace) -> tuple[SlurmLab, Path, float]:
    """A lab, its run.yaml, and the work in seconds of one server."""
    lab = SlurmLab(root=root, cluster=cluster, latency_s=0.0)
    words = [f"word{i:06d}" for i in range(options.requests)]
    factors = [drawn(lab.digest(word), options.sigma) for word in words]
    # So that the work of one worker takes as long as asked for.
    median_s = options.seconds * options.workers * options.slots / sum(factors)
    lab.server_flags = ["--lognormal-s", f"{median_s:.6f}", "--sigma", str(options.sigma), "--by-prompt"]
    lab.server_flags += ["--slots", str(options.slots), "--metrics", "vllm"]
    task = lab.write_task("words", words)
    task.write_text(task.read_text().replace("max_gen_toks: 8", f"max_gen_toks: {CAP}"))
    engine: dict[str, Any] = {"type": "openai", "server": lab.server() | {"gpus": 0}}
    if options.in_flight:
        engine["max_in_flight"] = options.in_flight
    launch = {"workers": options.workers, "sbatch": {"hold": True, "exclusive": True}}
    config = lab.write_sweep(tasks=[task], launch=launch, engine=engine, plan={"strategy": "balanced"})
    return lab, config, median_s * sum(factors) / options.slots


def finished(lab: SlurmLab) -> int:
    """Answers, as the workers' last words have it."""
    last = [read_events(path)[0][-1:] for path in (lab.root / "runs/run/events").glob("*.jsonl")]
    return sum(e.requests for events in last for e in events)


def measure(case: str, root: Path, cluster: Cluster, options: argparse.Namespace) -> dict[str, Any]:
    """One whole run."""
    lab, config, work_s = prepare(root, cluster, options)
    lab.run("prepare", str(config))
    lab.run("submit", str(config))
    (job,) = {r.array for r in lab.workers()}
    last = options.workers - 1
    held = [] if case == "all" else [last]
    busy = Busy(root)
    for index in range(options.workers):
        if index not in held:
            cluster.run("scontrol", "release", f"{job}_{index}")
    if case == "one late":
        lab.wait(lambda: finished(lab) >= options.requests / 3)
        cluster.run("scontrol", "release", f"{job}_{last}")
        held = []
    lab.wait(lambda: len(lab.workers()) == len(held), timeout_s=20 * options.seconds + 600)
    used = busy.stop()
    for index in held:
        cluster.run("scancel", f"{job}_{index}")
    lab.wait_idle()
    return outcome(lab, work_s, options) | used


def outcome(lab: SlurmLab, work_s: float, options: argparse.Namespace) -> dict[str, Any]:
    """What the run took, and what it could have taken."""
    attempts = sorted((a for a in lab.attempts() if a.ended), key=lambda a: a.started)
    events = [read_events(path)[0] for path in (lab.root / "runs/run/events").glob("*.jsonl")]
    asked = sorted(next(e.time for e in one if e.phase == "asking") for one in events)
    begun = [a.started for a in attempts][: len(asked)]
    startup_s = statistics.median(b - a for a, b in zip(begun, asked, strict=True))
    ended = max(e.time for one in events for e in one if e.requests and e.phase in ("asking", "draining", "waiting"))
    makespan_s = ended - begun[0]
    answered = [a.answered for a in attempts]
    if sum(answered) != options.requests:
        raise SystemExit(f"{sum(answered)} of {options.requests} answered\n{lab.story()}")
    bound_s = (work_s + sum(b - begun[0] + startup_s for b in begun)) / len(begun)
    return {
        "makespan_s": round(makespan_s, 1),
        "bound_s": round(bound_s, 1),
        "ratio": round(makespan_s / bound_s, 3),
        "work_s": round(work_s, 1),
        "startup_s": round(startup_s, 1),
        "answered": answered,
        "asked_twice": sum(n - 1 for n in lab.asked().values()),
        "workers": [_story(one, begun[0]) for one in sorted(events, key=lambda one: one[0].time)],
    }


def _story(events: list[Event], zero: float) -> dict[str, Any]:
    """When a worker began, asked first and was answered last, how often, and what its server was given at a time."""
    counted = [e for e in events if e.requests]
    return {
        "begun_s": round(events[0].time - zero, 1),
        "asked_s": round(next(e.time for e in events if e.phase == "asking") - zero, 1),
        "last_s": round(counted[-1].time - zero, 1) if counted else None,
        "answered": events[-1].requests,
        "limit": max((e.limits[0] for e in events if e.limits), default=None),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--sigma", type=float, default=1.0)
    parser.add_argument("--seconds", type=float, default=120.0, help="work of each of --workers workers")
    parser.add_argument("--in-flight", type=int, help="instead of what the client finds itself")
    parser.add_argument("--cases", nargs="*", default=CASES, choices=CASES)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    about = machine()
    print(heading(about, versions("proctor", "aiohttp")))
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="proctor-bench-") as name:
        cluster = Cluster(Path(name) / "cluster")
        cluster.up(Shape(nodes=options.workers))
        os.environ.update(cluster.env(), PROCTOR_CACHE=str(Path(name) / "cache"))
        try:
            for number, case in enumerate(options.cases):
                cluster.reset()
                (root := Path(name) / str(number)).mkdir()
                found[case] = measure(case, root, cluster, options)
                shown = {k: v for k, v in found[case].items() if k != "workers"}
                print(f"{case:12}" + "  ".join(f"{k} {v}" for k, v in shown.items()), flush=True)
                for one in found[case]["workers"]:
                    print(f"{'':12}  {one}", flush=True)
        finally:
            cluster.down()
    print(f"makespan over bound: {max(one['ratio'] for one in found.values()):.3f} at worst; goal: 1.10")
    if options.json:
        keep = {k: v for k, v in vars(options).items() if k not in ("json", "cases")}
        options.json.write_text(json.dumps({"machine": about, **keep, "cases": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
