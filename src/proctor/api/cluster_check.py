"""A look at a cluster: does it answer, and will it run what its profile and a run ask for. Submits nothing."""

from __future__ import annotations

import asyncio
import getpass
import os
import shutil
import sys
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from proctor.api.cluster_profiles import ResolvedCluster
from proctor.config.clusters import SlurmSettings
from proctor.config.slurm_values import clock
from proctor.errors import LaunchError, MissingTool, ProctorError, Unreachable
from proctor.launch.slurm.cluster import ClusterLimits, Demand, Partition, check_demand, read_limits, read_partitions
from proctor.launch.slurm.commands import Commands
from proctor.launch.slurm.queue import load, read_queue
from proctor.launch.slurm_script import worker_script
from proctor.report.clusters import Finding

_PROBE_S: Final = 3_600.0
"""The limit that is tried where only a forecast would say one."""
_PROGRAMS: Final = {"charliecloud": "ch-run", "pyxis": "srun"}


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedCluster:
    """What was found."""

    cluster: str
    reason: str
    findings: tuple[Finding, ...]

    @property
    def usable(self) -> bool:
        """Nothing is wrong; there may be warnings."""
        return all(f.state != "failed" for f in self.findings)


async def check_cluster(cluster: ResolvedCluster, commands: Commands | None = None) -> CheckedCluster:
    """Ask Slurm about the partition, limits and accounts of a cluster, and look at what must be on this machine.

    What is wrong is a finding, not an exception.
    """
    commands = commands or Commands()
    settings = cluster.settings
    findings = _local(settings)
    try:
        limits = await read_limits(commands)
    except ProctorError as error:
        findings.insert(0, _failed("Slurm", error))
    else:
        said = f"Slurm {limits.version}, cluster {limits.cluster!r}"
        asked = [
            Finding(what="Slurm", state="ok", said=said),
            _arrays(cluster, limits),
            *await _found("partition", lambda: _partitions(settings, commands)),
            *await _found("queue", lambda: _queue(settings, commands)),
            *await _found("account", lambda: _account(settings, commands)),
            *await _found("a job", lambda: _trial(settings, commands)),
        ]
        findings = asked + findings
    return CheckedCluster(cluster=settings.cluster, reason=cluster.reason, findings=tuple(findings))


async def _found(what: str, look: Callable[[], Coroutine[Any, Any, Sequence[Finding]]]) -> Sequence[Finding]:
    try:
        return await look()
    except ProctorError as error:
        return [_failed(what, error)]


def _failed(what: str, error: ProctorError) -> Finding:
    return Finding(what=what, state="failed", said=error.message, hint=error.hint)


def _arrays(cluster: ResolvedCluster, limits: ClusterLimits) -> Finding:
    ours, theirs = cluster.settings.array_limit, limits.max_array - 1
    said = f"arrays of up to {limits.max_array - 1:,} elements (MaxArraySize), {limits.max_jobs:,} jobs in all"
    if ours is not None and ours > theirs:
        said += f"; the profile's array_limit says {ours:,}"
        return Finding(what="arrays", state="warning", said=said, hint=f"set array_limit: {theirs} in the profile")
    return Finding(what="arrays", state="ok", said=said)


async def _partitions(settings: SlurmSettings, commands: Commands) -> list[Finding]:
    partitions = await read_partitions(commands)
    demand = Demand(
        partition=settings.partition,
        time_limit_s=settings.time_limit_s,
        nodes=settings.nodes,
        gpus_per_node=settings.gpus_per_node or 0,
        gpu_type=settings.gpu_type,
        cpus_per_node=settings.cpus or 1,
    )
    chosen = check_demand(demand, partitions)
    named = (settings.partition or chosen.name).split(",")
    return [_partition(p) for p in partitions if p.name in named]


def _partition(partition: Partition) -> Finding:
    usable = [node for node in partition.nodes if node.usable]
    longest = "no time limit" if partition.max_time_s is None else f"at most {clock(partition.max_time_s)}"
    kinds = sorted({kind for node in partition.nodes for kind in node.gpu_types})
    gpus = f"up to {partition.most_gpus} GPUs a node" + (f" ({', '.join(kinds)})" if kinds else "")
    said = f"{partition.name!r} is {partition.state}: {len(usable)} of {len(partition.nodes)} nodes, {gpus}, {longest}"
    if not usable or partition.state != "UP":
        return Finding(what="partition", state="warning", said=said, hint="jobs will wait; `sinfo -R` may say why")
    return Finding(what="partition", state="ok", said=said)


