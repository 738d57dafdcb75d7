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
_ASKED_AT_ONCE: Final = 100


def read_queue(commands: Commands, *, everyone: bool = False) -> list[QueueRecord]:
    """This user's jobs and array tasks, those included that have just ended; or everyone's. Blocks.

    Raises Unreachable or LaunchError if the queue cannot be read: that is never an empty queue.
    """
    scope = () if everyone else ("--me",)
    return parse_queue(commands.ask("squeue", "-h", "-r", "-t", "all", *scope, "-O", QUEUE_FORMAT))


def load(records: Sequence[QueueRecord]) -> int:
    """How many of them count against a limit of submitted jobs: those that wait or run."""
    return sum(not record.stands.final for record in records)


async def read_accounting(commands: Commands, ids: Collection[str]) -> list[QueueRecord] | None:
    """What sacct knows of the jobs; None on a cluster that keeps no accounting. Raises Unreachable, LaunchError."""
    found: list[QueueRecord] = []
    wanted = sorted(ids)
    for start in range(0, len(wanted), _ASKED_AT_ONCE):
        part = ",".join(wanted[start : start + _ASKED_AT_ONCE])
        try:
            found += parse_accounting(await commands.query("sacct", "-P", "-n", "-X", "-j", part, "-o", SACCT_FIELDS))
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
        if "job id" in error.message.lower():
            return None
        raise
    lines = [line for line in text.splitlines() if line.startswith("JobId=")]
    return parse_pairs(lines[0]) if lines else None
