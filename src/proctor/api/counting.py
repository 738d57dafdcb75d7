"""How far a run is: the store counted against the recordings, and what the workers last said."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from proctor.api.context import RunContext
from proctor.api.progress import WorkerEvents
from proctor.api.recording import recorded_suites
from proctor.api.targets import Target, resolve_targets
from proctor.records import Failure
from proctor.report.views import RunStatus, TaskStatus, WorkerStatus
from proctor.store import Store
from proctor.store.recording import Outline
from proctor.worker.events import Event


def status(config: str | Path, overrides: Sequence[str] = ()) -> RunStatus:
    """Count what is answered, failed and owed. Changes nothing. Raises ConfigError, ModelError, StoreError."""
    context = RunContext.open(config, overrides)
    store = context.store(create=False)
    suites = recorded_suites(context, store)
    targets = resolve_targets(context, None)
    fingerprints = dict.fromkeys(fp for s in suites for fp in s.recordings)
    outlines = [store.recording_outline(fp) for fp in fingerprints]
    tasks: list[TaskStatus] = []
    damaged = 0
    for target in targets:
        counted, damage = _count(store, target, outlines)
        tasks += counted
        damaged += damage
    return RunStatus(
        run=context.spec.name,
        tasks=tuple(tasks),
        workers=tuple(_workers(context)),
        damaged=damaged,
        now=time.time(),
    )


def _count(store: Store, target: Target, outlines: Sequence[Outline]) -> tuple[list[TaskStatus], int]:
    answers = store.answers(target.weights, target.resolution)
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
    return found, len(answers.damage)


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
        message=last.message,
    )
