"""Jobs as real processes: environment, starting that fails, and a parent that is killed."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from proctor.config.spec import LocalLaunch
from proctor.launch.launcher import Job, JobState
from proctor.launch.local import LocalLauncher
from proctor.launch.slots import GpuSlots


def job(tmp_path: Path, code: str, **more) -> Job:
    return Job(id="a", argv=(sys.executable, "-c", code), log=tmp_path / "a.log", **more)


async def settle(launcher: LocalLauncher) -> None:
    for _ in range(40):
        if all(status.state.final for status in (await launcher.poll(wait_s=0.5)).values()):
            return
    raise AssertionError("jobs do not end")


async def test_environment_and_directory_are_the_jobs_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    here = tmp_path / "a $(b)\n'c'"
    here.mkdir()
    async with await LocalLauncher.open(LocalLaunch(slots_per_gpu=2)) as launcher:
        assert (await launcher.capacity()).gpu_slots == 4
        code = "import os; print(os.environ['CUDA_VISIBLE_DEVICES'], os.environ['X'], os.getcwd(), sep='|')"
        await launcher.submit([job(tmp_path, code, env={"X": "a b"}, cwd=here, gpus=1)])
        await settle(launcher)
    assert (tmp_path / "a.log").read_text() == f"4|a b|{here}\n"


async def test_a_job_that_cannot_start_fails_and_frees_its_slots(tmp_path: Path) -> None:
    async with LocalLauncher(slots=GpuSlots(["0"]), max_workers=1) as launcher:
        absent = job(tmp_path, "", cwd=tmp_path / "absent", gpus=1)
        program = Job(id="b", argv=("/no/such/program",), log=tmp_path / "b.log", gpus=1)
        await launcher.submit([absent, program])
        await settle(launcher)
        states = await launcher.poll()
        assert states["a"].state is JobState.FAILED
        assert "cannot be started" in states["a"].message
        assert states["b"].state is JobState.FAILED
        assert states["b"].returncode == 127
        capacity = await launcher.capacity()
        assert (capacity.workers_free, capacity.gpu_slots_free) == (1, 1)


PARENT = """
import asyncio, sys
from pathlib import Path
from proctor.launch.launcher import Job
from proctor.launch.local import LocalLauncher
from proctor.launch.slots import GpuSlots

async def main():
    async with LocalLauncher(slots=GpuSlots([]), max_workers=1, grace_s=0.5) as launcher:
        code = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
        await launcher.submit([Job(id="a", argv=(sys.executable, "-c", code), log=Path(sys.argv[1]))])
        await asyncio.sleep(600)

asyncio.run(main())
"""


def test_a_killed_parent_leaves_no_job(tmp_path: Path) -> None:
    log = tmp_path / "a.log"
    with subprocess.Popen([sys.executable, "-c", PARENT, str(log)], env=os.environ) as parent:
        deadline = time.monotonic() + 20
        while not (log.exists() and log.read_text().endswith("\n")):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        pid = int(log.read_text())
        parent.kill()
    while psutil.pid_exists(pid):
        assert time.monotonic() < deadline
        time.sleep(0.02)


async def test_cancelling_whoever_waits_still_ends_the_jobs(tmp_path: Path) -> None:
    async def hold() -> None:
        async with LocalLauncher(slots=GpuSlots([]), max_workers=1, grace_s=0.5) as launcher:
            code = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
            await launcher.submit([job(tmp_path, code)])
            await asyncio.sleep(600)

    task = asyncio.create_task(hold())
    log = tmp_path / "a.log"
    while not (log.exists() and log.read_text().endswith("\n")):
        await asyncio.sleep(0.02)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not psutil.pid_exists(int(log.read_text()))
