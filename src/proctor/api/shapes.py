"""Targets that need the same resources of a cluster: one array of workers serves them all."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

from proctor.api.cluster_profiles import settings_by_model
from proctor.api.context import RunContext
from proctor.api.images import with_local_image
from proctor.api.sent import job_name
from proctor.api.targets import Target
from proctor.config.clusters.settings import SlurmSettings
from proctor.plan import ModelPlan
from proctor.records import digest


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """One kind of job: what it asks the cluster for, and the models that its workers take."""

    id: str
    """Stable for one run directory and one kind of resources; part of the job's name."""
    name: str
    """The job's name in the queue."""
    settings: SlurmSettings
    gpus: int
    """On each node."""
    targets: tuple[Target, ...]
    plans: tuple[ModelPlan, ...]

    @property
    def cost_s(self) -> float:
        """Seconds of one server that the models owe."""
        return sum(p.cost_s for p in self.plans)

    @property
    def shards(self) -> int:
        return sum(p.shard_count for p in self.plans)


def shapes(
    context: RunContext,
    targets: Sequence[Target],
    plans: Sequence[ModelPlan],
    environ: Mapping[str, str],
    *,
    only: Sequence[str] = (),
) -> list[Shape]:
    """The owing targets by the resources that they need, in plan order; with `only`, those models alone.

    Workers for some models have a shape of their own: what waits for all models must not be counted for them.
    Raises ConfigError for a model whose launcher is not Slurm, UnknownName for a cluster that no profile knows,
    ModelError for a container image that the nodes could not get.
    """
    found: dict[str, Shape] = {}
    settings_of = settings_by_model(context, environ, only=dict.fromkeys(t.entry.name for t in targets))
    for target, plan in zip(targets, plans, strict=True):
        if not plan.owed or (only and target.id not in only and target.entry.name not in only):
            continue
        settings = with_local_image(context, settings_of[target.entry.name])
        gpus = -(-target.gpus // settings.nodes_per_server)
        key = _id(settings, gpus, only)
        if key in found:
            shape = found[key]
            found[key] = replace(shape, targets=(*shape.targets, target), plans=(*shape.plans, plan))
        else:
            found[key] = Shape(
                id=key,
                name=job_name(context, key),
                settings=settings,
                gpus=gpus,
                targets=(target,),
                plans=(plan,),
            )
    return list(found.values())


def _id(settings: SlurmSettings, gpus: int, only: Sequence[str]) -> str:
    stated = asdict(replace(settings, overrides=(), workers=None, throttle=None))
    text = json.dumps([stated, gpus, *sorted(only)], sort_keys=True, default=str)
    return digest(text)[:6]
