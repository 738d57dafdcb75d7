"""Reading the queue: what is there, what a user has in it, and what became of what has left it."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import Final

from proctor.errors import LaunchError, MissingTool, Unreachable
from proctor.launch.slurm.commands import Commands
from proctor.launch.slurm.records import (
    QUEUE_FORMAT,
    SACCT_FIELDS,
    QueueRecord,
    parse_accounting,
    parse_pairs,
    parse_queue,
)

_NO_ACCOUNTING: Final = re.compile(r"accounting storage is disabled|slurmdbd|no cluster|not running", re.IGNORECASE)
_UNKNOWN_JOB: Final = re.compile(r"invalid job id", re.IGNORECASE)
_ASKED_AT_ONCE: Final = 100


def read_queue(commands: Commands) -> list[QueueRecord]:
    """This user's jobs and array tasks, those included that have just ended. Blocks.

    Raises Unreachable or LaunchError if the queue cannot be read: that is never an empty queue.
    """
    return parse_queue(commands.ask("squeue", "-a", "-h", "-r", "-t", "all", "--me", "-O", QUEUE_FORMAT))


def read_one(commands: Commands, job: str) -> list[QueueRecord] | None:
    """One job, or all tasks of one array, whoever's it is; None if the controller does not show it. Blocks.

    Raises Unreachable, LaunchError.
    """
    try:
        text = commands.ask("squeue", "-a", "-h", "-r", "-t", "all", "-j", job, "-O", QUEUE_FORMAT)
    except Unreachable:
        raise
    except LaunchError as error:
        if _UNKNOWN_JOB.search(error.message):
            return None
        raise
    return parse_queue(text) or None


def load(records: Sequence[QueueRecord]) -> int:
    """How many of them count against a limit of submitted jobs: those that wait or run."""
    return sum(not record.stands.final for record in records)


def read_accounting(commands: Commands, ids: Collection[str]) -> list[QueueRecord] | None:
    """What sacct knows of the jobs; None on a cluster that keeps no accounting. Blocks.

    Raises Unreachable, LaunchError.
    """
    found: list[QueueRecord] = []
    wanted = sorted(ids)
    for start in range(0, len(wanted), _ASKED_AT_ONCE):
        part = ",".join(wanted[start : start + _ASKED_AT_ONCE])
        try:
            found += parse_accounting(commands.ask("sacct", "-P", "-n", "-X", "-j", part, "-o", SACCT_FIELDS))
        except MissingTool:
            return None
        except Unreachable:
            raise
        except LaunchError as error:
            if _NO_ACCOUNTING.search(error.message):
                return None
            raise
    return found


async def read_job(commands: Commands, job: str) -> dict[str, str] | None:
    """`scontrol show job` of one job or `<array>_<task>`; None if the controller does not know it.

    Raises Unreachable, LaunchError.
    """
    try:
        text = await commands.query("scontrol", "-o", "show", "job", job)
    except Unreachable:
        raise
    except LaunchError as error:
        if _UNKNOWN_JOB.search(error.message):
            return None
        raise
    lines = [line for line in text.splitlines() if line.startswith("JobId=")]
    return parse_pairs(lines[0]) if lines else None
