"""One Slurm cluster as a running job and a login node need it."""

from __future__ import annotations

import asyncio
import os
import pwd
import re
from collections.abc import Iterable, Mapping
from typing import Final, Self

from proctor.errors import LaunchError, Unreachable
from proctor.launch.launcher import JobState
from proctor.launch.slurm.attempts import Attempts
from proctor.launch.slurm.cluster import ClusterLimits, limits_of, read_limits
from proctor.launch.slurm.commands import Commands
from proctor.launch.slurm.queue import read_job, read_queue
from proctor.launch.slurm.records import moment, parse_settings
from proctor.launch.slurm.submission import Submission, submit

CANCELLED_AT_ONCE: Final = 100
"""Ids in one scancel: a command line has a length, and the controller other users."""
_TRIES: Final = 10
_AFTER: Final = re.compile(r"afterany:(\d+)")
_GONE: Final = re.compile(r"invalid job id|already (?:completing|completed|finished)", re.IGNORECASE)


def task_id(job: str, array_task: str) -> str:
    """What scontrol and scancel take for one element: a bare array id means all of them."""
    return f"{job}_{array_task}" if array_task else job


def _user_name() -> str:
    """As `store.owner.user_name`, which is in a package beside this one."""
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return str(os.geteuid())


class SlurmScheduler:
    """Where this process's jobs live. `job` is the id that sbatch printed, the array's for an array task."""

    def __init__(
        self, commands: Commands, limits: ClusterLimits, *, environ: Mapping[str, str] | None = None, user: str = ""
    ) -> None:
        """`user`: whose jobs are ours; empty: of this process."""
        self.commands: Final = commands
        self.limits: Final = limits
        self.attempts: Final = Attempts(commands, hides_jobs=limits.hides_jobs)
        self._environ = dict(environ or {})
        self._user = user or _user_name()

    @classmethod
    async def open(cls, commands: Commands | None = None, *, environ: Mapping[str, str] | None = None) -> Self:
        """Ask the controller who it is. `environ` is that of a job, for what it knows without asking.

        Raises MissingTool, Unreachable, LaunchError.
        """
        commands = commands or Commands()
        return cls(commands, await read_limits(commands), environ=environ)

    @classmethod
    def connect(cls, commands: Commands | None = None, *, environ: Mapping[str, str] | None = None) -> Self:
        """As `open`, for code that blocks."""
        commands = commands or Commands()
        limits = limits_of(parse_settings(commands.ask("scontrol", "show", "config")))
        return cls(commands, limits, environ=environ)

    @property
    def cluster(self) -> str:
        """ClusterName: the same job id means another job on another cluster."""
        return self.limits.cluster

    def is_live(self, job: str, array_task: str, restart: int, user: str = "") -> bool | None:
        """As `Attempts.is_live`; `user`: whose job it is, if that is known."""
        mine = user == self._user if user else None
        return self.attempts.is_live(job, array_task, restart, mine=mine)

    async def ends_at(self, job: str, array_task: str) -> float | None:
        """Unix time at which the job will be ended; None without a limit. Preemption with notice brings it forward.

        Without an answer from the controller what the job was told at its start counts. Raises Unreachable if
        there is neither; LaunchError for an unknown job.
        """
        told = self._environ.get("SLURM_JOB_END_TIME", "")
        try:
            shown = await read_job(self.commands, task_id(job, array_task))
        except Unreachable:
            if told.isdigit():
                return float(told)
            raise
        if shown is None:
            raise LaunchError(f"Slurm does not know job {task_id(job, array_task)}", hint="see `squeue --me -t all`")
        if shown.get("TimeLimit", "").upper() == "UNLIMITED":
            return None
        return moment(shown.get("EndTime", ""))

    async def requeue(self, job: str, array_task: str) -> None:
        """Put it back into the queue: Slurm ends it and starts it again, at least a few seconds later.

        Raises LaunchError where it may not be requeued, or does not run.
        """
        name = task_id(job, array_task)
        output = await self.commands.call("scontrol", "requeue", name)
        # scontrol ends with 0 even where it did nothing.
        if output.err.strip():
            raise LaunchError(
                f"job {name} was not requeued: {output.err.strip()}",
                hint=f"see `scontrol show job {name}` (Requeue=, JobState=)",
            )

    async def submit_successor(self, script: str, *, array_task: str) -> str:
        """A new job for one element, an array of that one index; its id. Raises LaunchError."""
        return await submit(self.commands, Submission(script=script, array=array_task or None))

    async def wait_for_all(self, name: str, prefix: str) -> None:
        """Let the pending job called `name` wait for every live job whose name begins with `prefix` to end.

        Several may do this at once: each looks again after it has written, so none that was there then is forgotten.
        Raises LaunchError, also where there is no such job, or it does not wait any more.
        """
        for _ in range(_TRIES):
            queue = await asyncio.to_thread(read_queue, self.commands)
            live = [r for r in queue if r.name.startswith(prefix) and not r.stands.final]
            waiting = next((r for r in live if r.name == name and r.stands is JobState.PENDING), None)
            shown = None if waiting is None else await read_job(self.commands, waiting.id)
            if waiting is None or shown is None:
                raise LaunchError(f"no job {name!r} waits", hint="see `squeue --me`")
            wanted = {r.array for r in live if r.name != name}
            there = set(_AFTER.findall(shown.get("Dependency", "")))
            if wanted <= there:
                return
            after = ":".join(sorted(wanted | there, key=int))
            await self.commands.call("scontrol", "update", f"JobId={waiting.id}", f"Dependency=afterany:{after}")
        raise LaunchError(f"the dependency of job {name!r} keeps changing", hint="see `squeue --me`")

    async def release(self, ids: Iterable[str]) -> None:
        """Let held jobs or elements start. Raises Unreachable, LaunchError."""
        for name in ids:
            await self.commands.call("scontrol", "release", name)

    async def cancel(self, ids: Iterable[str], *, signal: str | None = None, state: str | None = None) -> None:
        """End jobs, arrays (`12`) or elements (`12_3`); with `signal` tell the batch script only, such as INT.

        `state`: only those that are PENDING, RUNNING or SUSPENDED, as the controller sees them. What has ended
        already is no error. Raises Unreachable, LaunchError.
        """
        wanted = list(dict.fromkeys(ids))
        flags = [] if signal is None else [f"--signal={signal}", "--batch"]
        flags += [] if state is None else [f"--state={state}"]
        for start in range(0, len(wanted), CANCELLED_AT_ONCE):
            try:
                await self.commands.call("scancel", *flags, *wanted[start : start + CANCELLED_AT_ONCE])
            except Unreachable:
                raise
            except LaunchError as error:
                if not _GONE.search(error.message):
                    raise
