"""Script texts into the queue: in as few sbatch calls as the limits allow, and never more than fits."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from typing import Final

from proctor.errors import LaunchError, LimitReached
from proctor.launch.slurm.commands import SUBMIT_TIMEOUT_S, Commands
from proctor.launch.slurm.queue import load, read_queue

_JOB: Final = re.compile(r"(\d+)(?:;\S+)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """Array elements that one sbatch submits: `size` of them, of which the first is the whole's number `offset`.

    An array's indices begin at 0 again in every chunk, since no index may reach MaxArraySize.
    """

    offset: int
    size: int

    def spec(self, throttle: int | None = None) -> str:
        """For --array: `0-99%8`."""
        last = f"-{self.size - 1}" if self.size > 1 else ""
        return f"0{last}" + (f"%{throttle}" if throttle else "")


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """One call of sbatch. The script's own directives hold for all that is not stated here."""

    script: str
    array: str | None = None
    """Indices and throttle, such as `0-99%8`."""
    dependency: str | None = None
    """Such as `afterany:123`; a job whose dependency can never come true is removed by Slurm."""
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    env: Mapping[str, str] = field(default_factory=dict[str, str])
    """Over this process's environment, which a job inherits unless its script says --export=NONE."""
    cwd: Path | None = None

    def argv(self) -> tuple[str, ...]:
        """The command; the script goes to its standard input."""
        stated = {
            "array": self.array,
            "dependency": self.dependency,
            "partition": self.partition,
            "account": self.account,
            "qos": self.qos,
            "chdir": None if self.cwd is None else str(self.cwd),
        }
        flags = [f"--{option}={value}" for option, value in stated.items() if value is not None]
        if self.dependency is not None:
            flags.append("--kill-on-invalid-dep=yes")
        return ("sbatch", "--parsable", *flags)


@dataclass(frozen=True, slots=True, kw_only=True)
class Submitted:
    """What a submission of many elements came to."""

    jobs: tuple[tuple[Chunk, str], ...]
    """What is in the queue now, with the array's id."""
    owed: int
    """Elements that are not; the last ones of the whole."""
    stopped_by: LaunchError | None = None
    """Why: a LimitReached, or what made a later chunk fail."""


async def submit(commands: Commands, submission: Submission) -> str:
    """The id of the new job. All of an array is accepted or none.

    Raises LimitReached for a limit, UnknownName and LaunchError for what Slurm refuses, Unreachable if the
    controller does not answer: where sbatch itself ran out of time, the job may be in the queue all the same.
    """
    output = await commands.call(
        *submission.argv(), text=submission.script, env=submission.env, timeout_s=SUBMIT_TIMEOUT_S
    )
    return job_id(output.out)


def job_id(text: str) -> str:
    """What `sbatch --parsable` printed, without the cluster's name. Raises LaunchError for anything else."""
    lines = text.split()
    found = _JOB.fullmatch(lines[-1]) if lines else None
    if found is None:
        raise LaunchError(f"sbatch printed no job id but {text.strip()!r}", hint="see `squeue --me`")
    return found.group(1)


def chunks(count: int, *, max_array: int, room: int | None = None) -> list[Chunk]:
    """`count` elements in as few chunks as MaxArraySize allows, as even as possible; at most `room` of them all.

    Raises ValueError for a MaxArraySize of less than 1.
    """
    if max_array < 1:
        raise ValueError(f"MaxArraySize {max_array} allows no arrays")
    total = count if room is None else max(0, min(count, room))
    number = -(-total // max_array)
    sizes = [total // number + (index < total % number) for index in range(number)]
    return [Chunk(offset=end - size, size=size) for end, size in zip(accumulate(sizes), sizes, strict=True)]


async def room_left(commands: Commands, queue_limit: int | None) -> int | None:
    """How many more jobs this user may submit; None without a limit. An unreadable queue raises: it is not empty."""
    if queue_limit is None:
        return None
    records = await asyncio.to_thread(read_queue, commands)
    return max(0, queue_limit - load(records))


async def submit_elements(
    commands: Commands,
    render: Callable[[Chunk], Submission],
    count: int,
    *,
    max_array: int,
    queue_limit: int | None = None,
    throttle: int | None = None,
) -> Submitted:
    """Submit `count` elements, as many as the limits take. The throttle holds for each array.

    At a limit of unknown size smaller arrays are tried until one element does not fit. What a first sbatch
    raises is raised, except LimitReached; later failures end the submission and are returned with what is owed.
    """
    room = await room_left(commands, queue_limit)
    jobs: list[tuple[Chunk, str]] = []
    stopped: LaunchError | None = None
    if room is not None and room < count:
        stopped = LimitReached(
            f"the queue limit of {queue_limit} jobs leaves room for {room} of {count}",
            limit="queue_limit",
            hint="wait for jobs to end (`squeue --me`) and repeat the command",
        )
    waiting = chunks(count, max_array=max_array, room=room)
    done = 0
    while waiting:
        chunk = waiting.pop(0)
        try:
            job = await submit(commands, replace(render(chunk), array=chunk.spec(throttle)))
        except LimitReached as limit:
            stopped = limit
            # A full queue of the whole cluster takes two minutes to refuse; halving would take them again and again.
            half = chunk.size // 2 if limit.limit != "MaxJobCount" else 0
            waiting = [Chunk(offset=chunk.offset, size=half)] if half else []
            continue
        except LaunchError as error:
            if not jobs:
                raise
            stopped = error
            break
        jobs.append((chunk, job))
        done = chunk.offset + chunk.size
        if isinstance(stopped, LimitReached) and stopped.limit != "queue_limit" and not waiting:
            # What was accepted after a refusal leaves less room than was refused: try half of it once more.
            waiting = [Chunk(offset=done, size=chunk.size // 2)] if chunk.size > 1 else []
    return Submitted(jobs=tuple(jobs), owed=count - done, stopped_by=stopped if done < count else None)
