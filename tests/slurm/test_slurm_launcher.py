"""The launcher over a real cluster, beyond what every launcher keeps."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest

from proctor.errors import LaunchError
from proctor.launch.launcher import Job, JobState, JobStatus
from proctor.launch.slurm.attempts import Attempts
from proctor.launch.slurm.commands import Commands
from proctor.launch.slurm.launcher import JobTerms, SlurmLauncher
from proctor.launch.slurm.queue import read_queue

from .cluster import Cluster

SHOW = "import os, sys; print(sys.argv[1:], os.getcwd(), *(os.environ.get(k) for k in sys.argv[1].split(',')))"


def python(name: str, log: Path, *words: str, **more: object) -> Job:
    return Job(id=name, argv=(sys.executable, "-c", *words), log=log, **more)  # type: ignore[arg-type]


async def ended(launcher: SlurmLauncher, name: str) -> JobStatus:
    async with asyncio.timeout(60):
        while not (status := (await launcher.poll(wait_s=1))[name]).state.final:
            pass
    return status


async def test_a_job_gets_its_gpus_its_directory_and_its_environment(slurm: Cluster, tmp_path: Path) -> None:
    async with await SlurmLauncher.open(poll_s=0.1) as launcher:
        before = await launcher.capacity()
        assert (before.gpu_slots, before.gpu_slots_free, before.most_gpus, before.workers) == (16, 16, 4, 8)
        keys = "CUDA_VISIBLE_DEVICES,TOKEN,SLURM_GPUS_ON_NODE"
        job = python("a", tmp_path / "log", SHOW, keys, cwd=tmp_path, gpus=3, env={"TOKEN": "hf_x7"})
        await launcher.submit([job])
        assert (await ended(launcher, "a")).state is JobState.DONE
        assert (tmp_path / "log").read_text() == f"['{keys}'] {tmp_path} 0,1,2 hf_x7 3\n"
        shown = slurm.run("scontrol", "show", "job", launcher.slurm_id("a"))
        script = slurm.run("scontrol", "write", "batch_script", launcher.slurm_id("a"), "-", check=False)
        assert "hf_x7" not in shown + script


async def test_hostile_names_stay_what_they_are(slurm: Cluster, tmp_path: Path, hostile_name: str) -> None:
    directory = tmp_path / hostile_name
    directory.mkdir()
    async with await SlurmLauncher.open(poll_s=0.1) as launcher:
        await launcher.submit([python(hostile_name, directory / "%j.log", SHOW, hostile_name, cwd=directory)])
        status = await ended(launcher, hostile_name)
    assert status.state is JobState.DONE, (status, list(directory.iterdir()))
    assert (directory / "%j.log").read_text() == f"{[hostile_name]!r} {directory} None\n"


async def test_detached_jobs_outlive_the_launcher(slurm: Cluster, tmp_path: Path) -> None:
    async with await SlurmLauncher.open(poll_s=0.1, detach=True) as launcher:
        await launcher.submit([python("a", tmp_path / "log", "import time; time.sleep(2); print('ended')")])
    states = [record.stands for record in read_queue(Commands()) if record.job == launcher.slurm_id("a")]
    assert states in ([JobState.PENDING], [JobState.RUNNING])
    assert (await ended(launcher, "a")).state is JobState.DONE
    assert (tmp_path / "log").read_text() == "ended\n"


async def test_a_crashed_node_is_a_failed_job(slurm: Cluster, tmp_path: Path) -> None:
    async with await SlurmLauncher.open(poll_s=0.1) as launcher:
        await launcher.submit([python("a", tmp_path / "log", "import time; print(1, flush=True); time.sleep(99)")])
        slurm.wait(lambda: (tmp_path / "log").exists() and bool((tmp_path / "log").read_text()), 30, "no start")
        slurm.set_node_state(next(r.nodes for r in read_queue(Commands()) if r.job == launcher.slurm_id("a")), "DOWN")
        status = await ended(launcher, "a")
        assert (status.state, status.message) == (JobState.FAILED, "NodeDown")


async def test_terms_that_the_partition_does_not_allow_are_refused_at_once(slurm: Cluster) -> None:
    with pytest.raises(LaunchError, match="beyond MaxTime 00:05:00 of partition 'short'"):
        await SlurmLauncher.open(terms=JobTerms(partition="short", time_limit_s=3600))


async def test_a_preempted_job_is_dead_when_its_processes_are(slurm: Cluster, tmp_path: Path) -> None:
    """The higher partition takes all nodes; the lower one's job is asked to end, requeued, and comes back."""
    job = slurm.run(
        *("sbatch", "--parsable", "--partition=low", "--requeue", "--output=/dev/null"),
        text=f"#!/bin/sh\ntouch {tmp_path}/start.${{SLURM_RESTART_COUNT:-0}}\nexec sleep 100\n",
    ).strip()
    slurm.wait((tmp_path / "start.0").exists, 30, "no start")
    attempts = Attempts(Commands(), max_age_s=0.1, min_gap_s=0.05)
    slurm.run(
        *("sbatch", "--partition=high", "--nodes=4", "--exclusive", "--output=/dev/null"),
        text=f"#!/bin/sh\ntouch {tmp_path}/high\nsleep 1\n",
    ).strip()
    assert attempts.is_live(job, "", 0) is True
    slurm.wait((tmp_path / "high").exists, 60, "no preemption")
    assert attempts.is_live(job, "", 0) is False
    slurm.wait((tmp_path / "start.1").exists, 60, "the preempted job does not come back")
    assert [attempts.is_live(job, "", number) for number in (0, 1)] == [False, True]
