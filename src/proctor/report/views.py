"""What the verbs `run` and `status` show, as plain values; `proctor plan` shows `plan.views.Plan`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgressEvent:
    """The state of one worker at one moment. Counters are the worker's own, since it started, and only grow."""

    model: str
    worker: str = ""
    phase: str = "asking"
    """recording, starting, serving, asking, draining, waiting, scoring, done, failed."""
    requests: int = 0
    """Answered."""
    aliases: int = 0
    """Owed requests that needed no asking: the same question as one that was answered."""
    failed: int = 0
    failures: Mapping[str, int] = field(default_factory=dict[str, int])
    """By boundary."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    in_flight: int = 0
    message: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskStatus:
    """One task of one model: what the store holds of it."""

    model: str
    label: str = "main"
    task: str
    num_fewshot: int | None = None
    requests: int
    answered: int
    failed: int = 0
    failures: tuple[tuple[str, int], ...] = ()

    @property
    def owed(self) -> int:
        """Requests without an answer and without a final failure."""
        return max(0, self.requests - self.answered - self.failed)


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerStatus:
    """One worker, as its events tell."""

    worker: str
    model: str
    phase: str
    seen: float
    """Unix time of its last event, seconds."""
    requests: int = 0
    tokens_per_s: float | None = None
    requests_per_s: float | None = None
    in_flight: int = 0
    limits: tuple[int, ...] = ()
    """How many requests each server is given at a time."""
    why: tuple[str, ...] = ()
    """Where each of these numbers comes from."""
    core: float = 0.0
    """Share of a core that the asking takes, of its busiest process."""
    message: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class EndedAttempt:
    """One start of one worker that ended otherwise than it should."""

    job: str
    ending: str
    """One of `worker.attempt.Ending`."""
    host: str
    message: str
    hint: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class JobsStatus:
    """One array of workers, or the job that marks, on a cluster."""

    job: str
    shape: str
    elements: int
    pending: int = 0
    running: int = 0
    waits_for: tuple[tuple[str, int], ...] = ()
    """Why pending ones do not run, in the scheduler's words."""
    nodes: tuple[str, ...] = ()
    restarts: int = 0
    endings: tuple[tuple[str, int], ...] = ()
    """How attempts ended, and how many."""
    troubles: tuple[EndedAttempt, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedModel:
    """One model's plan beside what it took so far. Seconds of its servers' time."""

    model: str
    requests: int
    asked: int
    planned_s: float
    used_s: float
    expected_s: float | None = None
    """For the whole, at the pace so far."""
    tokens_ratio: float | None = None
    """Generated tokens a request, measured over planned."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelStarts:
    """How often something was started to answer for one model, and what that took in seconds of workers' time."""

    model: str
    starts: int
    seconds: float
    typical_s: float | None = None
    """Median of the starts that came to a first request."""
    reloads: int = 0
    """How often the weights were loaded into a server that ran already, and what that took."""
    reloading_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStatus:
    """A whole run."""

    run: str
    tasks: tuple[TaskStatus, ...]
    workers: tuple[WorkerStatus, ...] = ()
    jobs: tuple[JobsStatus, ...] = ()
    """On a cluster, oldest first."""
    queue_unread: str | None = None
    """Why nothing is known of the jobs: the queue could not be read."""
    plan: tuple[PlannedModel, ...] = ()
    starts: tuple[ModelStarts, ...] = ()
    """Of each model that a worker began with; a server that a worker starts again is not counted anew."""
    shards: int = 0
    """Of the latest plan."""
    shards_owed: int = 0
    """Those of which something is owed."""
    requests_per_s: float | None = None
    """Of the workers that are at work now."""
    eta_s: float | None = None
    """What is owed at that rate."""
    duplicates: int = 0
    """Answers that came twice, from two copies of one worker: the first counts."""
    damaged: int = 0
    """Rows of the store that could not be read; what they held is owed again."""
    forecast_s: float | None = None
    """Wall time that the plan foresaw."""
    elapsed_s: float | None = None
    now: float | None = None
    """Unix time of this status, seconds: workers' ages count from here."""

    @property
    def requests(self) -> int:
        """Over all models and tasks."""
        return sum(t.requests for t in self.tasks)

    @property
    def answered(self) -> int:
        """Over all models and tasks."""
        return sum(t.answered for t in self.tasks)

    @property
    def failed(self) -> int:
        """Over all models and tasks."""
        return sum(t.failed for t in self.tasks)

    @property
    def owed(self) -> int:
        """Over all models and tasks."""
        return sum(t.owed for t in self.tasks)
