"""Requests to shards: what each model owes, given what the store holds."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from proctor.api.context import RunContext
from proctor.api.measuring import Rates, class_rates, measured, model_class
from proctor.api.progress import history
from proctor.api.recording import planned_suites
from proctor.api.targets import Target, resolve_targets
from proctor.config.engines import client_processes
from proctor.plan import (
    Bits,
    Cutter,
    Lengths,
    ModelPlan,
    Plan,
    Priced,
    RequestTable,
    Shards,
    ShardSizes,
    Strategy,
    TaskPlan,
    TaskRequests,
    recommended_workers,
)
from proctor.plan.cuts import MIN_SHARD_S, floor_s
from proctor.records import Suite
from proctor.store import Store
from proctor.store.completion import Completion
from proctor.store.recording import Outline

MEASURED_MODELS: Final = 3
"""Output lengths are learnt from so many models: reading more answers costs time and changes little."""


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
    max_shard_s: float | None = None,
) -> Plan:
    """The difference between what was recorded and what is answered. Raises StoreError, ConfigError.

    Models that owe the same requests share their shards' contents. `max_shard_s`: what a shard may be predicted to
    take, where a time limit says so. Writes nothing but the store's own summaries of what is answered.
    """
    fingerprints = list(dict.fromkeys(fp for s in suites for fp in s.recordings))
    outlines = {fp: store.recording_outline(fp) for fp in fingerprints}
    table = RequestTable.of([_task(fp, o) for fp, o in outlines.items()])
    states, lengths = _states(store, targets, outlines, table, retry_failed=retry_failed)
    rates = class_rates(measured(history(context.directory.events)), targets)
    chosen = context.spec.plan
    strategy = Strategy(name=chosen.strategy, **chosen.model_dump(exclude={"strategy"}))
    priced = {kind: Priced.of(table, r.cost, lengths) for kind, r in rates.items()}
    makers = {
        kind: _Maker(priced=priced[kind], rates=r, strategy=strategy, limit_s=max_shard_s or math.inf)
        for kind, r in rates.items()
    }
    models = tuple(makers[model_class(t)].model_plan(t, s) for t, s in zip(targets, states, strict=True))
    workers = max(m.workers for m in models)
    return Plan(run=context.spec.name, models=models, workers=workers, strategy=strategy.name)


def _task(fingerprint: str, outline: Outline) -> TaskRequests:
    return TaskRequests(
        fingerprint=fingerprint,
        task=outline.task,
        num_fewshot=outline.num_fewshot,
        labels=outline.labels,
        keys=outline.folded,
        documents=outline.documents,
        characters=outline.characters,
        caps=outline.caps,
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _State:
    """Which requests of the table a model owes, and has failed at for good. Models in the same state share one."""

    digest: bytes
    owed: Bits
    asked: Bits
    """Of these, what no task before asks too."""
    failed: Bits | None
    """None: nothing."""
    damaged: int
    retry_failed: bool


def _states(
    store: Store,
    targets: Sequence[Target],
    outlines: Mapping[str, Outline],
    table: RequestTable,
    *,
    retry_failed: bool,
) -> tuple[list[_State], dict[str, Lengths]]:
    states: list[_State] = []
    known: dict[bytes, _State] = {}
    lengths: dict[str, Lengths] = {}
    learnt = 0
    for target in targets:
        found = store.completion(target.weights, target.resolution, outlines, measure=learnt < MEASURED_MODELS)
        if found.lengths and learnt < MEASURED_MODELS:
            learnt += 1
            for fingerprint, sums in found.lengths.items():
                lengths[fingerprint] = lengths.get(fingerprint, Lengths()) + Lengths(
                    answers=sums.answers,
                    characters=sums.characters,
                    caps=sums.caps,
                    prompt_tokens=sums.prompt_tokens,
                    completion_tokens=sums.completion_tokens,
                )
        state = _state(found, table, retry_failed=retry_failed)
        states.append(known.setdefault(state.digest, state))
    return states, lengths


def _state(found: Completion, table: RequestTable, *, retry_failed: bool) -> _State:
    done = table.bits([found.answered[fp] for fp in table.fingerprints])
    failed: Bits | None = None
    if any(bits.any() for bits in found.failed.values()):
        failed = table.bits([found.failed[fp] for fp in table.fingerprints])
        if not retry_failed:
            done |= failed
    owed = ~done & table.first_in_task
    digest = hashlib.blake2b(owed.data)
    digest.update(b"" if failed is None else failed.data)
    digest.update(b"%d" % found.damaged)
    return _State(
        digest=digest.digest(),
        owed=owed,
        asked=owed & table.first if table.shares else owed,
        failed=failed,
        damaged=found.damaged,
        retry_failed=retry_failed,
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Totals:
    """What one state comes to under one cost model."""

    tasks: tuple[TaskPlan, ...]
    shared: int
    longest_s: float

    @property
    def cost_s(self) -> float:
        return sum(t.cost_s for t in self.tasks)


class _Maker:
    """Plans of the models of one class."""

    def __init__(self, *, priced: Priced, rates: Rates, strategy: Strategy, limit_s: float) -> None:
        self._priced = priced
        self._rates = rates
        self._limit_s = limit_s
        self._cutter = Cutter(priced, strategy)
        self._totals: dict[bytes, _Totals] = {}

    def model_plan(self, target: Target, state: _State) -> ModelPlan:
        totals = self._totals.get(state.digest)
        if totals is None:
            totals = self._totals[state.digest] = self._count(state)
        workers = self._workers(target, totals)
        processes = workers * client_processes(target.engine)  # each claims shards of its own
        sizes = ShardSizes(workers=processes, min_s=floor_s(totals.cost_s, processes), limit_s=self._limit_s)
        cut = self._cutter.cut(state.asked, sizes)
        return ModelPlan(
            model=target.id,
            display_name=target.entry.display_name,
            label=target.entry.label,
            weights=target.weights,
            resolution=target.resolution,
            tasks=totals.tasks,
            shards=Shards(target.id, cut),
            cost_s=totals.cost_s,
            prompt_tokens=sum(t.prompt_tokens for t in totals.tasks),
            completion_tokens=sum(t.completion_tokens for t in totals.tasks),
            longest_s=totals.longest_s,
            startup_s=self._rates.startup_s,
            startup=self._rates.startup_source,
            gpus=target.gpus,
            gpus_reason=target.gpus_reason,
            workers=workers,
            rates=self._rates.source,
            shared=totals.shared,
            damaged=state.damaged,
        )

    def _workers(self, target: Target, totals: _Totals) -> int:
        """As configured; `auto` is the number beyond which more stop paying."""
        if not isinstance(target.launch.workers, str):
            return target.launch.workers
        return recommended_workers(
            totals.cost_s, startup_s=self._rates.startup_s, floor_s=MIN_SHARD_S, longest_s=totals.longest_s
        ).workers

    def _count(self, state: _State) -> _Totals:
        priced, table = self._priced, self._priced.table
        requests = table.counts(table.first_in_task)
        failed = np.zeros_like(requests) if state.failed is None else table.counts(state.failed & table.first_in_task)
        owed = table.counts(state.owed)
        found = priced.totals(state.asked)
        done = requests - owed - (0 if state.retry_failed else failed)
        columns = (requests, done, failed, owed, found.cost_s, found.prompt_tokens, found.completion_tokens)
        tasks = tuple(
            TaskPlan(
                task=task.task,
                num_fewshot=task.num_fewshot,
                fingerprint=task.fingerprint,
                requests=asked,
                answered=answered,
                failed=refused,
                owed=left,
                cost_s=cost_s,
                prompt_tokens=round(prompt),
                completion_tokens=round(completion),
                labels=task.labels,
            )
            for task, asked, answered, refused, left, cost_s, prompt, completion in zip(
                table.tasks, *(c.tolist() for c in columns), strict=True
            )
        )
        return _Totals(
            tasks=tasks,
            shared=int(owed.sum() - found.requests.sum()),
            longest_s=priced.longest_s(state.asked),
        )
