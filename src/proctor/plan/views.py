"""What `proctor plan` says: frozen, printable, JSON-able."""

from __future__ import annotations

from dataclasses import dataclass

from proctor.records import Shard


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskPlan:
    """One recording for one model."""

    task: str
    num_fewshot: int
    fingerprint: str
    requests: int
    answered: int
    failed: int
    """Refused for good: not asked again without --retry-failed."""
    owed: int
    cost_s: float
    labels: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelPlan:
    """Everything that one model is asked."""

    model: str
    display_name: str
    label: str
    weights: str
    resolution: str
    tasks: tuple[TaskPlan, ...]
    shards: tuple[Shard, ...]
    shared: int = 0
    """Requests that several of its tasks have in common: asked once."""
    damaged: int = 0
    """Damaged rows that the reader found in the store for these weights; what they held is owed again."""

    @property
    def owed(self) -> int:
        """Distinct requests still to be asked."""
        return sum(len(s.items) for s in self.shards)


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """What the owed work is expected to take."""

    requests: int
    shards: int
    server_seconds: float
    """Summed over servers; wall time is about this over the number of workers."""
    wall_s: float
    workers: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A run's whole plan."""

    run: str
    models: tuple[ModelPlan, ...]
    workers: int = 1

    @property
    def owed(self) -> int:
        """Requests still to be asked, over all models."""
        return sum(m.owed for m in self.models)

    @property
    def forecast(self) -> Forecast:
        """The cost model's estimate; relative sizes are better than absolute ones."""
        seconds = sum(s.cost_s for m in self.models for s in m.shards)
        return Forecast(
            requests=self.owed,
            shards=sum(len(m.shards) for m in self.models),
            server_seconds=seconds,
            wall_s=seconds / max(1, self.workers),
            workers=self.workers,
        )
