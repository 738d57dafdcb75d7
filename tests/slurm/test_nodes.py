"""Servers on several nodes of one job, on the test cluster."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from proctor.infer.servers.placement import NODE_RANK
from proctor.launch.slurm.commands import Commands
from proctor.launch.slurm.steps import addresses, end_steps, host_names

from .cluster import Cluster
from .lab import SERVER, SlurmLab

WORDS = [f"word{i:03d}" for i in range(16)]


class NodesLab(SlurmLab):
    """The fake server on two nodes: the second one's part only follows."""

    def server(self) -> dict[str, Any]:
        flags = ["--host", "{host}", "--port", "{port}", "--node-rank", "{node_rank}"]
        flags += ["--api-key-file", "{api_key_file}", "--journal", str(self.journal) + "-{server_id}"]
        argv = [sys.executable, "-W", "ignore", "-m", SERVER, *flags, "--fixed-s", str(self.latency_s)]
        return {"type": "command", "argv": argv, "restarts": 3}

    def servers(self, node: str) -> list[psutil.Process]:
        """Without srun and the guards, whose command lines have all of the server's."""
        found: list[psutil.Process] = []
        for process in self.processes(SERVER, node):
            with contextlib.suppress(psutil.NoSuchProcess):  # it ended since it was listed
                line = process.cmdline()
                if NODE_RANK not in line and line[1:3] == ["-W", "ignore"]:
                    found.append(process)
        return found

    def until(self, condition: Callable[[], object]) -> None:
        """Until it holds while the job runs."""
        self.wait(lambda: condition() or not self.workers())
        assert condition(), self.story()

    def spread(self, **launch: Any) -> dict[str, Any]:
        return {"workers": 1, "nodes_per_server": 2, "servers": 2, **launch}


@pytest.fixture
def lab(slurm: Cluster, tmp_path: Path, own_cache: Path) -> NodesLab:
    return NodesLab(root=tmp_path, cluster=slurm)


def journals(lab: NodesLab) -> list[int]:
    """How many lines each server's journal has."""
    return [len(p.read_text().splitlines()) for p in sorted(lab.root.glob("asked.jsonl-*"))]


def test_two_servers_of_two_nodes_each(lab: NodesLab) -> None:
    task = lab.write_task("t", WORDS)
    lab.latency_s, lab.in_flight = 0.5, 4
    config = lab.write_sweep(tasks=[task], launch=lab.spread(), gpus=2, shards=2)
    lab.run("submit", str(config))
    try:
        # Each server lives on its own two nodes, and listens on its first node's address with a key.
        lab.until(lambda: all(lab.servers(node) for node in lab.cluster.nodes))
        lines = {node: lab.servers(node)[0].cmdline() for node in lab.cluster.nodes}
        ranks = {node: line[line.index("--node-rank") + 1] for node, line in lines.items()}
        assert ranks == {"n1": "0", "n2": "1", "n3": "0", "n4": "1"}
        hosts = {node: line[line.index("--host") + 1] for node, line in lines.items()}
        assert hosts["n1"] == hosts["n2"] != hosts["n3"] == hosts["n4"]
        assert "127.0.0.1" not in hosts.values()
        seen = {node: lab.servers(node)[0].environ() for node in lab.cluster.nodes}
        assert {e["CUDA_VISIBLE_DEVICES"] for e in seen.values()} == {"0"}
        assert [seen[n]["EH_SERVER_ID"] for n in lab.cluster.nodes] == ["0", "0", "1", "1"]
        assert [seen[n]["PROCTOR_NODE_RANK"] for n in lab.cluster.nodes] == ["0", "1", "0", "1"]
        lab.wait_idle()
    finally:
        print(lab.story())
    assert lab.endings() == {"done": 1}
    assert lab.answered_words(WORDS) == set(WORDS)
    assert len(journals(lab)) == 2
    assert min(journals(lab)) > 0
    assert not any(lab.servers(node) for node in lab.cluster.nodes)


def test_a_node_of_a_server_that_dies_takes_the_server_with_it_and_it_comes_back(lab: NodesLab) -> None:
    task = lab.write_task("t", WORDS)
    lab.latency_s, lab.in_flight = 1.0, 2
    config = lab.write_sweep(tasks=[task], launch=lab.spread(servers=1), shards=1)
    lab.run("submit", str(config))
    try:
        lab.until(lambda: sum(journals(lab)) > 1)
        nodes = [node for node in lab.cluster.nodes if lab.servers(node)]
        follower = next(p for node in nodes for p in lab.servers(node) if "1" in p.cmdline())
        leader = next(p for node in nodes for p in lab.servers(node) if p.pid != follower.pid)
        follower.send_signal(signal.SIGKILL)
        lab.until(lambda: not psutil.pid_exists(leader.pid))
        lab.wait_idle()
    finally:
        print(lab.story())
    assert lab.endings() == {"done": 1}
    assert lab.answered_words(WORDS) == set(WORDS)
    assert len(list(lab.root.glob("runs/*/logs/*/command-0-*.log"))) == 2


