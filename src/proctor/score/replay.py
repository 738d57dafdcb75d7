"""The marking seam: given the answers, compute the metrics with the task source's own rules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from proctor.records import Answer, Coverage, Recording, SampleScore, Suite


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricValue:
    """One metric of one task or group, as its source computes it."""

    task: str
    metric: str
    filter: str
    value: float | None
    stderr: float | None
    """As the source prints it; None where it prints none."""
    n: int
    """Documents scored."""
    n_expected: int
    higher_is_better: bool | None
    is_group: bool = False
    num_fewshot: int | None = None
    task_version: str = ""
    fingerprint: str = ""
    """Of the leaf's recording; the suite's id for a group."""
    low: float | None = None
    high: float | None = None
    coverage: Coverage
    missing_members: tuple[str, ...] = ()
    """Group: members that have no score. The value is then None, never an average of the rest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Marks:
    """What marking one suite for one model yields."""

    values: tuple[MetricValue, ...]
    samples: tuple[SampleScore, ...]
    raw: str = "{}"
    """JSON text of the source's own results object, where it has one."""


class Replay(Protocol):
    """Marks a suite. Implementations: score.lm_eval, score.native. Needs no GPU and no network."""

    def mark(self, suite: Suite, recordings: Sequence[Recording], answers: Mapping[str, Answer]) -> Marks:
        """Compute every metric of the suite from the answers, by request key.

        A document with a missing or failed answer is left out, counted in the coverage, and never scored
        as wrong. Raises HarnessError when the source disagrees with its recording.
        """
        ...
