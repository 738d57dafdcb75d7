"""The arithmetic of published launchers: batches of a parallel job (eval-hive), arrays of jobs (oellm). Pure.

Given so that their numbers can be reproduced and compared. `arrays.ArrayPlan` says what oellm does not: whether
the work fits the time limit that it asks for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil, floor
from typing import Final

MAX_ARRAY: Final = 128
MINUTES_A_JOB: Final = 18 * 60
"""Work that the floor of the array's length aims at for each job."""
MAX_HOURS: Final = 23
MIN_HOURS: Final = 3

SUBTASK_MINUTES: Final[Mapping[str, int]] = {
    "belebele": 8,
    "flores": 6,
    "xnli": 6,
    "xcopa": 6,
    "xstory_cloze": 6,
    "paws-x": 6,
    "hellaswag": 20,
}
"""Minutes for each subtask of a task, by its exact name in lower case; 5 for any other."""


def effective_batch(remaining: int, parallel: int, batch: int) -> int:
    """Tasks a batch, so that no slot is idle: 1 for R ≤ P, else min(B, ⌈R/P⌉)."""
    return 1 if remaining <= parallel else min(batch, ceil(remaining / parallel))


def batch_count(remaining: int, parallel: int, batch: int) -> int:
    """How many consecutive batches of the effective size there are."""
    return ceil(remaining / effective_batch(remaining, parallel, batch))


def abort_threshold(parallel: int) -> int:
    """Consecutive failures after which a parallel job gives up: ⌊(P + 1)/2⌋ + 1."""
    return (parallel + 1) // 2 + 1


def task_minutes(task: str, subtasks: int) -> int:
    """Minutes that oellm reckons for one evaluation: max(10, subtasks × minutes + 3)."""
    return max(10, subtasks * SUBTASK_MINUTES.get(task.lower(), 5) + 3)


@dataclass(frozen=True, slots=True, kw_only=True)
class ArrayPlan:
    """An array of jobs, each with the same number of evaluations."""

    array: int
    evals_per_job: int
    hours: int
    """Asked for; the limit is one minute below the next full hour."""
    hours_needed: int
    """What the work takes with the safety factor, without the cap."""

    @property
    def time_limit(self) -> str:
        """HH:59:00."""
        return f"{self.hours:02d}:59:00"

    @property
    def fits(self) -> bool:
        """Whether a job ends before its limit; published planners cap it silently."""
        return self.hours_needed <= self.hours


def plan_array(minutes: Sequence[float], capacity: int, *, max_array: int = MAX_ARRAY) -> ArrayPlan | None:
    """The array for evaluations of these minutes each; None where nothing is owed or the queue has no room.

    desired = min(max_array, N), but at least ⌈Σ minutes / 1080⌉; array = min(capacity, desired, N);
    evaluations a job = ⌈N / array⌉; hours = min(23, max(3, ⌈⌊1.2 · minutes of a job⌋ / 60⌉)).
    """
    count = len(minutes)
    if count == 0 or capacity <= 0:
        return None
    total = sum(minutes)
    array = min(capacity, max(min(max_array, count), max(1, ceil(total / MINUTES_A_JOB))), count)
    each = max(1, ceil(count / array))
    needed = max(MIN_HOURS, ceil(floor(1.2 * each * total / count) / 60))
    return ArrayPlan(array=array, evals_per_job=each, hours=min(MAX_HOURS, needed), hours_needed=needed)


def array_rows(index: int, evals_per_job: int, count: int) -> range:
    """The rows, from 1, of array element `index`, from 0: i·E + 1 .. min((i + 1)·E, N). May be empty."""
    return range(index * evals_per_job + 1, min((index + 1) * evals_per_job, count) + 1)


def array_range(count: int, max_running: int) -> str:
    """`0-{n-1}%{max}`: the argument of sbatch's --array."""
    if count < 1 or max_running < 1:
        raise ValueError(f"an array of {count} elements, {max_running} at a time")
    return f"0-{count - 1}%{max_running}"
