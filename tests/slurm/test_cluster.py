"""The test cluster does what a real one does: nodes of their own, crashes, partitions, and no trace afterwards."""

from __future__ import annotations

import json
import time
from pathlib import Path

import psutil
import pytest

from .cluster import Cluster
from .clusters import REQUIRED, bring_up, serve
from .layout import Shape
from .packages import obstacle


def state(cluster: Cluster, job: str) -> str:
    return cluster.run("squeue", "-h", "-t", "all", "-j", job, "-o", "%T").strip()


def submit(cluster: Cluster, script: str, *options: str) -> str:
    return cluster.run("sbatch", "--parsable", *options, text="#!/bin/sh\n" + script).strip()


def test_every_node_is_its_own_machine(slurm: Cluster, tmp_path: Path) -> None:
    script = "hostname; cat /etc/machine-id /proc/sys/kernel/random/boot_id; echo gpus $CUDA_VISIBLE_DEVICES"
    job = submit(slurm, script, "--array=1-4", "--cpus-per-task=2", "--gres=gpu:2", "-o", str(tmp_path / "%a"))
    slurm.wait(lambda: set(state(slurm, job).split()) == {"COMPLETED"}, 30, "the jobs do not end")
    seen = [(tmp_path / str(index)).read_text().split("\n") for index in range(1, 5)]
    assert sorted(lines[0] for lines in seen) == ["n1", "n2", "n3", "n4"]
    assert len({lines[1] for lines in seen}) == len({lines[2] for lines in seen}) == 4
    assert all(lines[3] == "gpus 0,1" for lines in seen)


def test_a_crashed_node_is_noticed_and_its_job_starts_elsewhere(slurm: Cluster, tmp_path: Path) -> None:
    job = submit(slurm, "hostname; sleep 100", "--requeue", "-w", "n2", "-o", str(tmp_path / "log"))
    slurm.wait(lambda: (tmp_path / "log").exists() and "n2" in (tmp_path / "log").read_text(), 20, "no start")
    slurm.crash_node("n2")
    assert slurm.node_pids("n2") == []
    slurm.wait(lambda: "down" in slurm.node_state("n2"), 60, "the crash is not noticed")
    assert state(slurm, job) == "PENDING"
    slurm.start_node("n2")
    slurm.wait(lambda: state(slurm, job) == "RUNNING", 30, "the job does not run again")


def test_an_isolated_node_runs_on_beside_its_replacement(slurm: Cluster, tmp_path: Path) -> None:
    beats = tmp_path / "beats"
    job = submit(slurm, f"while :; do hostname >> {beats}; sleep 0.2; done", "--requeue", "-o", "/dev/null")
    slurm.wait(lambda: beats.exists() and bool(beats.read_text().strip()), 20, "no start")
    first = beats.read_text().split()[0]
    slurm.isolate_node(first)
    slurm.wait(lambda: len(set(beats.read_text().split())) == 2, 90, "no second copy")
    before = beats.read_text().split().count(first)
    time.sleep(1)
    assert beats.read_text().split().count(first) > before, "both copies run at once"
    slurm.rejoin_node(first)
    assert state(slurm, job) == "RUNNING"


def test_the_controller_comes_back_with_its_jobs(slurm: Cluster) -> None:
    job = submit(slurm, "sleep 100", "-o", "/dev/null")
    slurm.wait(lambda: state(slurm, job) == "RUNNING", 20, "no start")
    slurm.restart_controller()
    assert state(slurm, job) == "RUNNING"
    slurm.set_node_state("n3", "DOWN")
    assert "down" in slurm.node_state("n3")
    slurm.set_node_state("n3", "RESUME")
    slurm.wait(lambda: "down" not in slurm.node_state("n3"), 30, "no resume")


def test_a_machine_without_slurm_is_skipped_by_name_and_fails_where_slurm_is_required(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    assert obstacle() == "a Slurm cluster needs root (its daemons and network namespaces)"
    monkeypatch.delenv(REQUIRED, raising=False)
    with pytest.raises(pytest.skip.Exception, match="needs root"):
        next(serve("none", Shape()))
    monkeypatch.setenv(REQUIRED, "1")
    with pytest.raises(pytest.fail.Exception, match="PROCTOR_REQUIRE_SLURM=1, but a Slurm cluster needs root"):
        next(serve("none", Shape()))


def test_down_leaves_nothing_behind(tmp_path: Path) -> None:
    if (reason := obstacle()) is not None:
        pytest.skip(reason)
    cluster = Cluster(tmp_path / "it")
    try:
        bring_up(cluster, Shape(nodes=2))
        bridge = f"pslurm{json.loads((tmp_path / 'it' / 'cluster.json').read_text())['number']}"
        submit(cluster, "sleep 1000", "-N2", "-o", "/dev/null")
        pids = [pid for node in cluster.nodes for pid in cluster.node_pids(node)]
        cluster.up(Shape(nodes=2))
        assert all(cluster.running().values())
        assert len(traces(bridge)) == 5
    finally:
        cluster.down()
    cluster.down()
    assert list(tmp_path.iterdir()) == []
    assert traces(bridge) == []
    assert not any(pid in psutil.pids() and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in pids)


def traces(bridge: str) -> list[str]:
    """The bridge, the cables and the namespaces."""
    named = (*Path("/sys/class/net").iterdir(), *Path("/run/netns").glob("*"))
    return [path.name for path in named if path.name.replace(".", "-").split("-")[0] == bridge]
