"""Send what is owed to a Slurm cluster: one array of workers for each kind of resources, and a job that marks."""

from __future__ import annotations

import asyncio
import functools
import json
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Final

from proctor.api.bundling import write_bundle
from proctor.api.cluster_profiles import settings_by_model
from proctor.api.context import RunContext
from proctor.api.foreseeing import keep_forecast
from proctor.api.planning import make_plan
from proctor.api.progress import Progress, Silent
from proctor.api.recording import Recorded, record
from proctor.api.sent import SCORE, Sent, job_name, job_prefix
from proctor.api.shapes import Shape, shapes
from proctor.api.targets import Target, resolve_targets
from proctor.config.slurm_values import clock
from proctor.errors import LaunchError, ProctorError, UnknownName
from proctor.launch.slurm.cluster import Demand, Partition, check_demand, choose_partition, read_partitions
from proctor.launch.slurm.commands import Commands
from proctor.launch.slurm.queue import read_queue
from proctor.launch.slurm.records import QueueRecord
from proctor.launch.slurm.scheduler import SlurmScheduler
from proctor.launch.slurm.submission import Chunk, Submission, submit_elements
from proctor.launch.slurm.submission import submit as submit_one
from proctor.launch.slurm_script import JobScript, Variable, log_pattern, scoring_script, worker_script
from proctor.plan import Plan
from proctor.plan.cuts import MIN_SHARD_S
from proctor.plan.forecast import TimeLimit, recommended_workers, time_limit
from proctor.records import Boundary
from proctor.report.submission import ArrayPlan
from proctor.store import Store
from proctor.worker.assignment import LINGER_S, Assignment, SlurmTerms
from proctor.worker.run_directory import RunDirectory


