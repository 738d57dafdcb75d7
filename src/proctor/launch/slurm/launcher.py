"""Jobs as Slurm batch jobs, one each: the launcher seam over a cluster."""

from __future__ import annotations

import asyncio
import re
import shlex
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from proctor.config.slurm_values import clock
from proctor.errors import LimitReached
from proctor.launch.launcher import Capacity, Job, JobState, JobStatus, check_job, entry_of
from proctor.launch.slurm.cluster import Demand, Partition, check_demand, choose_partition, read_partitions
from proctor.launch.slurm.commands import SUBMIT_TIMEOUT_S
from proctor.launch.slurm.queue import read_accounting, read_queue
from proctor.launch.slurm.records import QueueRecord
from proctor.launch.slurm.scheduler import SlurmScheduler
from proctor.launch.slurm.submission import job_id

POLL_S: Final = 2.0
"""Between two looks at the queue while `poll` waits."""
LIMIT_RETRY_S: Final = 30.0
"""Between two attempts at what a limit of Slurm's has kept out."""
_SETTLE_S: Final = 10.0
"""How long a fresh job may be missing from the queue."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobTerms:
    """What every job of a launcher asks for, beside its GPUs."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    time_limit_s: float | None = None
    cpus: int = 1

    def flags(self) -> list[str]:
        """For sbatch."""
        stated = {"partition": self.partition, "account": self.account, "qos": self.qos}
        flags = [f"--{option}={value}" for option, value in stated.items() if value is not None]
        if self.time_limit_s is not None:
            flags.append(f"--time={clock(self.time_limit_s)}")
        return [*flags, "--nodes=1", "--ntasks=1", f"--cpus-per-task={self.cpus}"]


@dataclass(slots=True)
class _Entry:
    job: Job
    status: JobStatus = field(default_factory=lambda: JobStatus(state=JobState.PENDING))
    slurm_id: str = ""
    submitted: float = 0.0
    cancelled: bool = False


