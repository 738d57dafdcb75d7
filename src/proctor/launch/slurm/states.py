"""Slurm's words for where a job stands: one table to our states."""

from __future__ import annotations

from typing import Final

from proctor.errors import LaunchError
from proctor.launch.launcher import JobState

STATES: Final = {
    "PENDING": JobState.PENDING,
    "REQUEUED": JobState.PENDING,
    "REQUEUED_CRON": JobState.PENDING,
    "REQUEUE_FED": JobState.PENDING,
    "REQUEUE_HOLD": JobState.PENDING,
    "RESV_DEL_HOLD": JobState.PENDING,
    "SPECIAL_EXIT": JobState.PENDING,
    "LAUNCH_FAILED": JobState.PENDING,
    "EXPEDITING": JobState.PENDING,
    "CONFIGURING": JobState.RUNNING,
    "POWER_UP_NODE": JobState.RUNNING,
    "RUNNING": JobState.RUNNING,
    "COMPLETING": JobState.RUNNING,
    "RESIZING": JobState.RUNNING,
    "SIGNALING": JobState.RUNNING,
    "STAGE_OUT": JobState.RUNNING,
    "STOPPED": JobState.RUNNING,
    "SUSPENDED": JobState.RUNNING,
    "UPDATE_DB": JobState.RUNNING,
    "COMPLETED": JobState.DONE,
    "CANCELLED": JobState.CANCELLED,
    "REVOKED": JobState.CANCELLED,
    "BOOT_FAIL": JobState.FAILED,
    "DEADLINE": JobState.FAILED,
    "FAILED": JobState.FAILED,
    "NODE_FAIL": JobState.FAILED,
    "OUT_OF_MEMORY": JobState.FAILED,
    "PREEMPTED": JobState.FAILED,
    "RECONFIG_FAIL": JobState.FAILED,
    "TIMEOUT": JobState.FAILED,
}
"""Long names of squeue and sacct, versions 20.11 to 26.05. A requeued job is PENDING even where it is held."""


def job_state(word: str) -> JobState:
    """Our state for Slurm's word, which may carry more: `CANCELLED by 1000`, `CANCELLED+`.

    Raises LaunchError for a word that is not in the table: unknown is not ended.
    """
    state = STATES.get(bare_word(word))
    if state is None:
        raise LaunchError(
            f"Slurm reports the job state {word!r}, which Proctor does not know; known: {', '.join(STATES)}",
            hint="this version of Slurm is newer than Proctor: please report it",
        )
    return state


def bare_word(word: str) -> str:
    """The state without what follows it."""
    return word.split()[0].rstrip("+").upper() if word.strip() else ""