@dataclass(frozen=True, slots=True, kw_only=True)
class SubmitOutcome:
    """What `proctor submit` did, or with `dry_run` would do."""

    run: str
    plan: Plan
    arrays: tuple[ArrayPlan, ...]
    sent: tuple[Sent, ...]
    owed: int
    """Elements that a limit kept out of the queue."""
    dry_run: bool
    stopped_by: LaunchError | None = None
    scoring: str | None = None
    """The script of the job that marks."""
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Which part of what is owed a call of `submit` is about."""

    limit: int | None = None
    """At most so many array elements."""
    models: tuple[str, ...] = ()
    """Only these, by name; empty: all."""
    retry_failed: bool = False
    reasons: tuple[str, ...] = ()
    """With `retry_failed`: only what failed at these boundaries; empty: all."""


ALL: Final = Selection()


async def submit(
    config: str | Path,
    overrides: Sequence[str] = (),
    *,
    select: Selection = ALL,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> SubmitOutcome:
    """Send workers for what is owed, as far as none wait or run for it already, and a job that marks afterwards.

    What a limit of the cluster keeps out is counted as owed, and the next call sends it. Raises ConfigError,
    UnknownName, LaunchError before anything is sent.
    """
    progress = progress or Silent()
    retry_failed = select.retry_failed
    context = RunContext.open(config, overrides)
    settings_by_model(context, os.environ)  # refuses before anything is done
    store = context.store(create=True)
    context.write_configuration()
    progress.phase("recording the tasks")
    recorded = await asyncio.to_thread(record, context, store)
    progress.phase("reading the models")
    targets = await asyncio.to_thread(resolve_targets, context, store)
    _check_names(targets, select)
    planned = functools.partial(make_plan, context, store, targets, recorded.suites, retry_failed=retry_failed)
    plan = await asyncio.to_thread(planned)
    progress.planned(plan)
    nothing = SubmitOutcome(run=context.spec.name, plan=plan, arrays=(), sent=(), owed=0, dry_run=dry_run)
    if not plan.owed:
        return nothing if dry_run else replace(nothing, warnings=await _cancel_stuck(context))
    site = await look(progress)
    drafts = draft(context, targets, plan, site, select=select)
    fits_s = min((d.shard_s for d in drafts), default=math.inf)
    largest_s = max(m.largest_shard_s for m in plan.models)
    if largest_s > fits_s:
        # Finer shards, so that one fits what the time limit leaves.
        plan = await asyncio.to_thread(planned, max_shard_s=fits_s)
        drafts = draft(context, targets, plan, site, select=select)
    await asyncio.to_thread(list_needs, context, store, targets, recorded, drafts)
    drafts = _limited(drafts, select.limit)
    warnings = () if dry_run else await _release_stuck(context, site)
    if plan.strategy != "balanced" and largest_s > fits_s:
        words = f"shards of {largest_s:.0f} s do not fit the time limit, which leaves {fits_s:.0f} s; they were cut"
        warnings = (*warnings, f"plan.strategy {plan.strategy}: {words}")
    warnings = (*warnings, *dict.fromkeys(d.warning for d in drafts if d.warning is not None))
    result = replace(
        nothing,
        plan=plan,
        arrays=tuple(d.plan for d in drafts),
        scoring=_scoring_text(context, drafts[0].shape, site.partitions) if drafts else None,
        warnings=warnings,
    )
    if dry_run or not any(d.plan.missing for d in drafts):
        return result
    keep_forecast(context, plan)
    progress.phase("submitting")
    return await _send(context, site, drafts, result)


async def _release_stuck(context: RunContext, site: Site) -> tuple[str, ...]:
    """Let go what Slurm holds after a start that failed, such as one during a restart of the controller."""
    stuck = _stuck(context, site.queue)
    if not stuck:
        return ()
    await site.scheduler.release(stuck)
    return (f"Slurm held {', '.join(stuck)} after a start that failed; released",)


async def _cancel_stuck(context: RunContext) -> tuple[str, ...]:
    """End what Slurm holds and nobody needs any more: the job that marks would wait for it for ever."""
    try:
        scheduler = await SlurmScheduler.open(Commands())
        stuck = _stuck(context, await asyncio.to_thread(read_queue, scheduler.commands))
        await scheduler.cancel(stuck)
    except ProctorError:
        return ()  # nothing is owed, so nothing of the cluster is needed
    return (f"Slurm held {', '.join(stuck)} after a start that failed; nothing is owed: cancelled",) if stuck else ()


def _stuck(context: RunContext, queue: Sequence[QueueRecord]) -> list[str]:
    return [r.id for r in queue if r.name.startswith(job_prefix(context)) and r.stuck]


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """The cluster as it was when the drafts were made."""

    scheduler: SlurmScheduler
    queue: Sequence[QueueRecord]
    partitions: Sequence[Partition]


async def look(progress: Progress) -> Site:
    """Ask the cluster once. Raises MissingTool, Unreachable, LaunchError."""
    progress.phase("asking the cluster")
    scheduler = await SlurmScheduler.open(Commands())
    return Site(
        scheduler=scheduler,
        queue=await asyncio.to_thread(read_queue, scheduler.commands),
        partitions=await read_partitions(scheduler.commands),
    )


def draft(
    context: RunContext, targets: Sequence[Target], plan: Plan, site: Site, *, select: Selection = ALL
) -> list[Draft]:
    """What would be sent for the plan; sends nothing.

    Raises ConfigError, UnknownName, LaunchError for what the cluster would refuse or never run.
    """
    found = shapes(context, targets, plan.models, os.environ, only=select.models)
    return [_draft(context, shape, site, _flags(select)) for shape in found]


def list_needs(
    context: RunContext, store: Store, targets: Sequence[Target], recorded: Recorded, drafts: Sequence[Draft]
) -> None:
    """Keep, for the workers, the list of files that the nodes need. Raises ModelError, StoreError."""
    containers = [d.shape.settings.container for d in drafts]
    fingerprints = [fp for s in recorded.suites for fp in s.recordings]
    write_bundle(context, store, targets, fingerprints, containers)


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """One array that is ready to be sent."""

    shape: Shape
    plan: ArrayPlan
    limit: TimeLimit | None
    flags: tuple[str, ...]
    """For every worker."""
    environment: Mapping[str, str]
    shard_s: float
    """What a shard may be predicted to take so that it fits an attempt."""
    warning: str | None = None
    """What may go wrong, going by guesses."""

    def script(self, context: RunContext, *flags: str, assignment: str = "", name: str = "") -> str:
        """The job's script, with further flags for the worker."""
        words = (*flags, *self.flags)
        return _script(context, self.shape, self.limit, words, assignment=assignment, name=name).text()


