"""What the cluster is and allows: its name, its limits, its partitions and their nodes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from proctor.config.slurm_values import clock
from proctor.errors import LaunchError, UnknownName
from proctor.launch.slurm.commands import Commands
from proctor.launch.slurm.records import duration, parse_pairs, parse_settings

_UNUSABLE: Final = re.compile(r"down|drain|fail|inval|unk|maint|\*", re.IGNORECASE)
_NODE_FORMAT: Final = "Partition:|,NodeList:|,StateLong:|,CPUs:|,Memory:|,Gres:|,GresUsed:|"
_GPUS: Final = re.compile(r"\bgpu:(?:([^:,()\s]+):)?(\d+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterLimits:
    """Of the whole cluster, from `scontrol show config`."""

    cluster: str
    version: str
    max_array: int
    """MaxArraySize: the highest index is one less."""
    max_jobs: int
    """MaxJobCount, of all users together."""
    keeps_s: int
    """MinJobAge: how long squeue knows a job that has ended."""
    hides_jobs: bool
    """PrivateData: jobs of other users cannot be seen, so their absence means nothing."""
    requeues: bool
    """JobRequeue: whether a job may be requeued unless it says otherwise."""
    enforces_partitions: bool
    """EnforcePartLimits: sbatch itself refuses what a partition will never run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """As a partition offers it."""

    name: str
    state: str
    cpus: int
    memory_mb: int
    gpus: int
    gpus_used: int
    gpu_types: tuple[str, ...]

    @property
    def usable(self) -> bool:
        """Up, or coming up; not down, drained or unreachable."""
        return _UNUSABLE.search(self.state) is None


