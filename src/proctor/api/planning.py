"""Requests to shards: what each model owes, given what the store holds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from proctor.api.context import RunContext
from proctor.api.recording import planned_suites
from proctor.api.targets import Target, resolve_targets
from proctor.plan import CostModel, ModelPlan, OwedTask, Plan, TaskPlan, cut_shards
from proctor.records import Suite
from proctor.store import Answers, Store
from proctor.store.recording import Outline


def plan(config: str | Path, overrides: Sequence[str] = (), *, retry_failed: bool = False) -> Plan:
    """What the run asks, what is answered, what is owed and its cost. Asks nothing.

    Uses the requests that the last run or prepare recorded; records them if there are none, or if `tasks:` has changed.
    """
    context = RunContext.open(config, overrides)
    store = context.store(create=True)
    suites = planned_suites(context, store)
    return make_plan(context, store, resolve_targets(context, store), suites, retry_failed=retry_failed)


def make_plan(
    context: RunContext,
    store: Store,
    targets: Sequence[Target],
    suites: Sequence[Suite],
    *,
    retry_failed: bool = False,
) -> Plan:
    """The difference between what was recorded and what is answered. Reads, writes nothing. Raises StoreError."""
    fingerprints = list(dict.fromkeys(fp for s in suites for fp in s.recordings))
    outlines = {fp: store.recording_outline(fp) for fp in fingerprints}
    models = tuple(_model_plan(store, t, outlines, retry_failed=retry_failed) for t in targets)
    return Plan(run=context.spec.name, models=models, workers=max(t.workers for t in targets))


def _model_plan(store: Store, target: Target, outlines: dict[str, Outline], *, retry_failed: bool) -> ModelPlan:
    answers = store.answers(target.weights, target.resolution)
    seen: set[str] = set()
    tasks: list[TaskPlan] = []
    owed: list[OwedTask] = []
    shared = 0
    for fingerprint, outline in outlines.items():
        plan, part, repeated = _task_plan(answers, fingerprint, outline, seen, retry_failed=retry_failed)
        tasks.append(plan)
        owed.append(part)
        shared += repeated
    return ModelPlan(
        model=target.id,
        display_name=target.entry.display_name,
        label=target.entry.label,
        weights=target.weights,
        resolution=target.resolution,
        tasks=tuple(tasks),
        shards=tuple(cut_shards(target.id, owed, workers=target.workers)),
        shared=shared,
        damaged=len(answers.damage),
    )


def _task_plan(
    answers: Answers, fingerprint: str, outline: Outline, seen: set[str], *, retry_failed: bool
) -> tuple[TaskPlan, OwedTask, int]:
    distinct = list(dict.fromkeys(outline.keys))
    failed = answers.failed(distinct)
    owed = answers.owed(distinct)
    if retry_failed:
        owed += failed
    new = {k for k in owed if k not in seen}
    repeated = len(owed) - len(new)
    seen |= new
    ordinals: list[int] = []
    for ordinal, key in enumerate(outline.keys):
        if key in new:
            new.discard(key)
            ordinals.append(ordinal)
    chosen = np.array(ordinals, dtype=np.int64)
    cost = CostModel().seconds(outline.characters[chosen], outline.caps[chosen])
    plan = TaskPlan(
        task=outline.task,
        num_fewshot=outline.num_fewshot,
        fingerprint=fingerprint,
        requests=len(distinct),
        answered=len(distinct) - len(owed) - (0 if retry_failed else len(failed)),
        failed=len(failed),
        owed=len(owed),
        cost_s=float(cost.sum()),
        labels=outline.labels,
    )
    part = OwedTask(fingerprint=fingerprint, ordinals=chosen, documents=outline.documents[chosen], cost_s=cost)
    return plan, part, repeated
