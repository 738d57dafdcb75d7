"""The workers of one model on this machine, as a local launcher takes them."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from proctor.api.context import RunContext
from proctor.api.targets import Target
from proctor.launch.launcher import Job as LaunchJob
from proctor.worker.assignment import Assignment


def local_workers(
    context: RunContext, target: Target, *, workers: int, cost_s: float, name: str = "", flags: Sequence[str] = ()
) -> list[LaunchJob]:
    """Write down what the workers of one model do, and give the command of each. They start in no order.

    `cost_s`: what the model owes, in seconds of one server; 0 where it is not planned yet. `name` stands before the
    model's own in ids and file names, so that a trial and a run keep apart; `flags` are further ones for each worker.
    The run's directory exists. Raises OSError if it cannot be written.
    """
    directory = context.directory
    job = target.job(context)
    file = f"{job.job_id}.json"
    job.write(directory.jobs / file)
    shape = f"{name}{job.job_id}"
    path = directory.assignments / f"{shape}.json"
    Assignment(shape=shape, jobs=(file,), costs=(cost_s,), workers=workers).write(path)
    return [
        LaunchJob(
            id=f"{shape}-{index}",
            argv=(sys.executable, "-m", "proctor.worker", str(directory.root), str(path), str(index), *flags),
            log=directory.logs / f"{shape}-{index}.log",
            gpus=job.gpus,
        )
        for index in range(workers)
    ]
