"""The task-source seam: what to ask."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from proctor.catalog.inputs import Inputs
from proctor.config.spec import TaskSpec
from proctor.records import Recording, Suite


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskInfo:
    """One line of `proctor tasks`."""

    name: str
    source: str
    kind: str
    """task, group, tag or file."""
    path: str = ""
    members: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """What one configuration entry was turned into, and from what."""

    suites: tuple[Suite, ...]
    recordings: tuple[Recording, ...]
    inputs: Inputs | None
    """None: not all of them are known."""
    unknown: tuple[str, ...] = ()
    """What is not known of the inputs, in words."""


class TaskSource(Protocol):
    """Lists and records. Implementations: lm_eval, native. Replay is `score.Replay`."""

    def list(self, *, include: Sequence[str] = ()) -> Sequence[TaskInfo]:
        """Every name that can be recorded. Cached: under a second after the first time."""
        ...

    def record(self, spec: TaskSpec) -> tuple[list[Suite], list[Recording]]:
        """Turn one configuration entry into suites and the recordings they refer to.

        Deterministic: the same entry, versions and data give the same fingerprints, whatever was recorded
        before and whatever caches hold. Raises UnknownName for a name, TaskError for a task that record
        and replay cannot express, HarnessError when the source's process fails.
        """
        ...
