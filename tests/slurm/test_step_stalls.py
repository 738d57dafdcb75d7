"""What servers on other nodes do is seen: one that has requests and computes nothing is started again."""

from __future__ import annotations

import asyncio
import signal
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from proctor.infer.servers.steps import srun_words
from proctor.launch.slurm.commands import Commands
from proctor.launch.slurm.steps import step_use

from .cluster import Cluster
from .lab import SERVER, SlurmLab

WORDS = [f"word{i:03d}" for i in range(100)]


class StallLab(SlurmLab):
    def server(self) -> dict[str, Any]:
        flags = ["--host", "{host}", "--port", "{port}", "--api-key-file", "{api_key_file}"]
        argv = [sys.executable, "-W", "ignore", "-m", SERVER, *flags, "--fixed-s", str(self.latency_s)]
        return {"type": "command", "argv": argv, "restarts": 2, "stall_s": 16}

    def servers(self, node: str) -> list[psutil.Process]:
        """Without srun, the shells before it and the guards."""
        return [p for p in self.processes(SERVER, node) if p.cmdline()[1:3] == ["-W", "ignore"]]


@pytest.fixture
def lab(slurm: Cluster, tmp_path: Path, own_cache: Path) -> StallLab:
    return StallLab(root=tmp_path, cluster=slurm)


async def test_what_steps_do_is_seen(slurm: Cluster, tmp_path: Path) -> None:
    commands = Commands()
    script = tmp_path / "job"
    steps = {"busy": "while :; do :; done", "idle": "while :; do sleep 600; done"}
    lines = [f"srun --overlap -N2 -n2 --job-name={name} /bin/sh -c {body!r} &" for name, body in steps.items()]
    script.write_text("\n".join(["#!/bin/sh", *lines, "wait", ""]))
    job = slurm.run("sbatch", "--parsable", "--nodes=2", "--output=/dev/null", "--array=3", str(script)).strip()
    shown = ("squeue", "--steps", "-h", "-o", "%j", "-j", f"{job}_3")
    slurm.wait(lambda: set(steps) <= set(slurm.run(*shown).split()), 60, "the steps do not start")
    raw, nodes = slurm.run("squeue", "-h", "-j", f"{job}_3", "-o", "%A %N").split()
    hosts = slurm.run("scontrol", "show", "hostnames", nodes).split()

    async def used(name: str) -> float:
        found = await step_use(commands, raw, name, srun_words(raw, "look", hosts), 2, None)
        assert found is not None
        assert found.gpu_percent is None
        return found.cpu_s

    try:
        before = {name: await used(name) for name in steps}
        await asyncio.sleep(6)
        spent = {name: await used(name) - before[name] for name in steps}
        assert spent["busy"] > 0.3
        assert spent["idle"] < 0.1
        assert await step_use(commands, raw, "none", srun_words(raw, "look", hosts), 2, None) is None
    finally:
        slurm.run("scancel", job)


def test_a_server_on_another_node_that_stalls_is_started_again(lab: StallLab) -> None:
    task = lab.write_task("t", WORDS)
    lab.latency_s, lab.in_flight = 1.0, 2
    launch = {"workers": 1, "nodes_per_server": 1, "servers": 2}
    lab.run("submit", str(lab.write_sweep(tasks=[task], launch=launch, shards=1)))
    try:
        lab.wait(lambda: sum(len(lab.servers(node)) for node in lab.cluster.nodes) == 2)
        lab.wait(lambda: lab.answered_words(WORDS) or not lab.workers())
        there = next(n for n in lab.cluster.nodes if lab.servers(n) and not lab.processes("proctor.worker", n))
        (stopped,) = lab.servers(there)
        stopped.send_signal(signal.SIGSTOP)
        lab.wait(lambda: not psutil.pid_exists(stopped.pid))
        lab.wait_idle()
    finally:
        print(lab.story())
    assert lab.endings() == {"done": 1}
    assert lab.answered_words(WORDS) == set(WORDS)
    assert len(list(lab.root.glob("runs/*/logs/*/command-*-*.log"))) == 3