async def _queue(settings: SlurmSettings, commands: Commands) -> list[Finding]:
    mine = load(await asyncio.to_thread(read_queue, commands))
    limit = settings.queue_limit
    if limit is None:
        return [Finding(what="queue", state="ok", said=f"{mine:,} jobs of yours; the profile knows no limit")]
    said = f"{mine:,} jobs of yours of {limit:,} that the profile allows"
    if mine >= limit:
        return [Finding(what="queue", state="warning", said=said, hint="new jobs are submitted when some have ended")]
    return [Finding(what="queue", state="ok", said=said)]


async def _account(settings: SlurmSettings, commands: Commands) -> list[Finding]:
    """Associations of this user, where the cluster keeps them and shows them."""
    fields = "Account,Partition,QOS,MaxSubmitJobs,MaxJobs"
    user = getpass.getuser()
    try:
        text = await commands.query("sacctmgr", "-nP", "show", "assoc", "where", f"user={user}", f"format={fields}")
    except Unreachable:
        raise
    except (MissingTool, LaunchError):
        return [Finding(what="account", state="ok", said="the cluster keeps no accounting, or does not show it")]
    rows = [line.split("|") for line in text.splitlines() if line.count("|") >= 4]
    if not rows:
        return [Finding(what="account", state="warning", said=f"accounting knows no account of user {user!r}")]
    mine = [row for row in rows if settings.account in (None, row[0])]
    names = ", ".join(sorted({row[0] for row in rows}))
    if not mine:
        said = f"account {settings.account!r} is none of yours: {names}"
        return [Finding(what="account", state="failed", said=said, hint="set launch.account to one of them")]
    found = [Finding(what="account", state="ok", said=_limits(f"account {mine[0][0]!r}", mine[0][3], mine[0][4]))]
    qualities = {qos for row in mine for qos in row[2].split(",") if qos}
    if settings.qos and settings.qos not in qualities:
        said = f"QOS {settings.qos!r} is not open to you there: {', '.join(sorted(qualities)) or 'none is'}"
        found.append(Finding(what="QOS", state="failed", said=said, hint="set launch.qos to one of them"))
    elif settings.qos:
        found += await _quality(settings.qos, commands)
    return found


async def _quality(qos: str, commands: Commands) -> list[Finding]:
    fields = "Name,MaxSubmitJobsPerUser,MaxJobsPerUser,MaxWall"
    text = await commands.query("sacctmgr", "-nP", "show", "qos", "where", f"name={qos}", f"format={fields}")
    rows = [line.split("|") for line in text.splitlines() if line.count("|") >= 3]
    return [Finding(what="QOS", state="ok", said=_limits(f"QOS {r[0]!r}", r[1], r[2], r[3])) for r in rows]


def _limits(what: str, submit: str, running: str, longest: str = "") -> str:
    parts = [f"at most {submit} jobs in the queue" * bool(submit), f"{running} running" * bool(running)]
    parts.append(f"{longest} each" * bool(longest))
    stated = ", ".join(filter(None, parts))
    return f"{what}: {stated}" if stated else f"{what}: no limits of its own"


async def _trial(settings: SlurmSettings, commands: Commands) -> list[Finding]:
    """`sbatch --test-only`: the controller's own word on partition, account, QOS, GPUs and time together."""
    gpus = 1 if settings.gpus_per_node and settings.gpu_flag_style != "none" else 0
    limit = settings.time_limit_s or (
        None if not settings.auto_time else min(_PROBE_S, settings.max_time_s or _PROBE_S)
    )
    script = worker_script(
        settings,
        name="proctor-check",
        log="/dev/null",
        python=sys.executable,
        argv=("-c", "pass"),
        gpus=gpus,
        time_limit_s=limit,
    )
    output = await commands.call("sbatch", "--test-only", text=script.text())
    words = " ".join((output.err or output.out).split()).removeprefix("sbatch: ")
    return [Finding(what="a job", state="ok", said=f"would be accepted: {words}")]


def _local(settings: SlurmSettings) -> list[Finding]:
    """What must be there on this machine, which shares its file systems with the nodes."""
    environment, container = settings.environment, settings.container
    wanted = [("shared directory", path) for path in settings.shared]
    if environment.venv is not None:
        wanted.append(("environment", os.path.join(environment.venv, "bin", "activate")))
    wanted += [("environment", path) for path in (environment.pixi, environment.conda_sh) if path is not None]
    if container is not None and container.image.startswith("/"):
        wanted.append(("container image", container.image))
    findings = [_there(what, path) for what, path in wanted]
    if container is not None:
        program = _PROGRAMS.get(container.type, container.type)
        if shutil.which(program) is None:
            said = f"no program {program!r} on this machine; the nodes may have it"
            findings.append(Finding(what="container", state="warning", said=said, hint="`proctor doctor` tries a node"))
    return findings


def _there(what: str, path: str) -> Finding:
    if Path(path).exists():
        return Finding(what=what, state="ok", said=f"{path} is there")
    return Finding(what=what, state="failed", said=f"{path} is not there", hint="correct the profile or run.yaml")
