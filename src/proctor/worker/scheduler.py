"""Which scheduler started this worker, if any."""

from __future__ import annotations

from collections.abc import Mapping

from proctor.worker.assignment import Assignment
from proctor.worker.attempt import Scheduler


def scheduler_for(assignment: Assignment, environ: Mapping[str, str]) -> Scheduler | None:
    """The scheduler of the assignment's terms, if this process runs inside one of its jobs."""
    if assignment.slurm is None or not environ.get("SLURM_JOB_ID"):
        return None
    return None
