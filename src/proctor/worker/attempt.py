"""This start of this worker: what to call it, who it is, when it must end, and how its work goes on afterwards."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Final, Protocol

from proctor.errors import ProctorError
from proctor.store import Owner
from proctor.store.owner import alive as alive_here
from proctor.worker.assignment import Assignment, SlurmTerms

FLUSH_S: Final = 30.0
"""Kept free at the end of an allocation for the journal, the server's stop and the requeue; less with a short lead."""


class Ending(StrEnum):
    """Why an attempt ended. The first eight are the words that eval-hive's users know."""

    SERVER_STARTUP_FAILED = "server_startup_failed"
    SERVER_DIED = "server_died_during_healthcheck"
    HEALTH_CHECK_FAILED = "health_check_failed"
    NODE_COUNT_MISMATCH = "node_count_mismatch"
    RESUBMISSION_FAILED = "resubmission_failed"
    MANUAL_CANCELLATION = "manual_cancellation"
    UNEXPECTED_SIGNAL = "unexpected_signal"
    EVAL_FAILURES = "eval_failures"
    DONE = "done"
    """Nothing was left that this worker could take."""
    REQUEUED = "requeued"
    """The time was up; the same job goes on."""
    SUCCEEDED_BY = "succeeded_by"
    """The time was up; a new job goes on."""
    NO_PROGRESS = "no_progress"
    """The time was up and nothing had been answered: another attempt would do no better."""
    ATTEMPTS_SPENT = "attempts_spent"
    NOT_REQUEUED = "not_requeued"
    """The time was up and the configuration says `requeue: never`."""
    PROBE_FAILED = "probe_failed"
    STORE_FAILED = "store_failed"
    CONFIGURATION = "configuration"


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptRecord:
    """What one start of one worker came to: a JSON file of its own, which nobody else writes."""

    worker: str
    job: str
    array_task: str
    restart: int
    host: str
    started: float
    ended: float
    ending: Ending
    answered: int
    failed: int
    models: tuple[str, ...]
    message: str = ""
    hint: str | None = None
    successor: str = ""
    """The job that goes on, after `succeeded_by`."""

    def write(self, directory: Path) -> None:
        """Put it in place in one step."""
        path = directory / f"{self.worker}.json"
        fresh = path.with_name(f".{path.name}.{os.getpid()}")
        fresh.write_text(json.dumps(asdict(self), indent=1), encoding="utf-8")
        fresh.replace(path)


def read_attempts(directory: Path) -> list[AttemptRecord]:
    """All that ended in order, oldest first; one that was killed left none."""
    found: list[AttemptRecord] = []
    for path in directory.glob("*.json") if directory.is_dir() else ():
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            found.append(AttemptRecord(**raw | {"ending": Ending(raw["ending"]), "models": tuple(raw["models"])}))
        except (OSError, ValueError, TypeError, KeyError):
            continue
    return sorted(found, key=lambda a: a.ended)


def earlier_attempts(records: Sequence[AttemptRecord], job: str, array_task: str) -> int:
    """How often this array element ran out of time before, through requeues and successors."""
    own = [r for r in records if r.array_task == array_task]
    count = sum(r.job == job and r.ending is Ending.REQUEUED for r in own)
    before = next((r for r in own if r.ending is Ending.SUCCEEDED_BY and r.successor == job and r.job != job), None)
    return count if before is None else count + 1 + earlier_attempts(own, before.job, array_task)


class Scheduler(Protocol):
    """What a worker needs of the scheduler that started it."""

    @property
    def cluster(self) -> str:
        """Its name: the same job id means another job elsewhere."""
        ...

    def is_live(self, job: str, array_task: str, restart: int, user: str = "") -> bool | None:
        """Whether that very attempt still runs by the scheduler's word; None: it does not answer. Blocks.

        `user`: whose it is, where that is known; of another's job not every scheduler tells.
        """
        ...

    async def ends_at(self, job: str, array_task: str) -> float | None:
        """Unix time at which the job's time is up; None without a limit. Raises LaunchError."""
        ...

    async def requeue(self, job: str, array_task: str) -> None:
        """Put this very job back into the queue; it is killed soon afterwards. Raises LaunchError."""
        ...

    async def submit_successor(self, script: str, *, array_task: str) -> str:
        """A new job for one element; its id. Raises LaunchError."""
        ...

    async def wait_for_all(self, name: str, prefix: str) -> None:
        """Let the waiting job `name` wait for every live job whose name has the prefix. Raises LaunchError."""
        ...