@dataclass(frozen=True, slots=True, kw_only=True)
class Partition:
    """One partition and its nodes."""

    name: str
    default: bool
    state: str
    """UP, DOWN, DRAIN or INACTIVE."""
    max_time_s: float | None
    """None: no limit."""
    default_time_s: float | None
    max_nodes: int | None
    preempt_mode: str
    nodes: tuple[Node, ...]

    @property
    def most_gpus(self) -> int:
        """Of its largest node."""
        return max((node.gpus for node in self.nodes), default=0)

    @property
    def most_cpus(self) -> int:
        return max((node.cpus for node in self.nodes), default=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """What one array element will ask for."""

    partition: str | None = None
    """None: the cluster's default."""
    time_limit_s: float | None = None
    """None: the partition's default."""
    least_s: float = 0.0
    """What a job needs at least to do anything."""
    least_of: str = "start-up and one piece of work"
    """What takes so long, in words."""
    nodes: int = 1
    gpus_per_node: int = 0
    gpu_type: str | None = None
    cpus_per_node: int = 1


async def read_limits(commands: Commands) -> ClusterLimits:
    """Ask the controller. Raises Unreachable; LaunchError if a limit cannot be read."""
    settings = parse_settings(await commands.query("scontrol", "show", "config"))
    return limits_of(settings)


def limits_of(settings: dict[str, str]) -> ClusterLimits:
    """Of what `scontrol show config` printed."""
    private = re.split(r"[,\s]+", settings.get("PrivateData", "none").lower())
    return ClusterLimits(
        cluster=_setting(settings, "ClusterName"),
        version=settings.get("SLURM_VERSION", ""),
        max_array=_number(settings, "MaxArraySize"),
        max_jobs=_number(settings, "MaxJobCount"),
        keeps_s=_number(settings, "MinJobAge"),
        hides_jobs="jobs" in private or "all" in private,
        requeues=settings.get("JobRequeue", "1") != "0",
        enforces_partitions=settings.get("EnforcePartLimits", "NO").upper() not in ("NO", "0"),
    )


def _setting(settings: dict[str, str], key: str) -> str:
    if key not in settings:
        raise LaunchError(f"`scontrol show config` says nothing of {key}", hint="see `scontrol show config`")
    return settings[key]


def _number(settings: dict[str, str], key: str) -> int:
    found = re.match(r"\d+", _setting(settings, key))
    if found is None:
        raise LaunchError(f"`scontrol show config` gives {key} = {settings[key]!r}, which is no number")
    return int(found.group())


async def read_partitions(commands: Commands) -> list[Partition]:
    """Every partition that this user may see, with its nodes. Raises Unreachable, LaunchError."""
    described = await commands.query("scontrol", "-o", "show", "partition")
    listed = await commands.query("sinfo", "-h", "-a", "-N", "-O", _NODE_FORMAT)
    return partitions_of(described, listed)


def partitions_of(described: str, listed: str) -> list[Partition]:
    """Of what `scontrol -o show partition` and sinfo printed."""
    nodes: dict[str, list[Node]] = {}
    for line in listed.splitlines():
        values = [value.strip() for value in line.split("|")]
        if len(values) < 7:
            raise LaunchError(f"sinfo printed a line that Proctor cannot read: {line!r}", hint="see `sinfo --version`")
        partition, name, state, cpus, memory, gres, used = values[:7]
        nodes.setdefault(partition.rstrip("*"), []).append(
            Node(
                name=name,
                state=state,
                cpus=int(cpus),
                memory_mb=int(memory),
                gpus=count_gpus(gres),
                gpus_used=count_gpus(used),
                gpu_types=tuple(dict.fromkeys(kind for kind, _ in _GPUS.findall(gres) if kind)),
            )
        )
    rows = [parse_pairs(line) for line in described.splitlines() if line.startswith("PartitionName=")]
    return [
        Partition(
            name=row["PartitionName"],
            default=row.get("Default") == "YES",
            state=row.get("State", "UP"),
            max_time_s=duration(row.get("MaxTime", "UNLIMITED")),
            default_time_s=duration(row.get("DefaultTime", "NONE")),
            max_nodes=int(row["MaxNodes"]) if row.get("MaxNodes", "").isdigit() else None,
            preempt_mode=row.get("PreemptMode", "OFF"),
            nodes=tuple(nodes.get(row["PartitionName"], ())),
        )
        for row in rows
    ]


def count_gpus(gres: str) -> int:
    """GPUs in Slurm's `gpu:a100:4(S:0-1),gpu:v100:2` or `gpu:4`."""
    return sum(int(number) for _, number in _GPUS.findall(gres))


def choose_partition(name: str | None, partitions: Sequence[Partition]) -> Partition:
    """The one of that name, or the default. Raises UnknownName; LaunchError where there is no default."""
    if name is not None:
        found = next((partition for partition in partitions if partition.name == name), None)
        if found is None:
            raise UnknownName.among("partition", name, [p.name for p in partitions], hint="`sinfo -s` lists them")
        return found
    default = next((partition for partition in partitions if partition.default), None)
    if default is None:
        raise LaunchError(
            "this cluster has no default partition", hint=f"name one of {', '.join(p.name for p in partitions)}"
        )
    return default


def check_demand(demand: Demand, partitions: Sequence[Partition]) -> Partition:
    """The partition that will run it. Slurm itself would let most of what is refused here wait for ever.

    A list of partitions (`a,b`) is fine if one of them will do. Raises UnknownName, LaunchError.
    """
    names: list[str | None] = [*demand.partition.split(",")] if demand.partition else [None]
    chosen = [choose_partition(name, partitions) for name in names]
    faults: list[LaunchError] = []
    for partition in chosen:
        fault = _fault(demand, partition)
        if fault is None:
            return partition
        faults.append(fault)
    raise faults[0]


def _fault(demand: Demand, partition: Partition) -> LaunchError | None:
    name = partition.name
    if partition.state != "UP":
        return LaunchError(f"partition {name!r} is {partition.state}", hint="`sinfo -s` shows which are up")
    return _time_fault(demand, partition) or _size_fault(demand, partition)


def _time_fault(demand: Demand, partition: Partition) -> LaunchError | None:
    limit, most = demand.time_limit_s or partition.default_time_s, partition.max_time_s
    if limit is not None and most is not None and limit > most:
        return LaunchError(
            f"time limit {clock(limit)} is beyond MaxTime {clock(most)} of partition {partition.name!r}",
            hint=f"ask for {clock(most)} or less, or choose another partition: `sinfo -o '%P %l'`",
        )
    limit = limit if limit is not None else most
    if limit is not None and limit < demand.least_s:
        return LaunchError(
            f"time limit {clock(limit)} is too short: {demand.least_of} take {clock(demand.least_s)}",
            hint=f"ask for {clock(demand.least_s)} or more"
            + (f"; partition {partition.name!r} allows {clock(most)}" if most is not None else ""),
        )
    return None


def _size_fault(demand: Demand, partition: Partition) -> LaunchError | None:
    """What no node of it can give, whether or not it is up just now."""
    name, nodes = partition.name, partition.nodes
    most_nodes = len(nodes) if partition.max_nodes is None else min(len(nodes), partition.max_nodes)
    if demand.nodes > most_nodes:
        limit = f"MaxNodes is {partition.max_nodes}" if most_nodes < len(nodes) else f"it has {len(nodes)}"
        return LaunchError(
            f"{demand.nodes} nodes are asked of partition {name!r}; {limit}", hint="`sinfo -s`; or use fewer nodes"
        )
    if demand.gpu_type and demand.gpus_per_node and not any(demand.gpu_type in node.gpu_types for node in nodes):
        kinds = sorted({kind for node in nodes for kind in node.gpu_types})
        return LaunchError(
            f"no node of partition {name!r} has GPUs of type {demand.gpu_type!r}; it has {', '.join(kinds) or 'none'}",
            hint="`sinfo -o '%P %G'` lists what there is",
        )
    fitting = [n for n in nodes if n.gpus >= demand.gpus_per_node and n.cpus >= demand.cpus_per_node]
    if len(fitting) < demand.nodes:
        wanted = f"{demand.gpus_per_node} GPUs and {demand.cpus_per_node} CPUs"
        return LaunchError(
            f"a node with {wanted} is asked of partition {name!r}, {demand.nodes} of them; {len(fitting)} of its "
            f"{len(nodes)} have that (at most {partition.most_gpus} GPUs and {partition.most_cpus} CPUs a node)",
            hint="`sinfo -o '%P %D %c %G'` lists what there is",
        )
    return None
