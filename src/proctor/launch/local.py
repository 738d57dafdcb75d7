"""Jobs as child processes on this machine, with GPU slots."""

from __future__ import annotations

import os
import signal
from typing import Final, Self

from proctor.config.spec import LocalLaunch
from proctor.launch.launcher import Job
from proctor.launch.queue import QueueLauncher
from proctor.launch.slots import VISIBLE, GpuSlots, find_devices
from proctor.processes.group import ProcessGroup

GRACE_S: Final = 60.0
"""What a job gets between SIGTERM and SIGKILL: enough for a worker to flush and to stop its server."""


class LocalLauncher(QueueLauncher):
    """Each job is a process group of its own that dies with this process, however this process dies.

    A job that asks for GPUs finds its own in CUDA_VISIBLE_DEVICES; one that asks for none gets the environment
    as it is.
    """

    def __init__(self, *, slots: GpuSlots, max_workers: int, grace_s: float = GRACE_S) -> None:
        super().__init__(_Start(grace_s), slots=slots, max_workers=max_workers)

    @classmethod
    async def open(cls, spec: LocalLaunch, *, grace_s: float = GRACE_S) -> Self:
        """Find the devices that `spec` and the environment allow. Raises LaunchError if `spec` names others."""
        devices = await find_devices(spec.gpus, os.environ)
        return cls(slots=GpuSlots(devices, spec.slots_per_gpu), max_workers=spec.max_workers, grace_s=grace_s)


class _Start:
    def __init__(self, grace_s: float) -> None:
        self._grace_s = grace_s

    async def __call__(self, job: Job, devices: tuple[str, ...]) -> _Running:
        env = dict(os.environ) | dict(job.env)
        if job.gpus:
            env[VISIBLE] = ",".join(devices)
        return _Running(await ProcessGroup.start(job.argv, env=env, log=job.log, cwd=job.cwd, grace_s=self._grace_s))


class _Running:
    def __init__(self, group: ProcessGroup) -> None:
        self._group = group

    async def wait(self) -> int:
        code = await self._group.wait()
        await self._group.stop()
        return code

    def drain(self) -> None:
        self._group.signal(signal.SIGINT)

    async def stop(self) -> None:
        await self._group.stop()
