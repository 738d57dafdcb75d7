"""What was sent to a cluster for a run, and the names of its jobs there."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from proctor.api.context import RunContext
from proctor.config.names import slug
from proctor.records import digest
from proctor.worker.run_directory import RunDirectory

SCORE: Final = "score"
"""The shape of the job that marks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sent:
    """One array, or the scoring job, in the queue: a line of the run's `submissions.jsonl`."""

    job: str
    shape: str
    name: str
    elements: int
    first: int
    """Number of its first worker among those of the shape."""
    time: float


def job_prefix(context: RunContext) -> str:
    """What the names of all of this run's jobs begin with, dash included; another run's never do."""
    where = digest(os.fspath(Path(context.directory.root).resolve()))[:8]
    return f"proctor-{slug(context.spec.name)[:40]}-{where}-"


def job_name(context: RunContext, shape: str) -> str:
    """Of the jobs of one shape."""
    return f"{job_prefix(context)}{shape}"


def read_submissions(directory: RunDirectory) -> list[Sent]:
    """Everything that was ever sent for this run, oldest first."""
    try:
        lines = directory.submissions.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    found: list[Sent] = []
    for line in lines:
        try:
            raw: dict[str, Any] = json.loads(line)
            found.append(Sent(**raw))
        except (ValueError, TypeError):
            continue  # half a line of a killed command: the queue still knows the job by its name
    return found