class SlurmLauncher:
    """Slurm decides who runs first and on which GPUs; `JobStatus.devices` stays empty.

    With `detach`, leaving the context leaves the jobs to Slurm; otherwise it ends them and waits until they have
    ended. At most `max_workers` of them are in the queue at a time, if that is given; the rest, and what a limit of
    Slurm's refuses, is submitted by later polls.
    """

    def __init__(
        self,
        scheduler: SlurmScheduler,
        partition: Partition,
        *,
        terms: JobTerms | None = None,
        max_workers: int | None = None,
        detach: bool = False,
        poll_s: float = POLL_S,
    ) -> None:
        self._scheduler = scheduler
        self._partition = partition
        self._terms = terms or JobTerms()
        self._max_workers = max_workers
        self._detach = detach
        self._poll_s = poll_s
        self._entries: dict[str, _Entry] = {}
        self._not_before = 0.0
        self._one_at_a_time = asyncio.Lock()

    @classmethod
    async def open(
        cls,
        scheduler: SlurmScheduler | None = None,
        *,
        terms: JobTerms | None = None,
        max_workers: int | None = None,
        detach: bool = False,
        poll_s: float = POLL_S,
    ) -> Self:
        """Find the cluster and the partition. Raises MissingTool, Unreachable, UnknownName, LaunchError."""
        scheduler = scheduler or await SlurmScheduler.open()
        terms = terms or JobTerms()
        demand = Demand(partition=terms.partition, time_limit_s=terms.time_limit_s, cpus_per_node=terms.cpus)
        partition = check_demand(demand, await read_partitions(scheduler.commands))
        return cls(scheduler, partition, terms=terms, max_workers=max_workers, detach=detach, poll_s=poll_s)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._detach:
            return
        await self.cancel()
        while not all(entry.status.state.final for entry in self._entries.values()):
            await self.poll(wait_s=self._poll_s)

    async def submit(self, jobs: Sequence[Job]) -> None:
        """Queue all, or none."""
        seen = set(self._entries)
        for job in jobs:
            self._admit(job, seen)
            seen.add(job.id)
        fresh = [_Entry(job) for job in jobs]
        self._entries.update((entry.job.id, entry) for entry in fresh)
        try:
            await self._submit_what_fits()
        except BaseException:
            for entry in fresh:
                del self._entries[entry.job.id]
            await self._scheduler.cancel(entry.slurm_id for entry in fresh if entry.slurm_id)
            raise

    async def poll(self, *, wait_s: float = 0.0) -> Mapping[str, JobStatus]:
        """Every job's state. Raises Unreachable, LaunchError if the queue cannot be read."""
        deadline = time.monotonic() + wait_s
        before = self._snapshot()
        while True:
            await self._refresh()
            await self._submit_what_fits()
            now = self._snapshot()
            left = deadline - time.monotonic()
            if now != before or left <= 0 or all(status.state.final for status in now.values()):
                return now
            await asyncio.sleep(min(left, self._poll_s))

    async def cancel(self, ids: Collection[str] | None = None, *, drain: bool = False) -> None:
        """Drop what waits, ask what runs. After SIGTERM Slurm's KillWait passes before SIGKILL."""
        entries = list(self._entries.values()) if ids is None else [self._entry(job) for job in ids]
        open_ones = [entry for entry in entries if not entry.status.state.final]
        for entry in open_ones:
            entry.cancelled = True
            if not entry.slurm_id:
                entry.status = JobStatus(state=JobState.CANCELLED)
        submitted = [entry.slurm_id for entry in open_ones if entry.slurm_id]
        if drain:
            # scancel itself looks at the state, so that a job that starts just now is told and not dropped.
            await self._scheduler.cancel(submitted, state="PENDING")
            await self._scheduler.cancel(submitted, signal="INT", state="RUNNING")
        else:
            await self._scheduler.cancel(submitted)

    async def capacity(self) -> Capacity:
        """What is free now in the partition, by sinfo."""
        partitions = await read_partitions(self._scheduler.commands)
        nodes = [node for node in choose_partition(self._partition.name, partitions).nodes if node.usable]
        cpus = sum(node.cpus for node in nodes)
        workers = self._max_workers if self._max_workers is not None else cpus // self._terms.cpus
        return Capacity(
            workers_free=max(0, workers - self._active()),
            workers=workers,
            gpu_slots_free=sum(node.gpus - node.gpus_used for node in nodes),
            gpu_slots=sum(node.gpus for node in nodes),
            most_gpus=max((node.gpus for node in nodes), default=0),
        )

    def log(self, job: str) -> Path:
        """Where the job writes."""
        return self._entry(job).job.log

    def slurm_id(self, job: str) -> str:
        """The id that Slurm gave it; empty while it is not submitted. Raises LaunchError for an unknown id."""
        return self._entry(job).slurm_id

    # ----------------------------------------------------------------------------------------------

    def _entry(self, job: str) -> _Entry:
        return entry_of(self._entries, job)

    def _admit(self, job: Job, taken: Collection[str]) -> None:
        place = f"a node of partition {self._partition.name!r}"
        see = "`sinfo -o '%P %G'`"
        check_job(job, taken, most_gpus=self._partition.most_gpus, place=place, see=see)

    def _snapshot(self) -> dict[str, JobStatus]:
        return {job: entry.status for job, entry in self._entries.items()}

    def _active(self) -> int:
        return sum(bool(entry.slurm_id) and not entry.status.state.final for entry in self._entries.values())

    async def _submit_what_fits(self) -> None:
        async with self._one_at_a_time:
            for entry in list(self._entries.values()):
                if entry.slurm_id or entry.status.state.final:
                    continue
                full = self._max_workers is not None and self._active() >= self._max_workers
                if full or time.monotonic() < self._not_before:
                    return
                try:
                    await self._send(entry)
                except LimitReached as limit:
                    entry.status = JobStatus(state=JobState.PENDING, message=limit.message)
                    self._not_before = time.monotonic() + LIMIT_RETRY_S
                    return

    async def _send(self, entry: _Entry) -> None:
        job = entry.job
        job.log.parent.mkdir(parents=True, exist_ok=True)
        # Slurm replaces %j and the like in the name of a log.
        log = str(job.log.absolute()).replace("%", "%%")
        flags = [f"--output={log}", "--open-mode=append", f"--job-name={_name(job.id)}", *self._terms.flags()]
        if job.cwd is not None:
            flags.append(f"--chdir={job.cwd.absolute()}")
        if job.gpus:
            flags.append(f"--gres=gpu:{job.gpus}")
        output = await self._scheduler.commands.call(
            *("sbatch", "--parsable", "--no-requeue", *flags),
            text=f"#!/bin/sh\nexec {shlex.join(job.argv)}\n",
            env=job.env,
            timeout_s=SUBMIT_TIMEOUT_S,
        )
        entry.slurm_id, entry.submitted = job_id(output.out), time.monotonic()

    async def _refresh(self) -> None:
        wanted = {e.slurm_id: e for e in self._entries.values() if e.slurm_id and not e.status.state.final}
        if not wanted:
            return
        asked = time.monotonic()
        records = await asyncio.to_thread(read_queue, self._scheduler.commands)
        known = {record.job: record for record in records}
        gone = {job for job, entry in wanted.items() if job not in known and entry.submitted + _SETTLE_S < asked}
        if gone:
            kept = await asyncio.to_thread(read_accounting, self._scheduler.commands, gone)
            known |= {record.job: record for record in kept or ()}
        for job, entry in wanted.items():
            if job in known:
                entry.status = _status(known[job], cancelled=entry.cancelled)
            elif job in gone:
                entry.status = JobStatus(
                    state=JobState.CANCELLED if entry.cancelled else JobState.FAILED,
                    message=f"Slurm knows job {job} no more; its log is {entry.job.log}",
                )


def _status(record: QueueRecord, *, cancelled: bool) -> JobStatus:
    state = record.stands
    if cancelled and state is JobState.FAILED:
        state = JobState.CANCELLED
    return JobStatus(state=state, returncode=record.exit_status, message=record.reason)


def _name(job: str) -> str:
    """A job name that any tool can show."""
    return re.sub(r"[^\w.-]+", "_", job)[:60] or "job"
