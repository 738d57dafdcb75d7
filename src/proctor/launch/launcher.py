"""The launcher seam: commands in, states out. A launcher knows commands, not evaluations."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self, TypeVar

from proctor.errors import LaunchError, nearest

_Entry = TypeVar("_Entry")


class JobState(StrEnum):
    """Where a job stands; every scheduler's own words enter through one table to these."""

    PENDING = "pending"
    RUNNING = "running"
    DONE = "done"
    """Ended with status 0."""
    FAILED = "failed"
    """Ended otherwise, or could not be started."""
    CANCELLED = "cancelled"
    """Ended because it was asked to."""

    @property
    def final(self) -> bool:
        """Nothing changes any more."""
        return self in (JobState.DONE, JobState.FAILED, JobState.CANCELLED)


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One command. `id` is the caller's, unique within a launcher."""

    id: str
    argv: tuple[str, ...]
    log: Path
    """Gets standard output and standard error, appended."""
    env: Mapping[str, str] = field(default_factory=dict[str, str])
    """Over this process's own environment."""
    cwd: Path | None = None
    gpus: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class JobStatus:
    """What is known of one job."""

    state: JobState
    returncode: int | None = None
    """128 + n for signal n; None while there is none."""
    devices: tuple[str, ...] = ()
    """The GPUs it has, or had."""
    message: str = ""
    """Why it could not be started."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Capacity:
    """What could start now, and what could start at all."""

    workers_free: int
    workers: int
    gpu_slots_free: int
    gpu_slots: int
    most_gpus: int
    """The largest `gpus` that a job may ask for."""


def entry_of(entries: Mapping[str, _Entry], job: str) -> _Entry:
    """What a launcher keeps under the id. Raises LaunchError, with the nearest id, if there is none."""
    if job not in entries:
        near = nearest(job, entries)
        raise LaunchError(f"no job {job!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
    return entries[job]


def check_job(job: Job, taken: Collection[str], *, most_gpus: int, place: str, see: str) -> None:
    """Raises LaunchError for an id that is taken, no command, or more GPUs than `place` offers; `see` says where to
    look them up."""
    if job.id in taken:
        raise LaunchError(f"there is a job {job.id!r} already")
    if not job.argv:
        raise LaunchError(f"job {job.id!r} has no command")
    if job.gpus > most_gpus:
        raise LaunchError(
            f"job {job.id!r} wants {job.gpus} GPUs; {place} offers {most_gpus}",
            hint=f"lower the server's `gpus` (and its tensor_parallel_size), or see {see}",
        )


class Launcher(Protocol):
    """An async context manager: leaving it ends what it started, unless it was opened to leave jobs behind.

    Implementations: local, slurm (which alone has that choice, `detach`), fake.
    """

    async def __aenter__(self) -> Self: ...

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    async def submit(self, jobs: Sequence[Job]) -> None:
        """Queue all, in this order, or none. Raises LaunchError for what could never run and for an id in use."""
        ...

    async def poll(self, *, wait_s: float = 0.0) -> Mapping[str, JobStatus]:
        """The state of every job ever submitted, in one call. Waits up to `wait_s` for something to change."""
        ...

    async def cancel(self, ids: Collection[str] | None = None, *, drain: bool = False) -> None:
        """Ask jobs (None: all) to end, and return at once; what waits is dropped, what has ended stays as it is.

        With `drain` a running job gets SIGINT and all the time it wants; otherwise SIGTERM, and after the
        grace period SIGKILL. Raises LaunchError for an unknown id.
        """
        ...

    async def capacity(self) -> Capacity:
        """What is free now."""
        ...

    def log(self, job: str) -> Path:
        """Where the job writes. Raises LaunchError for an unknown id."""
        ...
