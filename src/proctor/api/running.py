"""The whole way: record, plan, launch, watch, score."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from proctor import errors
from proctor.api.context import RunContext
from proctor.api.foreseeing import keep_forecast
from proctor.api.marking import Ahead, Memory
from proctor.api.planning import make_plan
from proctor.api.progress import Progress, Silent, WorkerEvents
from proctor.api.recording import Recorded, harness, kept, record
from proctor.api.scoring import Scores, score_run
from proctor.api.targets import Target, resolve_targets
from proctor.config.engines import Launch
from proctor.config.spec import LocalLaunch
from proctor.errors import ConfigError, LaunchError, ProctorError, StoreError
from proctor.launch.launcher import Job as LaunchJob
from proctor.launch.launcher import JobState, JobStatus
from proctor.launch.local import LocalLauncher
from proctor.plan import ModelPlan, Plan
from proctor.processes.resident import Residents
from proctor.records import Suite
from proctor.score.replay import Marks
from proctor.store import Owner, Store
from proctor.worker.assignment import Assignment
from proctor.worker.job import Job

COMPACT_SEGMENTS = 16
"""So many segments are worth a part: opening a store reads each of its files."""

POLL_S = 0.25
"""Between two looks at the workers: what a person sees as live."""


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
    reading = asyncio.create_task(asyncio.to_thread(resolve_targets, context, store))
    try:
        recorded = await _record(one, fresh=fresh)
    except BaseException:
        await asyncio.gather(reading, return_exceptions=True)
        raise
    if not reading.done():
        progress.phase("reading the models")
    targets = await reading
    plan = await asyncio.to_thread(make_plan, context, store, targets, recorded.suites, retry_failed=retry_failed)
    progress.planned(plan)
    keep_forecast(context, plan)
    memory = Memory(context, recorded)
    ahead = Ahead(store=store, residents=one.residents, memory=memory, ready=partial(_show, progress))
    drained, failures = await _ask(one, targets, plan, recorded, ahead, retry_failed=retry_failed)
    progress.phase("scoring")
    scores, after = await asyncio.to_thread(_finish, one, targets, recorded, memory)
    await _tidy(store, targets, progress)
    return Outcome(run=context.spec.name, scores=scores, before=plan, after=after, drained=drained, errors=failures)


async def _record(one: _Run, *, fresh: bool) -> Recorded:
    known = [] if fresh else await asyncio.to_thread(kept, one.context, one.store)
    if not known or None in known:
        one.progress.phase("recording the tasks")
    return await asyncio.to_thread(record, one.context, one.store, known=known, run=one.residents.run)


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


def _show(progress: Progress, target: Target, suite: Suite, marks: Marks) -> None:
    """One line for a suite that is finished while others are asked: the first metric of what it is named for."""
    name = " ".join(suite.names)
    shown = next((v for v in marks.values if v.task == name and v.value is not None), None)
    if shown is not None and shown.value is not None:
        error = "" if shown.stderr is None else f" ± {shown.stderr:.4f}"
        progress.phase(f"{target.entry.shown} {name}: {shown.metric} {shown.value:.4f}{error}, n {shown.n}")


async def _ask(
    one: _Run, targets: Sequence[Target], plan: Plan, recorded: Recorded, ahead: Ahead, *, retry_failed: bool
) -> tuple[bool, tuple[ProctorError, ...]]:
    context, progress = one.context, one.progress
    owing = [(t, m) for t, m in zip(targets, plan.models, strict=True) if m.shards]
    if not owing:
        return False, ()
    context.directory.write_plan({m.model: m.shards for _, m in owing})
    jobs = [job for target, model in owing for job in _jobs(context, target, model, retry_failed=retry_failed)]
    events = WorkerEvents(context.directory.events)
    events.skip()
    async with await LocalLauncher.open(_here(context.spec.launch)) as launcher:
        async with _draining(launcher) as drain:
            await launcher.submit(jobs)
            async with ahead.working(targets, recorded):
                states = await _watch(launcher, events, progress)
        progress.events(events.read())
    return drain.requested, tuple(_failures(states, jobs, events))


def _here(launch: Launch) -> LocalLaunch:
    if isinstance(launch, LocalLaunch):
        return launch
    raise ConfigError(
        f"launch.type is {launch.type!r}: `run` starts workers on this machine only",
        hint="`proctor submit` sends them to the cluster; or add --set launch='{type: local}'",
    )


def _jobs(context: RunContext, target: Target, model: ModelPlan, *, retry_failed: bool) -> list[LaunchJob]:
    directory = context.directory
    job: Job = target.job(context)
    file = f"{job.job_id}.json"
    job.write(directory.jobs / file)
    workers = min(target.workers, len(model.shards))
    cost_s = sum(s.cost_s for s in model.shards)
    path = directory.assignments / file
    Assignment(shape=job.job_id, jobs=(file,), costs=(cost_s,), workers=workers).write(path)
    flags = ["--retry-failed"] if retry_failed else []
    return [
        LaunchJob(
            id=f"{job.job_id}-{index}",
            argv=(sys.executable, "-m", "proctor.worker", str(directory.root), str(path), str(index), *flags),
            log=directory.logs / f"{job.job_id}-{index}.log",
            gpus=job.gpus,
        )
        for index in range(workers)
    ]


async def _watch(launcher: LocalLauncher, events: WorkerEvents, progress: Progress) -> Mapping[str, JobStatus]:
    while True:
        states = await launcher.poll(wait_s=POLL_S)
        progress.events(events.read())
        if all(s.state.final for s in states.values()):
            return states


def _failures(states: Mapping[str, JobStatus], jobs: Sequence[LaunchJob], events: WorkerEvents) -> list[ProctorError]:
    """One error for each worker that failed, in its own words where it could still say any."""
    found: list[ProctorError] = []
    for job in jobs:
        status = states[job.id]
        said = events.last(job.id)
        if status.state is not JobState.FAILED or status.returncode == errors.Incomplete.exit_code:
            continue
        if said is not None and said.error:
            kind: type[ProctorError] = getattr(errors, said.error, ProctorError)
            found.append(kind(said.message, hint=said.hint))
        else:
            reason = status.message or f"it ended with status {status.returncode}"
            found.append(
                LaunchError(f"worker {job.id} failed: {reason}", hint=f"see {job.log}; repeat the command to continue")
            )
    return found


class _Drain:
    requested = False


@contextlib.asynccontextmanager
async def _draining(launcher: LocalLauncher) -> AsyncGenerator[_Drain]:
    """Pass on a first signal as a request to drain, a second as an order to stop."""
    drain = _Drain()
    loop = asyncio.get_running_loop()
    pending: set[asyncio.Task[None]] = set()

    def received() -> None:
        work = launcher.cancel(drain=not drain.requested)
        drain.requested = True
        task = loop.create_task(work)
        pending.add(task)
        task.add_done_callback(pending.discard)

    numbers = (signal.SIGINT, signal.SIGTERM)
    try:
        for number in numbers:
            loop.add_signal_handler(number, received)
    except (ValueError, RuntimeError):
        # Not the main thread: whoever runs us handles signals.
        yield drain
        return
    try:
        yield drain
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)
        if pending:
            await asyncio.gather(*pending)
