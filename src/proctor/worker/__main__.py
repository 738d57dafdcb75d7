"""`python -m proctor.worker RUN_DIRECTORY ASSIGNMENT INDEX [OPTIONS]`: one worker process.

The worker's number is INDEX + --offset: arrays count from 0 again where a work was sent in several.

With --plan-token TOKEN the plan is still being made: the first server is started, and work begins when the run has a
file plan-TOKEN.token; if it says `none`, nothing is owed.

SIGINT or SIGTERM once: finish what is in flight, keep it, exit 3 if work is owed. Twice: stop at once. SIGUSR1: the
time is nearly up: drain, and arrange that the rest goes on.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from pathlib import Path

from proctor.errors import Incomplete, ProctorError
from proctor.processes.garbage import collect_seldom
from proctor.worker.assignment import Assignment
from proctor.worker.attempt import Attempt
from proctor.worker.run_directory import RunDirectory
from proctor.worker.scheduler import scheduler_for
from proctor.worker.shift import Shift


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line above."""
    parser = argparse.ArgumentParser(prog="python -m proctor.worker")
    parser.add_argument("run", type=Path)
    parser.add_argument("assignment", type=Path)
    parser.add_argument("index", type=int)
    parser.add_argument("--offset", type=int, default=0)
    parser.add_argument("--retry-failed", action="store_true")
    parser.add_argument("--reason", action="append", default=[])
    parser.add_argument("--at-most", type=int)
    parser.add_argument("--plan-token")
    return parser.parse_args(arguments)


async def work(told: argparse.Namespace) -> bool:
    """Do one worker's share; whether nothing was left to it. Raises ProctorError; what was acknowledged is kept."""
    assignment = Assignment.read(told.assignment)
    attempt = Attempt.here(told.index + told.offset, os.environ, scheduler_for(assignment, os.environ))
    shift = Shift(
        RunDirectory(told.run),
        assignment,
        attempt,
        retry_failed=told.retry_failed,
        retry_reasons=frozenset(told.reason),
        at_most=told.at_most,
        plan_token=told.plan_token,
    )
    return await shift.work()


def main(arguments: list[str]) -> int:
    """Run one worker; the exit code is the error's."""
    told = parse(arguments)
    collect_seldom()
    try:
        done = asyncio.run(work(told))
    except ProctorError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    except (asyncio.CancelledError, KeyboardInterrupt):
        sys.stderr.write("stopped\n")
        return Incomplete.exit_code
    return 0 if done else Incomplete.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
