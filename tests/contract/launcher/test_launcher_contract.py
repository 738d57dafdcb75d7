"""What every launcher keeps: the same suite over real child processes, over a real Slurm, and over the fake."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import pytest

from proctor.errors import LaunchError
from proctor.launch.fake import FakeLauncher
from proctor.launch.launcher import Job, JobState, Launcher
from proctor.launch.local import LocalLauncher
from proctor.launch.slots import GpuSlots
from proctor.launch.slurm.launcher import SlurmLauncher

# Each program exists twice: as a command line and as a coroutine. Both write "<devices>" to the log first.
COMMAND = """
import os, signal, sys, time
kind, release = sys.argv[1], sys.argv[2]
drained = []
if kind == "drains":
    signal.signal(signal.SIGINT, lambda *_: drained.append(1))
print("devices=" + os.environ.get("CUDA_VISIBLE_DEVICES", "none"), flush=True)
if kind.startswith("exit"):
    sys.exit(int(kind[4:]))
while not os.path.exists(release):
    if drained:
        sys.exit(3)
    time.sleep(0.01)
"""


async def body(job: Job, devices: tuple[str, ...], draining: asyncio.Event) -> int:
    kind, release = job.argv[-2:]
    job.log.write_text(f"devices={','.join(devices) or 'none'}\n")
    if kind.startswith("exit"):
        return int(kind[4:])
    while not os.path.exists(release):
        if kind == "drains" and draining.is_set():
            return 3
        await asyncio.sleep(0.01)
    return 0


Make = Callable[..., AbstractAsyncContextManager[Launcher]]
OURS = ["local", "fake"]
"""They choose the devices and the order themselves; Slurm's are its own."""
SLURM = pytest.param("slurm", marks=[pytest.mark.slurm, pytest.mark.xdist_group("slurm")])


