"""Which scheduler started this worker, if any."""

from __future__ import annotations

from collections.abc import Mapping

from proctor.errors import LaunchError
from proctor.launch.slurm.cluster import ClusterLimits
from proctor.launch.slurm.commands import Commands
from proctor.launch.slurm.scheduler import SlurmScheduler
from proctor.worker.assignment import Assignment
from proctor.worker.attempt import Scheduler


def scheduler_for(assignment: Assignment, environ: Mapping[str, str]) -> Scheduler | None:
    """The scheduler of the assignment's terms, if this process runs inside one of its jobs. Blocks."""
    if assignment.slurm is None or not environ.get("SLURM_JOB_ID"):
        return None
    return scheduler_here(environ)


def scheduler_here(environ: Mapping[str, str]) -> Scheduler:
    """The scheduler in whose job this process runs. Blocks.

    A controller that does not answer now stops no worker: the job knows its cluster's name. Raises LaunchError if it
    does not.
    """
    commands = Commands()
    try:
        return SlurmScheduler.connect(commands, environ=environ)
    except LaunchError:
        name = environ.get("SLURM_CLUSTER_NAME")
        if not name:
            raise
    limits = ClusterLimits(
        cluster=name,
        version="",
        max_array=1,
        max_jobs=0,
        keeps_s=0,
        hides_jobs=True,  # nothing may be concluded from a job that is not listed
        requeues=True,
        enforces_partitions=False,
    )
    return SlurmScheduler(commands, limits, environ=environ)