def test_a_killed_worker_leaves_no_step(lab: NodesLab) -> None:
    task = lab.write_task("t", WORDS)
    lab.latency_s = 5.0
    config = lab.write_sweep(tasks=[task], launch=lab.spread(servers=1), shards=1)
    lab.run("submit", str(config))
    lab.until(lambda: sum(journals(lab)) > 0)
    os.kill(lab.processes("proctor.worker")[0].pid, signal.SIGKILL)
    lab.wait(lambda: not any(lab.servers(node) for node in lab.cluster.nodes))


def test_a_job_with_another_number_of_nodes_says_so(lab: NodesLab) -> None:
    task = lab.write_task("t", WORDS[:2])
    launch = lab.spread(servers=1, sbatch={"exclusive": True, "hold": True})
    lab.run("submit", str(lab.write_sweep(tasks=[task], launch=launch, shards=1)))
    lab.cluster.run("scancel", "--state=PENDING", "--user=root")
    (script,) = lab.root.glob("runs/run/assignments/*.sh")
    text = script.read_text().replace("--nodes=2", "--nodes=3").replace("#SBATCH --hold\n", "")
    lab.cluster.run("sbatch", text=text)
    lab.wait_idle()
    (attempt,) = lab.attempts()
    assert attempt.ending == "node_count_mismatch"
    assert "the job has 3 nodes, but 1 servers with 2 nodes each need 2" in attempt.message
    assert attempt.hint is not None
    assert "launch.nodes_per_server" in attempt.hint


async def test_hosts_and_steps(slurm: Cluster, tmp_path: Path) -> None:
    commands = Commands()
    assert await host_names(commands, "n[2-4],n1") == ("n2", "n3", "n4", "n1")
    assert len(set(await addresses(commands, slurm.nodes))) == 4
    script = tmp_path / "job"
    # Two steps that take no notice of SIGTERM, of which one is to go.
    step = 'srun --overlap -N1 -n1 --job-name={} /bin/sh -c "trap : TERM; while :; do sleep 0.2; done" &'
    script.write_text(f"#!/bin/sh\n{step.format('mine')}\n{step.format('other')}\nwait\n")
    job = slurm.run("sbatch", "--parsable", "--nodes=2", "--output=/dev/null", "--array=3", str(script)).strip()
    raw = ""

    def names() -> set[str]:
        return set(slurm.run("squeue", "--steps", "-h", "-o", "%j", "-j", f"{job}_3").split())

    slurm.wait(lambda: {"mine", "other"} <= names(), 60, "the steps do not start")
    raw = slurm.run("squeue", "-h", "-j", f"{job}_3", "-o", "%A").strip()
    await asyncio.wait_for(end_steps(commands, raw, "mine"), 60)
    assert "mine" not in names()
    assert "other" in names()
    await end_steps(commands, raw, "mine")


def test_weights_are_served_from_the_nodes_disk_while_they_are_needed(lab: NodesLab) -> None:
    task = lab.write_task("t", WORDS)
    disk = lab.root / "disk of $(a) node"
    lab.latency_s = 0.3
    # No room is left free on purpose: the test's disk may be nearly full.
    staging = {"directory": "$NODE_DISK/weights", "check_space": False}
    launch = {"workers": 1, "staging": staging, "env": {"NODE_DISK": str(disk)}}
    lab.run("submit", str(lab.write_sweep(tasks=[task], launch=launch, shards=1)))
    lab.until(lambda: sum(journals(lab)) > 1)
    (server,) = [s for node in lab.cluster.nodes for s in lab.servers(node)]
    served = Path(server.environ()["PROCTOR_MODEL"])
    assert served.is_relative_to(disk)
    assert (served / "model.safetensors").read_bytes() == (lab.root / "model" / "model.safetensors").read_bytes()
    lab.wait_idle()
    print(lab.story())
    assert lab.endings() == {"done": 1}
    assert lab.answered_words(WORDS) == set(WORDS)
    assert not [p for p in disk.rglob("*") if p.is_file()]
