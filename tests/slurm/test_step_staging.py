"""Weights of servers across nodes: a copy on the disk of each node while they are needed, or none at all."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from .cluster import Cluster
from .lab import SERVER, SlurmLab

WORDS = [f"word{i:03d}" for i in range(16)]


class StagingLab(SlurmLab):
    def server(self) -> dict[str, Any]:
        flags = ["--host", "{host}", "--port", "{port}", "--node-rank", "{node_rank}"]
        flags += ["--api-key-file", "{api_key_file}"]
        argv = [sys.executable, "-W", "ignore", "-m", SERVER, *flags, "--fixed-s", str(self.latency_s)]
        return {"type": "command", "argv": argv, "restarts": 1}

    def servers(self, node: str) -> list[psutil.Process]:
        return [p for p in self.processes(SERVER, node) if p.cmdline()[1:3] == ["-W", "ignore"]]

    def said(self) -> str:
        """What the worker said while it started."""
        lines = [
            json.loads(line)
            for p in self.root.glob("runs/*/events/*.jsonl")
            for line in p.read_text().split("\n")
            if line
        ]
        return "\n".join(str(line) for line in lines)

    def submit_spread(self, directory: str, disk: Path, **more: str) -> None:
        """Two servers of two nodes each. The nodes share this machine's disk: each node's directory has its name."""
        launch = {
            "workers": 1,
            "nodes_per_server": 2,
            "servers": 2,
            "staging": {"directory": directory, "check_space": False},
            "env": {"NODE_DISK": str(disk), **more},
        }
        task = self.write_task("t", WORDS)
        self.run("submit", str(self.write_sweep(tasks=[task], launch=launch, shards=1)))

    def until_all_serve(self) -> dict[str, psutil.Process]:
        self.wait(lambda: all(self.servers(n) for n in self.cluster.nodes) or not self.workers())
        return {node: self.servers(node)[0] for node in self.cluster.nodes}


@pytest.fixture
def lab(slurm: Cluster, tmp_path: Path, own_cache: Path) -> StagingLab:
    return StagingLab(root=tmp_path, cluster=slurm, latency_s=1.0, in_flight=2)


def holders(lab: StagingLab) -> dict[str, int]:
    return {n: len(lab.processes("proctor.worker.hold_weights", n)) for n in lab.cluster.nodes}


def test_every_node_serves_its_copy_and_all_are_removed(lab: StagingLab) -> None:
    disk = lab.root / "disk of $(a) node"
    lab.submit_spread("$NODE_DISK/weights", disk)
    servers = lab.until_all_serve()
    try:
        places = {Path(p.environ()["PROCTOR_MODEL"]) for p in servers.values()}
        (place,) = places
        assert place.is_relative_to(disk)
        assert (place / "model.safetensors").read_bytes() == (lab.root / "model" / "model.safetensors").read_bytes()
        assert all(holders(lab).values()), holders(lab)
        lab.wait_idle()
    finally:
        print(lab.story(), lab.said())
    assert lab.endings() == {"done": 1}
    assert lab.answered_words(WORDS) == set(WORDS)
    assert not [p for p in disk.rglob("*") if p.is_file()]
    assert not any(holders(lab).values())
    assert f"the weights are read from {place} on 4 nodes" in lab.said()


def test_where_one_node_has_no_copy_none_is_served(lab: StagingLab) -> None:
    """The variable leads to a directory that only some nodes can make."""
    disk = lab.root / "disk"
    (disk / "n3").mkdir(parents=True)
    (disk / "n3" / "weights").write_text("no directory")
    lab.submit_spread("$NODE_DISK/$SLURMD_NODENAME/weights", disk)
    servers = lab.until_all_serve()
    try:
        assert {p.environ()["PROCTOR_MODEL"] for p in servers.values()} == {str(lab.root / "model")}
        lab.wait_idle()
    finally:
        print(lab.story(), lab.said())
    assert lab.endings() == {"done": 1}
    assert f"the weights are read from {lab.root / 'model'}: n3: " in lab.said()
    assert not list(disk.rglob("model.safetensors"))
