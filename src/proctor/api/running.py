"""The whole way: record, plan, launch, watch, score."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from proctor.api.asking import Workers
from proctor.api.context import RunContext
from proctor.api.foreseeing import keep_forecast
from proctor.api.marking import Ahead, Memory
from proctor.api.planning import make_plan
from proctor.api.progress import Progress, Silent
from proctor.api.recording import Kept, Recorded, harness, kept, record, recorded_before
from proctor.api.scoring import Scores, score_run
from proctor.api.targets import Target, resolve_targets
from proctor.errors import ProctorError, StoreError
from proctor.plan import Plan
from proctor.processes.resident import Residents
from proctor.score.replay import Marks
from proctor.store import Owner, Store

COMPACT_SEGMENTS = 16
"""So many segments are worth a part: opening a store reads each of its files."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a run came to."""

    run: str
    scores: Scores
    before: Plan
    after: Plan
    drained: bool
    errors: tuple[ProctorError, ...] = ()
    """Why workers ended early; what they had acknowledged is kept."""

    @property
    def complete(self) -> bool:
        """Nothing is owed, nothing has failed for good, and every row stands on all of its documents."""
        failed = any(t.failed for m in self.after.models for t in m.tasks)
        return self.after.owed == 0 and not failed and self.scores.complete


async def run(
    config: str | Path,
    overrides: Sequence[str] = (),
    *,
    progress: Progress | None = None,
    retry_failed: bool = False,
    fresh: bool = False,
) -> Outcome:
    """Do everything that is still owed, then mark it.

    `fresh`: record the tasks anew even if nothing that they are made from has changed.

    SIGINT or SIGTERM once lets the workers finish what is in flight; twice stops them. Raises ProctorError for
    what stops the whole run; an error of one model's worker is in the outcome, beside the scores of the others.
    """
    progress = progress or Silent()
    context = RunContext.open(config, overrides)
    store = context.store(create=True)
    context.write_configuration()
    with harness() as residents:
        return await _run(_Run(context, store, progress, residents), retry_failed=retry_failed, fresh=fresh)


@dataclass(frozen=True, slots=True)
class _Run:
    """What the steps of a run share."""

    context: RunContext
    store: Store
    progress: Progress
    residents: Residents


async def _run(one: _Run, *, retry_failed: bool, fresh: bool) -> Outcome:
    context, store, progress = one.context, one.store, one.progress
    async with Workers(context, retry_failed=retry_failed) as workers:
        recorded, targets = await _both(one, workers, fresh=fresh)
        plan = await asyncio.to_thread(make_plan, context, store, targets, recorded.suites, retry_failed=retry_failed)
        progress.planned(plan)
        keep_forecast(context, plan)
        memory = Memory(context, recorded)
        ahead = Ahead(store=store, residents=one.residents, memory=memory, ready=partial(_show, progress))
        asked = await workers.ask(targets, plan, progress, ahead.working(targets, recorded))
    progress.phase("scoring")
    scores, after = await asyncio.to_thread(_finish, one, targets, recorded, memory)
    await _tidy(store, targets, progress)
    return Outcome(
        run=context.spec.name, scores=scores, before=plan, after=after, drained=asked.drained, errors=asked.errors
    )


async def _both(one: _Run, workers: Workers, *, fresh: bool) -> tuple[Recorded, list[Target]]:
    """Record what has to be recorded; meanwhile read the models, and have their servers start."""
    known = [] if fresh else await asyncio.to_thread(kept, one.context, one.store)
    some = not known or None in known
    if some:
        one.progress.phase("recording the tasks")
    tasks = (
        asyncio.create_task(asyncio.to_thread(record, one.context, one.store, known=known, run=one.residents.run)),
        asyncio.create_task(_models(one, workers, known, begin=some)),
    )
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise


async def _models(one: _Run, workers: Workers, known: Sequence[Kept | None], *, begin: bool) -> list[Target]:
    """The models; with `begin`, their workers are started where they will most likely be owed something."""
    targets = await asyncio.to_thread(resolve_targets, one.context, one.store)
    if begin:
        await workers.begin(await asyncio.to_thread(_owing, one, targets, known, retry_failed=workers.retry_failed))
    return targets


def _owing(
    one: _Run, targets: Sequence[Target], known: Sequence[Kept | None], *, retry_failed: bool
) -> Sequence[Target]:
    """The models that owed something when the same tasks were recorded last; all of them where there is no telling.

    Tasks whose inputs are never known are recorded each time, and a finished run must not start servers for that.
    """
    suites = recorded_before(one.context, one.store, known)
    if suites is None:
        return targets
    try:
        plan = make_plan(one.context, one.store, targets, suites, retry_failed=retry_failed)
    except StoreError:
        return targets
    return [t for t, m in zip(targets, plan.models, strict=True) if m.owed]


async def _tidy(store: Store, targets: Sequence[Target], progress: Progress) -> None:
    """Keep the store small in files. What goes wrong here costs nobody an answer, so it is said and no more."""
    for weights in dict.fromkeys(t.weights for t in targets):
        try:
            await store.ledger(weights, owner=Owner.here()).sweep()
            if await asyncio.to_thread(store.segments, weights) >= COMPACT_SEGMENTS:
                progress.phase("compacting the store")
                await asyncio.to_thread(store.compact, weights)
        except StoreError as error:
            progress.phase(f"the store was not compacted: {error.message}")


def _finish(one: _Run, targets: Sequence[Target], recorded: Recorded, memory: Memory) -> tuple[Scores, Plan]:
    scores = score_run(one.context, one.store, targets, recorded, memory=memory, run=one.residents.run)
    return scores, make_plan(one.context, one.store, targets, recorded.suites)


def _show(progress: Progress, target: Target, name: str, marks: Marks) -> None:
    """One line for what is finished while others are asked: the first metric of what it is named for."""
    shown = next((v for v in marks.values if v.task == name and v.value is not None), None)
    if shown is not None and shown.value is not None:
        error = "" if shown.stderr is None else f" ± {shown.stderr:.4f}"
        progress.phase(f"{target.entry.shown} {name}: {shown.metric} {shown.value:.4f}{error}, n {shown.n}")
