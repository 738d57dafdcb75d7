"""Will this run work here? Looks at everything that can be looked at, then proves it by one small job."""

from __future__ import annotations

import asyncio
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from proctor.api.cluster_check import check_cluster
from proctor.api.cluster_profiles import resolve_clusters
from proctor.api.context import RunContext
from proctor.api.local_workers import local_workers
from proctor.api.planning import make_plan
from proctor.api.progress import Progress, Silent
from proctor.api.recording import Recorded, record
from proctor.api.sent import job_prefix
from proctor.api.submitting import Draft, draft, list_needs, look, write_assignment
from proctor.api.targets import Target, resolve_targets
from proctor.config.spec import LocalLaunch, SlurmLaunch
from proctor.errors import LaunchError, ProctorError
from proctor.launch.launcher import JobState
from proctor.launch.local import LocalLauncher
from proctor.launch.slurm.queue import read_queue
from proctor.launch.slurm.scheduler import SlurmScheduler
from proctor.launch.slurm.submission import Submission, submit
from proctor.plan import ModelPlan
from proctor.processes.group import tail
from proctor.report.clusters import Finding
from proctor.store import Store
from proctor.worker.attempt import Ending, read_attempts

REQUESTS: Final = 4
"""That a trial asks of each model. Its answers count: they are not asked again."""
WAIT_S: Final = 1800.0
_POLL_S: Final = 2.0
_FEW_INODES: Final = 10_000
_LITTLE_BYTES: Final = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """What was found, in the order in which it was looked at."""

    run: str
    findings: tuple[Finding, ...]

    @property
    def healthy(self) -> bool:
        """Nothing is wrong; there may be warnings."""
        return all(f.state != "failed" for f in self.findings)


async def doctor(
    config: str | Path,
    overrides: Sequence[str] = (),
    *,
    trial: bool = True,
    wait_s: float = WAIT_S,
    progress: Progress | None = None,
) -> Diagnosis:
    """Look at the configuration, store, tasks, models and cluster of a run, and with `trial` let one small job for
    each kind of resources ask `REQUESTS` requests. A trial that still waits after `wait_s` seconds is ended.

    What is wrong is a finding, not an exception; only ConfigError is raised, for a file that cannot be read at all.
    """
    progress = progress or Silent()
    context = RunContext.open(config, overrides)
    found = [_ok("configuration", f"{context.config}: {len(context.spec.models)} models, store {context.spec.store!r}")]
    try:
        for cluster in resolve_clusters(context):
            progress.phase("asking the cluster")
            checked = await check_cluster(cluster)
            found.append(_ok("cluster", f"{checked.cluster}: {checked.reason}"))
            found += checked.findings
    except ProctorError as error:
        found.append(_failed("cluster", error))
    try:
        store = context.store(create=True)
        context.write_configuration()
        found += await asyncio.to_thread(_storage, Path(context.spec.store))
        progress.phase("recording the tasks")
        recorded = await asyncio.to_thread(record, context, store)
        requests = sum(len(r.instances) for r in recorded.recordings.values())
        found.append(_ok("tasks", f"{len(recorded.recordings)} recorded, {requests} requests"))
        progress.phase("reading the models")
        targets = await asyncio.to_thread(resolve_targets, context, store)
        found += [_ok("model", f"{t.id}: weights {t.weights[:12]}, {t.entry.path}") for t in targets]
        if trial:
            progress.phase("one small job")
            found += await _trial(context, store, targets, recorded, progress, wait_s=wait_s)
    except ProctorError as error:
        found.append(_failed("preparation", error))
    return Diagnosis(run=context.spec.name, findings=tuple(found))


def _ok(what: str, said: str) -> Finding:
    return Finding(what=what, state="ok", said=said)


def _failed(what: str, error: ProctorError) -> Finding:
    return Finding(what=what, state="failed", said=error.message, hint=error.hint)


def _storage(place: Path) -> list[Finding]:
    """Whether claims can be made there (hard links), and whether there is room."""
    probe = place / f".doctor-{os.getpid()}"
    linked = probe.with_suffix(".linked")
    try:
        probe.write_text("proctor", encoding="ascii")
        os.link(probe, linked)
        links = probe.stat().st_nlink
    except OSError as error:
        return [
            Finding(
                what="store",
                state="failed",
                said=f"{str(place)!r}: {error.strerror or error}",
                hint="the store needs a file system that can be written to and knows hard links",
            )
        ]
    finally:
        linked.unlink(missing_ok=True)
        probe.unlink(missing_ok=True)
    free, inodes = shutil.disk_usage(place).free, os.statvfs(place).f_favail
    said = f"hard links work (count {links}), {free / 1e9:.1f} GB and {inodes:,} files free"
    # Some file systems count no inodes and say 0 of 0.
    few = os.statvfs(place).f_files and inodes < _FEW_INODES
    if free < _LITTLE_BYTES or few:
        return [Finding(what="store", state="warning", said=said, hint="free some space before a long run")]
    return [_ok("store", said)]


