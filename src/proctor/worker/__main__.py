"""`python -m proctor.worker RUN_DIRECTORY ASSIGNMENT INDEX [--offset N] [--retry-failed]`: one worker process.

The worker's number is INDEX + N: arrays count from 0 again where a work was sent in several.

SIGINT or SIGTERM once: finish what is in flight, keep it, exit 3 if work is owed. Twice: stop at once. SIGUSR1: the
time is nearly up: drain, and arrange that the rest goes on.
"""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

from proctor.errors import Incomplete, ProctorError
from proctor.worker.assignment import Assignment
from proctor.worker.attempt import Attempt
from proctor.worker.run_directory import RunDirectory
from proctor.worker.scheduler import scheduler_for
from proctor.worker.shift import Shift


async def work(directory: RunDirectory, assignment: Assignment, *, index: int, retry_failed: bool) -> bool:
    """Do one worker's share; whether nothing was left to it. Raises ProctorError; what was acknowledged is kept."""
    attempt = Attempt.here(index, os.environ, scheduler_for(assignment, os.environ))
    return await Shift(directory, assignment, attempt, retry_failed=retry_failed).work()


def main(arguments: list[str]) -> int:
    """Run one worker; the exit code is the error's."""
    run, assignment, index, *flags = arguments
    offset = int(flags[flags.index("--offset") + 1]) if "--offset" in flags else 0
    try:
        done = asyncio.run(
            work(
                RunDirectory(Path(run)),
                Assignment.read(Path(assignment)),
                index=int(index) + offset,
                retry_failed="--retry-failed" in flags,
            )
        )
    except ProctorError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    except (asyncio.CancelledError, KeyboardInterrupt):
        sys.stderr.write("stopped\n")
        return Incomplete.exit_code
    return 0 if done else Incomplete.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