def _check_names(targets: Sequence[Target], select: Selection) -> None:
    boundaries = [b.value for b in Boundary]
    for reason in select.reasons:
        if reason not in boundaries:
            raise UnknownName.among(
                "reason", reason, boundaries, hint="`proctor status CONFIG` shows what failed where"
            )
    known = {t.id for t in targets} | {t.entry.name for t in targets}
    for name in select.models:
        if name not in known:
            raise UnknownName.among("model", name, sorted(known), hint="`proctor models CONFIG` lists them")


def _flags(select: Selection) -> tuple[str, ...]:
    reasons = [word for reason in select.reasons for word in ("--reason", reason)]
    return ("--retry-failed", *reasons) if select.retry_failed else ()


def _draft(context: RunContext, shape: Shape, site: Site, flags: tuple[str, ...]) -> Draft:
    settings = shape.settings
    startup_s = max(p.startup_s for p in shape.plans)
    longest_s = max(p.longest_s for p in shape.plans)
    if settings.workers is not None:
        workers, reason = settings.workers, "launch.workers"
    else:
        best = recommended_workers(shape.cost_s, startup_s=startup_s, floor_s=MIN_SHARD_S, longest_s=longest_s)
        # Each model has to be loaded once: fewer workers than models means swaps, not a shorter queue.
        workers, reason = max(best.workers, min(len(shape.targets), _MODELS_AT_ONCE)), best.reason
    workers = max(1, min(workers, shape.shards))
    named = choose_partition(settings.partition, site.partitions)
    limit = _time_limit(shape, named, workers, startup_s=startup_s, longest_s=longest_s)
    seconds = limit.seconds if limit is not None else settings.time_limit_s
    need = _needed(shape, startup_s=startup_s, longest_s=longest_s)
    demand = Demand(
        partition=settings.partition,
        time_limit_s=seconds,
        least_s=need.certain_s,
        least_of=need.words,
        nodes=settings.nodes,
        gpus_per_node=0 if settings.gpu_flag_style == "none" else shape.gpus,
        gpu_type=settings.gpu_type,
        cpus_per_node=settings.cpus or 1,
    )
    fits = check_demand(demand, site.partitions)
    # What is being ended goes on as a requeue at best; then one worker too many finds nothing to do.
    live = sum(r.name == shape.name and not r.stands.final and not r.completing for r in site.queue)
    script = _script(context, shape, limit, flags)
    plan = ArrayPlan(
        shape=shape.id,
        name=shape.name,
        models=tuple(t.id for t in shape.targets),
        script=script.text(),
        cluster=settings.cluster,
        partition=settings.partition or named.name,
        gpus=shape.gpus,
        nodes=settings.nodes,
        workers=workers,
        live=live,
        missing=max(0, workers - live),
        time_limit_s=seconds,
        attempts=limit.attempts if limit is not None else 1,
        reason=reason,
        overrides=tuple(
            f"{o.key}: {o.value!r} instead of {o.profile_value!r} ({o.source})" for o in settings.overrides
        ),
    )
    room = math.inf if seconds is None else seconds - startup_s - settings.signal_lead_s
    return Draft(
        shape=shape,
        plan=plan,
        limit=limit,
        flags=flags,
        environment=_environment(shape, script),
        shard_s=limit.max_shard_s if limit is not None else max(room, longest_s, MIN_SHARD_S),
        warning=need.warning(seconds or fits.default_time_s or fits.max_time_s),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Needed:
    """What a job of a shape needs to do anything at all."""

    certain_s: float
    """Below it nothing can come of a job."""
    expected_s: float
    words: str

    def warning(self, limit_s: float | None) -> str | None:
        """What to say of a limit that will not do if guesses are right."""
        if limit_s is None or limit_s >= self.expected_s:
            return None
        return f"time limit {clock(limit_s)} may be too short for anything: {self.words} take {clock(self.expected_s)}"


def _needed(shape: Shape, *, startup_s: float, longest_s: float) -> _Needed:
    """Start-up, one request, and the end in order; what is only guessed of it is not certain."""
    lead_s = shape.settings.signal_lead_s
    known = [(p.startup, p.rates) for p in shape.plans]
    guesses = any("prior" in sources for sources in known)
    startup = next((s for s, _ in known if s == "prior"), known[0][0])
    rates = next((r for _, r in known if r == "prior"), known[0][1])
    words = (
        f"start-up ({startup_s:.0f} s: {startup}), the longest request ({longest_s:.0f} s: {rates}) and "
        f"launch.signal_lead_s ({lead_s} s: an attempt stops so long before its end)"
    )
    expected_s = startup_s + longest_s + lead_s
    # Requests that are being asked may end while the time of the end in order runs.
    least_s = lead_s + 1.0 if guesses else startup_s + max(longest_s, lead_s)
    return _Needed(certain_s=least_s, expected_s=expected_s, words=words)


_MODELS_AT_ONCE: Final = 8


def _time_limit(
    shape: Shape, partition: Partition, workers: int, *, startup_s: float, longest_s: float
) -> TimeLimit | None:
    """The limit from the forecast, where it is to come from there. Raises ConfigError if no shard would fit."""
    settings = shape.settings
    if not settings.auto_time:
        return None
    most = [s for s in (settings.max_time_s, partition.max_time_s) if s is not None]
    # A worker that goes on to other models starts each of them once.
    swaps = math.ceil(len(shape.targets) / workers) if settings.swap else 1
    return time_limit(
        shape.cost_s,
        workers,
        startup_s=startup_s * swaps,
        longest_s=longest_s,
        most_s=min(most) if most else None,
        drain_s=float(settings.signal_lead_s),
        measured=all("prior" not in (p.startup, p.rates) for p in shape.plans),
    )


def _limited(drafts: Sequence[Draft], limit: int | None) -> list[Draft]:
    if limit is None:
        return list(drafts)
    found: list[Draft] = []
    for draft in drafts:
        take = min(limit, draft.plan.missing)
        limit -= take
        found.append(replace(draft, plan=replace(draft.plan, missing=take)))
    return found


def _script(
    context: RunContext,
    shape: Shape,
    limit: TimeLimit | None,
    flags: Sequence[str],
    *,
    assignment: str = "",
    name: str = "",
) -> JobScript:
    directory = _absolute(context.directory)
    return worker_script(
        shape.settings,
        name=name or shape.name,
        log=log_pattern(directory.logs, f"{assignment}-%j.log" if assignment else f"{shape.id}-%A_%a.log"),
        python=sys.executable,
        argv=(
            "-m",
            "proctor.worker",
            str(directory.root),
            str(directory.assignments / f"{assignment or shape.id}.json"),
            Variable.ARRAY_TASK,
            *flags,
        ),
        gpus=shape.gpus,
        time_limit_s=limit.seconds if limit is not None else shape.settings.time_limit_s,
        pass_env=sorted({t.entry.api_key_env for t in shape.targets if t.entry.api_key_env}),
    )


def _environment(shape: Shape, script: JobScript) -> dict[str, str]:
    """What sbatch is run with. Raises LaunchError if a key that a model needs is not set here."""
    for target in shape.targets:
        name = target.entry.api_key_env
        if name and not os.environ.get(name):
            raise LaunchError(
                f"the environment variable {name!r} that holds the key of {target.id!r} is not set",
                hint=f"export {name}=… and repeat the command",
            )
    return script.submission_environment(os.environ)


def _scoring_text(context: RunContext, shape: Shape, partitions: Sequence[Partition]) -> str | None:
    settings, job = shape.settings, shape.settings.scoring
    if job is None:
        return None
    directory = _absolute(context.directory)
    most = choose_partition(job.partition, partitions).most_cpus
    return scoring_script(
        settings,
        replace(job, cpus=min(job.cpus, most or job.cpus)),
        name=job_name(context, SCORE),
        log=log_pattern(directory.logs, f"{SCORE}-%j.log"),
        python=sys.executable,
        argv=("-m", "proctor", "score", str(directory.resolved)),
    ).text()


async def _send(context: RunContext, site: Site, drafts: Sequence[Draft], result: SubmitOutcome) -> SubmitOutcome:
    directory, scheduler = _absolute(context.directory), site.scheduler
    # All of the run, whatever this call is about: workers of an earlier one may not have begun.
    directory.write_plan({p.model: p.shards for p in result.plan.models if p.owed})
    for draft in drafts:
        write_assignment(context, draft)
    sent: list[Sent] = []
    stopped: LaunchError | None = None
    owed = 0
    waiting = [d for d in drafts if d.plan.missing]
    while waiting and stopped is None:
        draft = waiting.pop(0)

        def render(chunk: Chunk, draft: Draft = draft) -> Submission:
            first = draft.plan.live + chunk.offset
            flags = ("--offset", str(first)) if first else ()
            return Submission(script=draft.script(context, *flags), env=draft.environment)

        done = await submit_elements(
            scheduler.commands,
            render,
            draft.plan.missing,
            max_array=min(scheduler.limits.max_array, draft.shape.settings.array_limit or scheduler.limits.max_array),
            queue_limit=draft.shape.settings.queue_limit,
            throttle=draft.shape.settings.throttle,
        )
        for chunk, job in done.jobs:
            sent.append(_note(directory, draft.shape, job, chunk.size, draft.plan.live + chunk.offset))
        owed += done.owed
        stopped = done.stopped_by
    owed += sum(d.plan.missing for d in waiting)
    warnings = list(result.warnings)
    if sent and result.scoring is not None:
        try:
            sent.append(await _send_scoring(context, site, drafts[0], result.scoring, sent))
        except LaunchError as error:
            # The arrays are in the queue and count; marking is one command away.
            warnings.append(f"no job that marks was taken: {error.message}; `proctor score` does it afterwards")
    return replace(result, sent=tuple(sent), owed=owed, stopped_by=stopped, warnings=tuple(warnings))


async def _send_scoring(context: RunContext, site: Site, first: Draft, script: str, sent: Sequence[Sent]) -> Sent:
    """One job that marks when all workers of the run have ended, instead of one that waits for fewer of them."""
    name, prefix = job_name(context, SCORE), job_prefix(context)
    live = [r for r in site.queue if r.name.startswith(prefix) and not r.stands.final]
    after = sorted({s.job for s in sent} | {r.array for r in live if r.name != name}, key=int)
    job = await submit_one(
        site.scheduler.commands,
        Submission(script=script, dependency=f"afterany:{':'.join(after)}", env=first.environment),
    )
    await site.scheduler.cancel([r.id for r in live if r.name == name])
    return _note(_absolute(context.directory), replace(first.shape, id=SCORE, name=name), job, 1, 0)


def write_assignment(context: RunContext, draft: Draft, *, name: str = "", requeue: str | None = None) -> None:
    """Say what the workers of a draft do, and keep the script beside it; `name` instead of the shape's id."""
    directory, settings = context.directory, draft.shape.settings
    files: list[str] = []
    for target in draft.shape.targets:
        job = replace(target.job(context), container=settings.container)
        file = f"{job.job_id}.json"
        job.write(directory.jobs / file)
        files.append(file)
    script = draft.script(context)
    terms = SlurmTerms(
        requeue=requeue or settings.requeue,
        script=script,
        max_attempts=settings.max_attempts,
        signal_lead_s=settings.signal_lead_s,
        nodes_per_server=settings.nodes_per_server,
        servers=settings.servers,
        staging=settings.staging,
        scoring=job_name(context, SCORE) if settings.scoring is not None else "",
        prefix=job_prefix(context),
    )
    assignment = Assignment(
        shape=draft.shape.id,
        jobs=tuple(files),
        costs=tuple(p.cost_s for p in draft.shape.plans),
        workers=draft.plan.workers,
        startup_s=max(p.startup_s for p in draft.shape.plans),
        swap=settings.swap,
        linger_s=LINGER_S,
        slurm=terms,
    )
    name = name or draft.shape.id
    assignment.write(directory.assignments / f"{name}.json")
    directory.write(directory.assignments / f"{name}.sh", script)


def _absolute(directory: RunDirectory) -> RunDirectory:
    return RunDirectory(Path(directory.root).resolve())


def _note(directory: RunDirectory, shape: Shape, job: str, elements: int, first: int) -> Sent:
    sent = Sent(job=job, shape=shape.id, name=shape.name, elements=elements, first=first, time=time.time())
    with directory.submissions.open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(sent)) + "\n")
        file.flush()
        os.fsync(file.fileno())
    return sent