async def _trial(
    context: RunContext,
    store: Store,
    targets: Sequence[Target],
    recorded: Recorded,
    progress: Progress,
    *,
    wait_s: float,
) -> list[Finding]:
    plan = await asyncio.to_thread(make_plan, context, store, targets, recorded.suites)
    owing = [(t, m) for t, m in zip(targets, plan.models, strict=True) if m.owed]
    if not owing:
        return [_ok("trial", "nothing is owed: everything has been answered already")]
    context.directory.write_plan({m.model: m.shards for _, m in owing})
    found = [await _try_here(context, t, m, t.launch) for t, m in owing if isinstance(t.launch, LocalLaunch)]
    away = [(t, m) for t, m in owing if isinstance(t.launch, SlurmLaunch)]
    if not away:
        return found
    site = await look(progress)
    drafts = draft(context, [t for t, _ in away], replace(plan, models=tuple(m for _, m in away)), site)
    await asyncio.to_thread(list_needs, context, store, targets, recorded, drafts)
    return [*found, *[await _try_there(context, d, site.scheduler, wait_s) for d in drafts]]


async def _try_here(context: RunContext, target: Target, plan: ModelPlan, launch: LocalLaunch) -> Finding:
    flags = ("--at-most", str(REQUESTS))
    (job,) = local_workers(context, target, workers=1, cost_s=plan.cost_s, name="doctor-", flags=flags)
    started = time.monotonic()
    try:
        async with await LocalLauncher.open(launch) as launcher:
            await launcher.submit([job])
            while not (status := (await launcher.poll(wait_s=_POLL_S))[job.id]).state.final:
                pass
    except LaunchError as error:
        # Of this model alone: the others are still to be tried.
        return Finding(what="trial", state="failed", said=f"{target.id}: {error.message}", hint=error.hint)
    took = time.monotonic() - started
    if status.state is JobState.DONE:
        asked = min(REQUESTS, len(plan.shards[0].items))  # a worker on trial takes one shard
        return _ok("trial", f"{target.id}: {asked} requests answered in {took:.0f} s with start-up")
    said = f"{target.id}: {status.message or tail(job.log, lines=3)}"
    return Finding(what="trial", state="failed", said=said, hint=f"see {job.log}")


async def _try_there(context: RunContext, one: Draft, scheduler: SlurmScheduler, wait_s: float) -> Finding:
    name = f"doctor-{one.shape.id}"
    write_assignment(context, one, name=name, requeue="never")
    script = one.script(context, "--at-most", str(REQUESTS), assignment=name, name=f"{job_prefix(context)}{name}")
    started, began = time.monotonic(), time.time()
    job = await submit(scheduler.commands, Submission(script=script, env=one.environment))
    log = context.directory.logs / f"{name}-{job}.log"
    reason = ""
    while time.monotonic() - started < wait_s:
        record = next((r for r in await asyncio.to_thread(read_queue, scheduler.commands) if r.job == job), None)
        if record is None or record.stands.final:
            break
        reason = record.reason
        await asyncio.sleep(_POLL_S)
    else:
        await scheduler.cancel([job])
        return Finding(
            what="trial",
            state="warning",
            said=f"job {job} still waited after {wait_s:.0f} s and was ended: {reason or 'no reason given'}",
            hint="repeat with a longer --wait, or on a less busy partition",
        )
    ended = [a for a in read_attempts(context.directory.attempts) if a.job == job and a.started >= began - 1]
    if ended and ended[-1].ending is Ending.DONE and ended[-1].answered:
        said = f"job {job} on {ended[-1].host}: {ended[-1].answered} requests answered, {', '.join(ended[-1].models)}"
        return _ok("trial", said)
    words = ended[-1].message if ended else tail(log, lines=3)
    return Finding(
        what="trial",
        state="failed",
        said=f"job {job}: {words or 'it ended without a word'}",
        hint=(ended[-1].hint if ended else None) or f"see {log}",
    )
