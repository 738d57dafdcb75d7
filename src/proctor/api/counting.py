"""How far a run is: the store counted against the recordings, and what the workers last said."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from proctor.api.context import RunContext
from proctor.api.jobs import jobs_of
from proctor.api.progress import WorkerEvents
from proctor.api.recording import recorded_suites
from proctor.api.targets import Target, resolve_targets
from proctor.records import Failure
from proctor.report.views import RunStatus, TaskStatus, WorkerStatus
from proctor.store import Answers
from proctor.store.recording import Outline
from proctor.worker.events import Event

AT_WORK: Final = ("asking", "draining")
LATELY_S: Final = 60.0
"""A worker that said nothing for so long counts for no rate."""


def status(config: str | Path, overrides: Sequence[str] = ()) -> RunStatus:
    """Count what is answered, failed and owed. Changes nothing. Raises ConfigError, ModelError, StoreError.

    Of a run that was sent to a cluster the queue is read too, and LaunchError raised if it cannot be.
    """
    context = RunContext.open(config, overrides)
    store = context.store(create=False)
    suites = recorded_suites(context, store)
    targets = resolve_targets(context, None)
    fingerprints = dict.fromkeys(fp for s in suites for fp in s.recordings)
    outlines = [store.recording_outline(fp) for fp in fingerprints]
    tasks: list[TaskStatus] = []
    damaged = duplicates = 0
    for target in targets:
        answers = store.answers(target.weights, target.resolution)
        tasks += _count(answers, target, outlines)
        damaged += len(answers.damage)
        duplicates += answers.duplicates
    now = time.time()
    workers = _workers(context)
    rate = sum(w.requests_per_s or 0.0 for w in workers if w.phase in AT_WORK and now - w.seen < LATELY_S) or None
    owed = sum(t.owed for t in tasks)
    return RunStatus(
        run=context.spec.name,
        tasks=tuple(tasks),
        workers=tuple(workers),
        jobs=jobs_of(context),
        requests_per_s=rate,
        eta_s=owed / rate if rate and owed else None,
        duplicates=duplicates,
        damaged=damaged,
        now=now,
    )


def _count(answers: Answers, target: Target, outlines: Sequence[Outline]) -> list[TaskStatus]:
    found: list[TaskStatus] = []
    for outline in outlines:
        keys = list(dict.fromkeys(outline.keys))
        owed = answers.owed(keys)
        permanent = answers.failed(keys)
        boundaries = Counter(a.boundary.value for a in answers.read(permanent).values() if isinstance(a, Failure))
        found.append(
            TaskStatus(
                model=target.entry.display_name,
                label=target.entry.label,
                task=outline.task,
                num_fewshot=outline.num_fewshot,
                requests=len(keys),
                answered=len(keys) - len(owed) - len(permanent),
                failed=len(permanent),
                failures=tuple(sorted(boundaries.items())),
            )
        )
    return found


def _workers(context: RunContext) -> list[WorkerStatus]:
    events = WorkerEvents(context.directory.events)
    history: dict[str, list[Event]] = {}
    for event in events.read():
        if event.phase == "starting":
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
        message=last.message,
    )
