"""A whole run on the test cluster, against fake servers on its nodes: what the tests of runs and survival share."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from proctor.launch.launcher import JobState
from proctor.launch.slurm.commands import Commands
from proctor.launch.slurm.queue import read_queue
from proctor.launch.slurm.records import QueueRecord
from proctor.records import Response, digest
from proctor.store import Answers, Store
from proctor.worker.attempt import AttemptRecord, read_attempts

from ..integration.conftest import Lab
from .cluster import Cluster

WORKER = "proctor.worker"
SERVER = "proctor.testing.server"
PATIENCE_S = 600.0
"""For what takes seconds: some machines are slow and shared."""


@dataclass
class SlurmLab(Lab):
    """One directory that all nodes see, with models, tasks and a run.yaml that is submitted."""

    cluster: Cluster = field(kw_only=True)
    client_processes: int = 1

    def write_sweep(
        self, *, launch: dict[str, Any] | None = None, shards: int = 12, gpus: int = 0, **more: Any
    ) -> Path:
        """As `write_run`, on the cluster: one element a node, each task in so many shards."""
        slurm = {"type": "slurm", "cluster": "generic", "workers": 2, "time_limit": 10, "sbatch": {"exclusive": True}}
        plan = {"strategy": "workers", "num_worker": shards, "num_split": shards, "min_task_size": 1, "split": True}
        engine = {"type": "openai", "server": self.server() | {"gpus": gpus}, "max_in_flight": self.in_flight}
        engine |= {"client_processes": self.client_processes}
        return self.write_run(**{"launch": slurm | (launch or {}), "plan": plan, "engine": engine} | more)

    # --- the queue ---

    def queue(self) -> list[QueueRecord]:
        """Every element and job of this lab's runs that waits or runs.

        A controller that was killed may have forgotten that another test's jobs were cancelled.
        """
        marks = tuple(f"-{digest(str(p.resolve()))[:8]}-" for p in (self.root / "runs").glob("*"))
        return [r for r in read_queue(Commands()) if not r.stands.final and any(m in r.name for m in marks)]

    def workers(self) -> list[QueueRecord]:
        """The elements among them."""
        return [r for r in self.queue() if not r.name.endswith("-score")]

    def running(self) -> list[QueueRecord]:
        """The elements that run."""
        return [r for r in self.workers() if r.stands is JobState.RUNNING]

    def wait_idle(self, timeout_s: float = PATIENCE_S) -> None:
        """Until nothing of the run waits or runs."""
        self.wait(lambda: not self.queue(), timeout_s)

    def wait(self, condition: Callable[[], object], timeout_s: float = PATIENCE_S) -> None:
        """Until `condition()` holds; what the jobs said otherwise."""
        end = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < end, f"it did not happen in time\n{self.story()}"
            time.sleep(0.2)

    def story(self) -> str:
        """The queue, how attempts ended and the ends of all logs, for a failed test's report."""
        lines = [f"queue: {r.id} {r.name} {r.state} {r.reason} {r.nodes} restarts={r.restarts}" for r in self.queue()]
        lines += [f"attempt: {a}" for a in self.attempts()]
        for log in sorted(self.root.glob("runs/*/logs/*.log")):
            lines += [f"== {log.name}", *log.read_text(errors="replace").splitlines()[-15:]]
        return "\n".join(lines)

    # --- what happened ---

    def attempts(self) -> list[AttemptRecord]:
        """How the attempts of all runs ended, oldest first."""
        return sorted((a for d in self.root.glob("runs/*/attempts") for a in read_attempts(d)), key=lambda a: a.ended)

    def endings(self) -> Counter[str]:
        """How many ended how."""
        return Counter(a.ending.value for a in self.attempts())

    def scored(self) -> list[tuple[str, str, float | None, int]]:
        """(task, metric, value, n) as the job that marks left them; none before that."""
        path = self.root / "runs" / "run" / "report" / "scores.json"
        rows = json.loads(path.read_text()) if path.exists() else []
        return [(r["task"], r["metric"], r["value"], r["n"]) for r in rows]

    def answers(self) -> Answers:
        """Of the only model."""
        store = Store.open(self.root / "store", create=False)
        resolutions = {json.loads(p.read_text())["resolution"] for p in self.root.glob("runs/*/jobs/*.json")}
        (weights,), (resolution,) = store.weights(), resolutions
        return store.answers(weights, resolution)

    def acknowledged(self) -> dict[str, str]:
        """Digest of the prompt → what was answered, for everything that is durable now."""
        if not (self.root / "store" / "store.json").exists() or not list(self.root.glob("store/weights/*")):
            return {}
        store, found = Store.open(self.root / "store", create=False), {}
        answers = self.answers()
        for path in (self.root / "store" / "requests").glob("*.parquet"):
            prompts = {i.key: i.request.text for i in store.read_recording(path.stem).instances}
            for key, answer in answers.read(list(prompts)).items():
                if isinstance(answer, Response):
                    found[self.digest(prompts[key].removeprefix("Say ").removesuffix(":"))] = repr(answer)
        return found

    def asked_words(self, words: list[str]) -> Counter[str]:
        """How often each word was asked for."""
        asked = self.asked()
        return Counter({w: asked[self.digest(w)] for w in words})

    # --- processes ---

    def processes(self, module: str, node: str | None = None) -> list[psutil.Process]:
        """Those on the nodes, or on `node`, that run `module` for this lab, oldest first."""
        there = None if node is None else set(self.cluster.node_pids(node))
        found: list[psutil.Process] = []
        for process in psutil.process_iter():
            try:
                line = process.cmdline()
                mine = any(str(self.root) in word for word in line)
                if (
                    mine
                    and module in line
                    and "proctor.processes.guard" not in line
                    and (there is None or process.pid in there)
                ):
                    found.append(process)
            except psutil.Error:
                continue
        return sorted(found, key=lambda p: p.create_time())