@pytest.fixture(params=[*OURS, SLURM])
def make(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Make:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if request.param == "slurm":
        request.getfixturevalue("one_node")

    @asynccontextmanager
    async def launcher(
        devices: tuple[str, ...] = (), *, per_gpu: int = 1, workers: int = 16
    ) -> AsyncIterator[Launcher]:
        if request.param == "fake":
            made: Launcher = FakeLauncher(body, devices=devices, slots_per_gpu=per_gpu, max_workers=workers)
        elif request.param == "local":
            made = LocalLauncher(slots=GpuSlots(devices, per_gpu), max_workers=workers, grace_s=1.0)
        else:
            made = await SlurmLauncher.open(max_workers=workers, poll_s=0.1)
        async with made as entered:
            yield entered

    return launcher


@pytest.fixture
def job(tmp_path: Path) -> Callable[..., Job]:
    def build(name: str, kind: str = "waits", gpus: int = 0) -> Job:
        argv = (sys.executable, "-c", COMMAND, kind, str(tmp_path / f"release-{name}"))
        return Job(id=name, argv=argv, log=tmp_path / f"{name}.log", gpus=gpus)

    return build


async def reach(launcher: Launcher, **wanted: JobState) -> None:
    deadline = time.monotonic() + 300
    while True:
        states = {name: status.state for name, status in (await launcher.poll(wait_s=0.1)).items()}
        if all(states[name] is state for name, state in wanted.items()):
            return
        assert time.monotonic() < deadline, states


async def test_exit_status_decides_between_done_and_failed(make: Make, job) -> None:
    async with make() as launcher:
        await launcher.submit([job("good", "exit0"), job("bad", "exit3")])
        await reach(launcher, good=JobState.DONE, bad=JobState.FAILED)
        states = await launcher.poll()
        assert states["good"].returncode == 0
        assert states["bad"].returncode == 3


@pytest.mark.parametrize("make", OURS, indirect=True)
async def test_lowest_free_devices_are_taken_and_given_back(make: Make, job, tmp_path: Path) -> None:
    async with make(("0", "1", "2", "3")) as launcher:
        await launcher.submit([job("a", gpus=2), job("b", gpus=1)])
        await reach(launcher, a=JobState.RUNNING, b=JobState.RUNNING)
        states = await launcher.poll()
        assert (states["a"].devices, states["b"].devices) == (("0", "1"), ("2",))
        (tmp_path / "release-a").touch()
        await reach(launcher, a=JobState.DONE)
        await launcher.submit([job("c", gpus=2)])
        await reach(launcher, c=JobState.RUNNING)
        assert (await launcher.poll())["c"].devices == ("0", "1")
        assert (await launcher.capacity()).gpu_slots_free == 1


@pytest.mark.parametrize("make", OURS, indirect=True)
async def test_a_job_sees_its_devices(make: Make, job) -> None:
    async with make(("5", "MIG-ab12")) as launcher:
        await launcher.submit([job("a", "exit0", gpus=2), job("b", "exit0")])
        await reach(launcher, a=JobState.DONE, b=JobState.DONE)
        assert launcher.log("a").read_text() == "devices=5,MIG-ab12\n"
        assert launcher.log("b").read_text() == "devices=none\n"


@pytest.mark.parametrize("make", OURS, indirect=True)
async def test_slots_of_one_device_are_shared_but_not_within_a_job(make: Make, job) -> None:
    async with make(("0", "1"), per_gpu=2) as launcher:
        await launcher.submit([job("a", gpus=2), job("b", gpus=1), job("c", gpus=2)])
        await reach(launcher, a=JobState.RUNNING, b=JobState.RUNNING, c=JobState.PENDING)
        states = await launcher.poll()
        assert states["a"].devices == ("0", "1")
        assert states["b"].devices == ("0",)


@pytest.mark.parametrize("make", OURS, indirect=True)
async def test_a_waiting_big_job_is_not_overtaken_by_small_ones(make: Make, job, tmp_path: Path) -> None:
    async with make(("0", "1")) as launcher:
        await launcher.submit([job("first", gpus=1), job("big", gpus=2), job("small", gpus=1), job("cpu", "exit0")])
        await reach(launcher, first=JobState.RUNNING, cpu=JobState.DONE)
        states = await launcher.poll()
        assert (states["big"].state, states["small"].state) == (JobState.PENDING, JobState.PENDING)
        (tmp_path / "release-first").touch()
        await reach(launcher, big=JobState.RUNNING)
        assert (await launcher.poll())["small"].state is JobState.PENDING
        (tmp_path / "release-big").touch()
        await reach(launcher, small=JobState.RUNNING)


async def test_no_more_workers_at_a_time_than_allowed(make: Make, job, tmp_path: Path) -> None:
    async with make(workers=2) as launcher:
        await launcher.submit([job("a"), job("b"), job("c")])
        await reach(launcher, a=JobState.RUNNING, b=JobState.RUNNING, c=JobState.PENDING)
        assert (await launcher.capacity()).workers_free == 0
        (tmp_path / "release-b").touch()
        await reach(launcher, b=JobState.DONE, c=JobState.RUNNING)


async def test_what_could_never_run_is_refused_and_nothing_of_the_call_is_queued(make: Make, job) -> None:
    async with make(("0",)) as launcher:
        with pytest.raises(LaunchError, match=r"'b' wants 2 GPUs; .* offers 1"):
            await launcher.submit([job("a", gpus=1), job("b", gpus=2)])
        assert await launcher.poll() == {}
        await launcher.submit([job("a", "exit0")])
        with pytest.raises(LaunchError, match="a job 'a' already"):
            await launcher.submit([job("a")])


async def test_drained_jobs_may_finish_and_waiting_ones_never_start(make: Make, job) -> None:
    async with make(workers=1) as launcher:
        await launcher.submit([job("runs", "drains"), job("waits")])
        await reach(launcher, runs=JobState.RUNNING)
        while not launcher.log("runs").exists() or "devices" not in launcher.log("runs").read_text():
            await asyncio.sleep(0.01)
        await launcher.cancel(drain=True)
        await reach(launcher, runs=JobState.CANCELLED, waits=JobState.CANCELLED)
        assert (await launcher.poll())["runs"].returncode == 3
        assert not launcher.log("waits").exists()


async def test_cancelled_jobs_give_back_what_they_had(make: Make, job) -> None:
    async with make(("0",)) as launcher:
        await launcher.submit([job("a", gpus=1), job("b", gpus=1)])
        await reach(launcher, a=JobState.RUNNING)
        await launcher.cancel(["a"])
        await reach(launcher, a=JobState.CANCELLED, b=JobState.RUNNING)
        with pytest.raises(LaunchError, match="no job 'bb'; did you mean 'b'"):
            await launcher.cancel(["bb"])
        await launcher.cancel(["b"])
        await launcher.cancel(["b"])
        await reach(launcher, b=JobState.CANCELLED)


async def test_leaving_ends_everything(make: Make, job) -> None:
    async with make(workers=2) as launcher:
        await launcher.submit([job("a"), job("b"), job("c")])
        await reach(launcher, a=JobState.RUNNING, b=JobState.RUNNING)
    assert {status.state for status in (await launcher.poll()).values()} == {JobState.CANCELLED}


async def test_poll_waits_no_longer_than_the_next_change(make: Make, job, tmp_path: Path) -> None:
    async with make() as launcher:
        await launcher.submit([job("a")])
        await reach(launcher, a=JobState.RUNNING)
        started = time.monotonic()
        await launcher.poll(wait_s=0.1)
        assert 0.09 < time.monotonic() - started < 25
        asyncio.get_running_loop().call_later(0.1, (tmp_path / "release-a").touch)
        states = await launcher.poll(wait_s=300)
        assert states["a"].state is JobState.DONE
        assert time.monotonic() - started < 250
