"""A launcher whose jobs are coroutines of this process: the same queue, no child processes."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final

from proctor.launch.launcher import Job
from proctor.launch.queue import QueueLauncher
from proctor.launch.slots import GpuSlots

_TERMINATED: Final = 143
"""128 + SIGTERM."""

Body = Callable[[Job, tuple[str, ...], asyncio.Event], Awaitable[int]]
"""What stands for a job: gets it, its devices, and an event that asks it to drain; returns the exit status."""


class FakeLauncher(QueueLauncher):
    """Runs `body` for each job."""

    def __init__(
        self, body: Body, *, devices: tuple[str, ...] = (), slots_per_gpu: int = 1, max_workers: int = 16
    ) -> None:
        super().__init__(_Start(body), slots=GpuSlots(devices, slots_per_gpu), max_workers=max_workers)


class _Start:
    def __init__(self, body: Body) -> None:
        self._body = body

    async def __call__(self, job: Job, devices: tuple[str, ...]) -> _Running:
        return _Running(self._body, job, devices)


class _Running:
    def __init__(self, body: Body, job: Job, devices: tuple[str, ...]) -> None:
        self._draining = asyncio.Event()
        self._task = asyncio.ensure_future(body(job, devices, self._draining))

    async def wait(self) -> int:
        await asyncio.wait([self._task])
        return _TERMINATED if self._task.cancelled() else self._task.result()

    def drain(self) -> None:
        self._draining.set()

    async def stop(self) -> None:
        self._task.cancel()
        await asyncio.wait([self._task])