@dataclass(slots=True, kw_only=True)
class Attempt:
    """One start of one worker process."""

    index: int
    scheduler: Scheduler | None = None
    job: str = ""
    array_task: str = ""
    restart: int = 0
    started: float = field(default_factory=time.time)

    @classmethod
    def here(cls, index: int, environ: Mapping[str, str], scheduler: Scheduler | None) -> Attempt:
        """What the environment says of this process; without a scheduler a worker of this machine."""
        if scheduler is None:
            return cls(index=index)
        job = environ.get("SLURM_ARRAY_JOB_ID") or environ.get("SLURM_JOB_ID", "")
        return cls(
            index=index,
            scheduler=scheduler,
            job=job,
            array_task=environ.get("SLURM_ARRAY_TASK_ID", ""),
            restart=int(environ.get("SLURM_RESTART_COUNT") or 0),
        )

    @property
    def label(self) -> str:
        """Tells attempts apart in the names of files: two copies of one job never share one."""
        if self.scheduler is None:
            return str(self.index)
        task = f"_{self.array_task}" if self.array_task else ""
        return f"{self.job}{task}" + (f".{self.restart}" if self.restart else "")

    def owner(self, run: str) -> Owner:
        """Who holds the claims of this attempt."""
        return Owner.here(
            run=run,
            cluster=self.scheduler.cluster if self.scheduler else "",
            job=self.job,
            array_task=self.array_task,
            restart=self.restart,
        )

    def alive(self) -> Callable[[Owner], bool | None]:
        """The predicate for claims and segments of others: see `alive_with`.

        Another process with this attempt's own number is a copy that the controller has forgotten, as one that was
        killed does: dead, unless this machine sees it. The scheduler's word would be about this process.
        """
        others = alive_with(self.scheduler)
        mine = (self.scheduler.cluster, self.job, self.array_task, self.restart) if self.scheduler else None

        def alive(owner: Owner) -> bool | None:
            if mine == (owner.cluster, owner.job, owner.array_task, owner.restart):
                return alive_here(owner) or False
            return others(owner)

        return alive


def alive_with(scheduler: Scheduler | None) -> Callable[[Owner], bool | None]:
    """Whether an owner still runs.

    A process that this machine knows to be gone is dead. Of a job of the scheduler's cluster the scheduler's word on
    that very attempt holds: not a clock, and not a process that goes on after its node was given up.
    """

    def alive(owner: Owner) -> bool | None:
        here = alive_here(owner)
        if here is False or scheduler is None or not owner.job or owner.cluster != scheduler.cluster:
            return here
        word = scheduler.is_live(owner.job, owner.array_task, owner.restart, owner.user)
        return here if word is None else word

    return alive


def stop_at(ends_at: float, *, lead_s: float) -> float:
    """When to give up what is still in flight: a job that Slurm ends for its time limit is not requeued."""
    return ends_at - min(FLUSH_S, lead_s / 3)


def drain_at(ends_at: float, *, lead_s: float, slowest_s: float) -> float:
    """When to stop taking requests: early enough for what is in flight, as slow as the slowest of late, to end.

    Not much earlier than the signal would come, however slow: an attempt must be able to do something.
    """
    return stop_at(ends_at, lead_s=lead_s) - max(min(1.5 * slowest_s, 1.5 * lead_s), min(lead_s, 10.0))


@dataclass(frozen=True, slots=True, kw_only=True)
class Continuation:
    """What came of the wish to go on after the time was up."""

    ending: Ending
    message: str = ""
    hint: str | None = None
    successor: str = ""


async def carry_on(attempt: Attempt, assignment: Assignment, *, answered: int, earlier: int) -> Continuation:
    """Arrange that what this attempt still owes goes on.

    `earlier`: attempts of this element that ended because their time was up. An attempt that answered nothing
    ends the chain: the next would do no better.
    """
    terms, scheduler = assignment.slurm, attempt.scheduler
    if terms is None or scheduler is None:
        return Continuation(ending=Ending.DONE)
    again = "repeat `proctor submit` to continue"
    if answered == 0:
        return Continuation(
            ending=Ending.NO_PROGRESS,
            message="the time was up before anything was answered",
            hint="raise `launch.time_limit`, or see the server's log for what took so long",
        )
    if terms.requeue == "never":
        return Continuation(
            ending=Ending.NOT_REQUEUED, message="the time was up; `launch.requeue` is never", hint=again
        )
    if earlier + 1 >= terms.max_attempts:
        return Continuation(
            ending=Ending.ATTEMPTS_SPENT,
            message=f"the time was up {earlier + 1} times",
            hint=f"{again}, or raise `launch.max_attempts`",
        )
    refused = ""
    if terms.requeue != "successor":
        try:
            await scheduler.requeue(attempt.job, attempt.array_task)
        except ProctorError as error:
            refused = f"it was not requeued: {error.message}"
        else:
            return Continuation(ending=Ending.REQUEUED, message="the time was up")
    if terms.requeue != "requeue":
        try:
            job = await scheduler.submit_successor(terms.script, array_task=attempt.array_task)
        except ProctorError as error:
            refused = f"no successor was taken: {error.message}"
        else:
            message = f"the time was up; job {job} goes on" + await _marking_waits(scheduler, terms)
            return Continuation(ending=Ending.SUCCEEDED_BY, message=message, successor=job)
    return Continuation(ending=Ending.RESUBMISSION_FAILED, message=f"the time was up and {refused}", hint=again)


async def _marking_waits(scheduler: Scheduler, terms: SlurmTerms) -> str:
    """Let the job that marks wait for the successor too; what to add to the message if it does not."""
    if not terms.scoring:
        return ""
    try:
        await scheduler.wait_for_all(terms.scoring, terms.prefix)
    except ProctorError as error:
        return f"; marking does not wait for it ({error.message}): `proctor score` does it afterwards"
    return ""
