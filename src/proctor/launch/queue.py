"""First come, first served over workers and GPU slots. How a job runs is the subclass's."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from proctor.errors import ProctorError
from proctor.launch.launcher import Capacity, Job, JobState, JobStatus, check_job, entry_of
from proctor.launch.slots import GpuSlots


class Execution(Protocol):
    """One running job."""

    async def wait(self) -> int:
        """Its exit status, 128 + n for signal n, when nothing of it is left."""
        ...

    def drain(self) -> None:
        """Ask it to finish what it has begun."""
        ...

    async def stop(self) -> None:
        """End it for certain; returns when nothing of it is left."""
        ...


class Executor(Protocol):
    """Starts a job on devices. Raises OSError if it cannot be started."""

    async def __call__(self, job: Job, devices: tuple[str, ...]) -> Execution: ...


@dataclass(slots=True)
class _Entry:
    job: Job
    status: JobStatus = field(default_factory=lambda: JobStatus(state=JobState.PENDING))
    execution: Execution | None = None
    task: asyncio.Task[None] | None = None
    cancelled: bool = False
    stopping: bool = False


class QueueLauncher:
    """Runs each job as soon as the jobs before it have got what they need.

    A job that waits for GPUs keeps its place: later jobs that want GPUs wait behind it, however few they want;
    later jobs without GPUs go ahead, since they take nothing that it waits for.
    """

    def __init__(self, executor: Executor, *, slots: GpuSlots, max_workers: int) -> None:
        self._executor = executor
        self._slots = slots
        self._max_workers = max_workers
        self._entries: dict[str, _Entry] = {}
        self._waiting: list[_Entry] = []
        self._running = 0
        self._changed = asyncio.Condition()
        self._stops: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.cancel()
        tasks = [entry.task for entry in self._entries.values() if entry.task is not None]
        await asyncio.gather(*tasks, *self._stops)

    async def submit(self, jobs: Sequence[Job]) -> None:
        """Queue all, or none."""
        seen = set(self._entries)
        for job in jobs:
            self._admit(job, seen)
            seen.add(job.id)
        for job in jobs:
            entry = self._entries[job.id] = _Entry(job)
            self._waiting.append(entry)
        self._start_what_fits()

    async def poll(self, *, wait_s: float = 0.0) -> Mapping[str, JobStatus]:
        """Every job's state."""
        before = self._snapshot()
        if wait_s > 0 and not all(status.state.final for status in before.values()):
            try:
                async with asyncio.timeout(wait_s), self._changed:
                    await self._changed.wait_for(lambda: self._snapshot() != before)
            except TimeoutError:
                pass
        return self._snapshot()

    async def cancel(self, ids: Collection[str] | None = None, *, drain: bool = False) -> None:
        """Drop what waits, ask what runs."""
        entries = list(self._entries.values()) if ids is None else [self._entry(job) for job in ids]
        for entry in entries:
            if entry.status.state.final or entry.stopping:
                continue
            entry.cancelled = True
            if entry in self._waiting:
                self._waiting.remove(entry)
                entry.status = replace(entry.status, state=JobState.CANCELLED)
            elif entry.execution is not None:
                self._end(entry, entry.execution, drain=drain)
            else:
                entry.stopping = not drain
        self._start_what_fits()
        await self._announce()

    async def capacity(self) -> Capacity:
        """What is free now."""
        return Capacity(
            workers_free=self._max_workers - self._running,
            workers=self._max_workers,
            gpu_slots_free=self._slots.free,
            gpu_slots=self._slots.total,
            most_gpus=self._slots.devices,
        )

    def log(self, job: str) -> Path:
        """Where the job writes."""
        return self._entry(job).job.log

    # ----------------------------------------------------------------------------------------------

    def _entry(self, job: str) -> _Entry:
        return entry_of(self._entries, job)

    def _admit(self, job: Job, taken: Collection[str]) -> None:
        see = "`launch.gpus`, CUDA_VISIBLE_DEVICES and nvidia-smi"
        check_job(job, taken, most_gpus=self._slots.devices, place="this machine", see=see)

    def _snapshot(self) -> dict[str, JobStatus]:
        return {job: entry.status for job, entry in self._entries.items()}

    async def _announce(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    def _start_what_fits(self) -> None:
        blocked = False
        for entry in list(self._waiting):
            if self._running >= self._max_workers:
                return
            if blocked and entry.job.gpus:
                continue
            devices = self._slots.take(entry.job.gpus)
            if devices is None:
                blocked = True
                continue
            self._waiting.remove(entry)
            self._running += 1
            entry.status = JobStatus(state=JobState.RUNNING, devices=devices)
            entry.task = asyncio.create_task(self._run(entry, devices), name=f"job {entry.job.id}")

    async def _run(self, entry: _Entry, devices: tuple[str, ...]) -> None:
        try:
            status = await self._outcome(entry, devices)
        finally:
            self._slots.give_back(devices)
            self._running -= 1
        entry.status = status
        self._start_what_fits()
        await self._announce()

    async def _outcome(self, entry: _Entry, devices: tuple[str, ...]) -> JobStatus:
        try:
            execution = entry.execution = await self._executor(entry.job, devices)
        except OSError as error:
            return JobStatus(state=JobState.FAILED, devices=devices, message=f"cannot be started: {error}")
        if entry.cancelled:
            self._end(entry, execution, drain=not entry.stopping)
        try:
            code = await execution.wait()
        except ProctorError as error:
            return JobStatus(state=JobState.FAILED, devices=devices, message=str(error))
        if code == 0:
            state = JobState.DONE
        else:
            state = JobState.CANCELLED if entry.cancelled else JobState.FAILED
        return JobStatus(state=state, returncode=code, devices=devices)

    def _end(self, entry: _Entry, execution: Execution, *, drain: bool) -> None:
        if drain:
            execution.drain()
            return
        entry.stopping = True
        task = asyncio.create_task(execution.stop())
        self._stops.add(task)
        task.add_done_callback(self._stops.discard)
