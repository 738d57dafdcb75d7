"""A run's jobs on a cluster: where they stand, how attempts ended, how to end them."""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from proctor.api.context import RunContext
from proctor.api.sent import SCORE, Sent, job_prefix, read_submissions
from proctor.launch.launcher import JobState
from proctor.launch.slurm.commands import Commands
from proctor.launch.slurm.queue import read_queue
from proctor.launch.slurm.records import QueueRecord
from proctor.launch.slurm.scheduler import SlurmScheduler
from proctor.report.views import EndedAttempt, JobsStatus
from proctor.worker.attempt import AttemptRecord, Ending, read_attempts

_IN_ORDER: Final = frozenset({Ending.DONE, Ending.REQUEUED, Ending.SUCCEEDED_BY})
"""Endings that call for nothing."""


def jobs_of(context: RunContext, commands: Commands | None = None) -> tuple[JobsStatus, ...]:
    """Every array that was sent for the run, oldest first; none where nothing was sent. Blocks.

    Raises MissingTool, Unreachable, LaunchError if the queue cannot be read: that is not an empty queue.
    """
    sent = read_submissions(context.directory)
    if not sent:
        return ()
    prefix = job_prefix(context)
    queue = [r for r in read_queue(commands or Commands()) if r.name.startswith(prefix)]
    by_array: dict[str, list[QueueRecord]] = defaultdict(list)
    for queued in queue:
        by_array[queued.array].append(queued)
    attempts: dict[str, list[AttemptRecord]] = defaultdict(list)
    for ended in read_attempts(context.directory.attempts):
        attempts[ended.job].append(ended)
    known = {s.job for s in sent}
    # Successors, and what a command sent that was killed before it could note it.
    late = [
        Sent(job=job, shape=_shape(records[0], prefix), name=records[0].name, elements=len(records), first=0, time=0.0)
        for job, records in by_array.items()
        if job not in known
    ]
    return tuple(_status(s, by_array.get(s.job, []), attempts.get(s.job, [])) for s in (*sent, *late))


def _shape(record: QueueRecord, prefix: str) -> str:
    return record.name.removeprefix(prefix)


def _status(sent: Sent, queued: Sequence[QueueRecord], attempts: Sequence[AttemptRecord]) -> JobsStatus:
    states = Counter(r.stands for r in queued)
    pending = [r for r in queued if r.stands is JobState.PENDING]
    return JobsStatus(
        job=sent.job,
        shape=sent.shape,
        elements=sent.elements,
        pending=states[JobState.PENDING],
        running=states[JobState.RUNNING],
        waits_for=tuple(sorted(Counter(r.reason for r in pending if r.reason).items())),
        nodes=tuple(sorted({r.nodes for r in queued if r.stands is JobState.RUNNING and r.nodes})),
        restarts=sum(r.restarts for r in queued),
        endings=tuple(sorted(Counter(a.ending.value for a in attempts).items())),
        troubles=tuple(
            EndedAttempt(
                job=f"{a.job}_{a.array_task}" if a.array_task else a.job,
                ending=a.ending.value,
                host=a.host,
                message=a.message,
                hint=a.hint,
            )
            for a in _latest(attempts)
            if a.ending not in _IN_ORDER
        )
        + (() if sent.shape == SCORE else _silent(queued, attempts)),
    )


def _silent(queued: Sequence[QueueRecord], attempts: Sequence[AttemptRecord]) -> tuple[EndedAttempt, ...]:
    """Elements of which Slurm says that they failed, and whose workers could not say why: killed, out of memory."""
    told = {(a.array_task, a.restart) for a in attempts}
    return tuple(
        EndedAttempt(
            job=r.id,
            ending=Ending.UNEXPECTED_SIGNAL.value,
            host=r.nodes,
            message=f"{r.state.lower()}, exit status {r.exit_status}: the worker left no word of its end",
            hint="`proctor logs` shows what it wrote; `proctor submit` continues",
        )
        for r in queued
        if r.stands is JobState.FAILED and (r.array_task, r.restarts) not in told
    )


def _latest(attempts: Sequence[AttemptRecord]) -> list[AttemptRecord]:
    """The last attempt of each element: what an earlier one ran into has been overcome."""
    last: Mapping[str, AttemptRecord] = {a.array_task: a for a in attempts}
    return list(last.values())


async def cancel(config: str | Path, overrides: Sequence[str] = ()) -> list[str]:
    """End every job of the run that waits or runs; their ids. What was answered is kept.

    Raises ConfigError, MissingTool, Unreachable, LaunchError.
    """
    context = RunContext.open(config, overrides)
    scheduler = await SlurmScheduler.open(Commands())
    prefix = job_prefix(context)
    queue = await asyncio.to_thread(read_queue, scheduler.commands)
    live = [r for r in queue if r.name.startswith(prefix) and not r.stands.final]
    # A whole array by its own id, so that elements that are not split off yet are ended too.
    await scheduler.cancel(sorted({r.array for r in live}))
    return sorted(r.id for r in live)
