"""What `proctor plan` says: frozen, printable, JSON-able."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from proctor.plan.cuts import MIN_SHARD_S
from proctor.plan.forecast import Recommendation, recommended_workers
from proctor.plan.shards import Shards
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
    prompt_tokens: int = 0
    """Expected of what is owed, like the cost: a request that several tasks share counts for the first of them."""
    completion_tokens: int = 0
    labels: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelPlan:
    """Everything that one model is asked. Models that owe the same share `tasks` and what `shards` are made of."""

    model: str
    display_name: str
    label: str
    weights: str
    resolution: str
    tasks: tuple[TaskPlan, ...]
    shards: Sequence[Shard]
    cost_s: float = 0.0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    longest_s: float = 0.0
    """Of one request."""
    startup_s: float = 0.0
    """Expected from the start of a worker to its first request."""
    startup: str = "prior"
    """Where that comes from: prior, or measured on so many starts."""
    gpus: int = 0
    """For each worker."""
    gpus_reason: str = ""
    """Why so many, where `gpus: auto` has decided."""
    workers: int = 1
    """For which the shards are cut."""
    rates: str = "prior"
    """Where the cost model's rates come from: prior, or measured on so many workers."""
    shared: int = 0
    """Requests that several of its tasks have in common: asked once."""
    damaged: int = 0
    """Damaged rows that the reader found in the store for these weights; what they held is owed again."""

    @property
    def largest_shard_s(self) -> float:
        """What the dearest shard is predicted to take, in seconds; 0 where there is none.

        Of shards that nobody has looked at yet: no shard takes longer.
        """
        if isinstance(self.shards, Shards):
            cut = self.shards.cut
            if cut.made:
                return int(cut.cost_us.max(initial=0)) / 1e6
            return max(self.longest_s, min(self.cost_s, cut.sizes.largest_s))
        return max((s.cost_s for s in self.shards), default=0.0)

    @property
    def shard_count(self) -> int:
        """Shards; of those that nobody has looked at yet, about so many."""
        return self.shards.cut.about() if isinstance(self.shards, Shards) else len(self.shards)

    @property
    def counted(self) -> bool:
        """Whether `shard_count` is exact."""
        return not isinstance(self.shards, Shards) or self.shards.cut.made or not self.shards

    @property
    def owed(self) -> int:
        """Distinct requests still to be asked."""
        if isinstance(self.shards, Shards):
            return self.shards.cut.requests
        return sum(len(s.items) for s in self.shards)


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """What the owed work is expected to take. Times in seconds."""

    requests: int
    shards: int
    counted: bool
    """Whether `shards` is exact: of hundreds of models that owe different large sets it is an estimate."""
    jobs: int
    """Workers that will start: no model has more than it has shards."""
    server_seconds: float
    """Work alone, summed over servers."""
    wall_s: float
    """With start-up, when the models run one after the other on `workers` workers."""
    gpu_hours: float
    """Of held GPUs, start-up included; of workers, where a worker has no GPU."""
    prompt_tokens: int
    completion_tokens: int
    workers: int
    recommendation: Recommendation
    """How many workers pay for this work, whichever models they serve."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A run's whole plan."""

    run: str
    models: tuple[ModelPlan, ...]
    workers: int = 1
    strategy: str = "balanced"

    @property
    def owed(self) -> int:
        """Requests still to be asked, over all models."""
        return sum(m.owed for m in self.models)

    @property
    def forecast(self) -> Forecast:
        """The cost model's estimate; relative sizes are better than absolute ones until rates are measured."""
        owing = [m for m in self.models if m.owed]
        seconds = sum(m.cost_s for m in owing)
        shards = [m.shard_count for m in owing]
        jobs = [min(m.workers, n) for m, n in zip(owing, shards, strict=True)]
        held = [m.cost_s + n * m.startup_s for m, n in zip(owing, jobs, strict=True)]
        return Forecast(
            requests=self.owed,
            shards=sum(shards),
            counted=all(m.counted for m in owing),
            jobs=sum(jobs),
            server_seconds=seconds,
            wall_s=sum(m.startup_s + max(m.longest_s, m.cost_s / n) for m, n in zip(owing, jobs, strict=True)),
            gpu_hours=sum(max(1, m.gpus) * s for m, s in zip(owing, held, strict=True)) / 3600,
            prompt_tokens=sum(m.prompt_tokens for m in owing),
            completion_tokens=sum(m.completion_tokens for m in owing),
            workers=self.workers,
            recommendation=recommended_workers(
                seconds,
                startup_s=max((m.startup_s for m in owing), default=0.0),
                floor_s=MIN_SHARD_S,
                longest_s=max((m.longest_s for m in owing), default=0.0),
            ),
        )
