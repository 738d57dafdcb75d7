"""How far a run is: the store counted against the recordings, and what the workers last said."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Final

import numpy as np
from numpy.typing import NDArray

from proctor.api.context import RunContext
from proctor.api.foreseeing import foreseen
from proctor.api.jobs import jobs_of
from proctor.api.measuring import Measured, measured
from proctor.api.progress import history
from proctor.api.recording import recorded_suites
from proctor.api.targets import Target, resolve_targets
from proctor.errors import LaunchError, MissingTool
from proctor.plan import PlanAgainstActual
from proctor.records import Failure
from proctor.report.views import JobsStatus, ModelStarts, PlannedModel, RunStatus, TaskStatus, WorkerStatus
from proctor.store import Answers
from proctor.store.arrow import pa
from proctor.store.completion import Bits, Completion
from proctor.store.recording import Outline
from proctor.worker.events import Event
from proctor.worker.plan_file import count_shards

AT_WORK: Final = ("asking", "draining")
LATELY_S: Final = 60.0
"""A worker that said nothing for so long counts for no rate."""


def status(config: str | Path, overrides: Sequence[str] = ()) -> RunStatus:
    """Count what is answered, failed and owed. Changes nothing. Raises ConfigError, ModelError, StoreError.

    Of a run that was sent to a cluster the queue is read too; if it cannot be, `queue_unread` says why.
    """
    context = RunContext.open(config, overrides)
    store = context.store(create=False)
    suites = recorded_suites(context, store)
    targets = resolve_targets(context, None)
    fingerprints = dict.fromkeys(fp for s in suites for fp in s.recordings)
    outlines = {fp: store.recording_outline(fp) for fp in fingerprints}
    distinct = {fp: _first(outline) for fp, outline in outlines.items()}
    tasks: list[TaskStatus] = []
    done: dict[str, Mapping[str, Bits]] = {}
    damaged = duplicates = 0
    for target in targets:
        completion = store.completion(target.weights, target.resolution, outlines)
        answers: Answers | None = None
        if any(bits.any() for bits in completion.failed.values()):
            # Why something failed stands in no summary, and opening the answers takes seconds where there are many.
            answers = store.answers(target.weights, target.resolution)
        duplicates += completion.duplicates
        tasks += [_count(target, outlines[fp], distinct[fp], completion, fp, answers) for fp in outlines]
        done[target.id] = {fp: completion.answered[fp] | completion.failed[fp] for fp in outlines}
        damaged += completion.damaged
    shards, shards_owed = _shards(context, done)
    now = time.time()
    events = history(context.directory.events)
    found = measured(events)
    workers = _workers(events)
    rate = sum(w.requests_per_s or 0.0 for w in workers if w.phase in AT_WORK and now - w.seen < LATELY_S) or None
    owed = sum(t.owed for t in tasks)
    jobs: tuple[JobsStatus, ...] = ()
    unread: str | None = None
    try:
        jobs = jobs_of(context)
    except (LaunchError, MissingTool) as error:
        unread = str(error)
    return RunStatus(
        run=context.spec.name,
        tasks=tuple(tasks),
        workers=tuple(workers),
        jobs=jobs,
        queue_unread=unread,
        plan=tuple(_planned(p) for p in foreseen(context, found)),
        starts=tuple(_starts(model, m) for model, m in found.items() if m.starts or m.reloads),
        shards=shards,
        shards_owed=shards_owed,
        requests_per_s=rate,
        eta_s=owed / rate if rate and owed else None,
        duplicates=duplicates,
        damaged=damaged,
        now=now,
    )


def _first(outline: Outline) -> NDArray[np.int64]:
    """Where each distinct request of a recording stands, once."""
    keys = outline.folded
    order = np.lexsort((keys[:, 1], keys[:, 0]))
    new = np.ones(len(order), bool)
    new[1:] = (keys[order[1:]] != keys[order[:-1]]).any(axis=1)
    return np.asarray(order[new], np.int64)


def _count(
    target: Target,
    outline: Outline,
    distinct: NDArray[np.int64],
    completion: Completion,
    fingerprint: str,
    answers: Answers | None,
) -> TaskStatus:
    failed = np.unpackbits(completion.failed[fingerprint], count=len(outline))[distinct].astype(bool)
    answered = np.unpackbits(completion.answered[fingerprint], count=len(outline))[distinct].astype(bool) & ~failed
    boundaries: Counter[str] = Counter()
    if answers is not None and failed.any():
        permanent = [outline.key(int(i)) for i in distinct[failed]]
        boundaries.update(a.boundary.value for a in answers.read(permanent).values() if isinstance(a, Failure))
    return TaskStatus(
        model=target.entry.shown,
        label=target.entry.label,
        task=outline.task,
        num_fewshot=outline.num_fewshot,
        requests=len(distinct),
        answered=int(answered.sum()),
        failed=int(failed.sum()),
        failures=tuple(sorted(boundaries.items())),
    )


def _shards(context: RunContext, done: Mapping[str, Mapping[str, Bits]]) -> tuple[int, int]:
    try:
        return count_shards(context.directory.plan, done)
    except (OSError, ValueError, KeyError, pa.ArrowInvalid):
        return 0, 0  # being replaced, or of another version: the next run writes it anew


def _planned(one: PlanAgainstActual) -> PlannedModel:
    return PlannedModel(
        model=one.model,
        requests=one.planned.requests,
        asked=one.used.requests,
        planned_s=one.planned.seconds,
        used_s=one.used.seconds,
        expected_s=one.expected_s,
        tokens_ratio=one.tokens_ratio,
    )


def _starts(model: str, found: Measured) -> ModelStarts:
    typical = median(found.startups_s) if found.startups_s else None
    return ModelStarts(
        model=model,
        starts=found.starts,
        seconds=found.starting_s,
        typical_s=typical,
        reloads=found.reloads,
        reloading_s=found.reloading_s,
    )


def _workers(events: Sequence[Event]) -> list[WorkerStatus]:
    history: dict[str, list[Event]] = {}
    for event in events:
        if event.begins:
            history[event.worker] = []
        history.setdefault(event.worker, []).append(event)
    return [_worker(said) for said in history.values()]


def _worker(said: list[Event]) -> WorkerStatus:
    last = said[-1]
    elapsed = last.time - said[0].time
    tokens = last.prompt_tokens + last.completion_tokens
    return WorkerStatus(
        worker=last.worker,
        model=last.model,
        phase=last.phase,
        seen=last.time,
        requests=last.requests,
        tokens_per_s=tokens / elapsed if elapsed > 0 else None,
        requests_per_s=last.requests / elapsed if elapsed > 0 else None,
        in_flight=last.in_flight,
        limits=tuple(last.limits),
        why=tuple(last.why),
        core=last.core,
        message=last.message,
    )
