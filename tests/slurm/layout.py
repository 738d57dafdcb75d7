"""What a cluster looks like: its shape, what keeps it apart from others, and its configuration files."""

from __future__ import annotations

import contextlib
import hashlib
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Final


class ClusterError(Exception):
    """The cluster cannot be brought up, or does not do what was asked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What the cluster looks like; fixed when its directory is made."""

    nodes: int = 4
    gpus: int = 4
    cpus: int = 2
    memory_mb: int = 16000
    accounting: bool = False
    netns: bool = True
    max_array: int = 1001
    extra: str = ""
    """More lines for slurm.conf."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """What keeps clusters of one machine apart."""

    number: int
    shape: Shape

    @property
    def port(self) -> int:
        return 20000 + 40 * self.number

    @property
    def bridge(self) -> str:
        return f"pslurm{self.number}"

    @property
    def network(self) -> str:
        return f"10.77.{self.number}"

    @property
    def controller(self) -> str:
        return f"{self.network}.1" if self.shape.netns else "127.0.0.1"

    def namespace(self, node: str) -> str:
        return f"{self.bridge}-{node}"

    def address(self, node: str) -> str:
        index = int(node[1:])
        return f"{self.network}.{10 + index}" if self.shape.netns else f"127.77.{self.number}.{10 + index}"


def free_number(directory: Path) -> int:
    """A number from the directory's name whose bridge and ports nobody uses."""
    first = int.from_bytes(hashlib.sha256(str(directory).encode()).digest()[:4], "big")
    for step in range(200):
        number = 1 + (first + step) % 200
        place = Place(number=number, shape=Shape())
        if Path("/sys/class/net", place.bridge).exists():
            continue
        with contextlib.ExitStack() as stack:
            try:
                for offset in range(6):
                    probe = stack.enter_context(socket.socket())
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    probe.bind(("0.0.0.0", place.port + offset))
            except OSError:
                continue
        return number
    raise ClusterError("no free network for another cluster: 200 are in use")


def configuration(directory: Path, place: Place) -> dict[str, str]:
    """The configuration files by name."""
    shape = place.shape
    nodes = [f"n{index}" for index in range(1, shape.nodes + 1)]
    gres = f" Gres=gpu:a100:{shape.gpus}" if shape.gpus else ""
    lines = [
        "ClusterName=proctor",
        f"SlurmctldHost={socket.gethostname().split('.')[0]}({place.controller})",
        f"SlurmctldPort={place.port + 1}",
        f"AuthInfo=socket={directory}/munge/socket,cred_expire={5 if shape.nodes <= 32 else 120}",
        f"StateSaveLocation={directory}/spool/ctld",
        f"SlurmdSpoolDir={directory}/spool/%n",
        f"SlurmctldPidFile={directory}/pids/slurmctld.own",
        f"SlurmdPidFile={directory}/pids/slurmd-%n.own",
        f"MaxArraySize={shape.max_array}",
        *_FIXED.strip().splitlines(),
    ]
    if shape.accounting:
        lines += [
            "AccountingStorageType=accounting_storage/slurmdbd",
            f"AccountingStorageHost={place.controller}",
            f"AccountingStoragePort={place.port + 3}",
            f"AccountingStoragePass={directory}/munge/socket",
            "AccountingStorageTRES=gres/gpu",
            "AccountingStorageEnforce=associations,limits,qos",
        ]
    lines.append(f"NodeName=DEFAULT CPUs={shape.cpus} RealMemory={shape.memory_mb} State=UNKNOWN")
    here = socket.gethostname().split(".")[0]
    for index, node in enumerate(nodes):
        host = node if shape.netns else here
        port = place.port + 2 if shape.netns else 32000 + 201 * (place.number % 100) + index
        lines.append(f"NodeName={node} NodeHostname={host} NodeAddr={place.address(node)} Port={port}{gres}")
    lines += [*_PARTITIONS.strip().splitlines(), *shape.extra.splitlines()]
    gpus = [f"NodeName=n[1-{shape.nodes}] Name=gpu Type=a100 File={directory}/dev/nvidia[0-{shape.gpus - 1}]"]
    files = {
        "slurm.conf": "\n".join(lines) + "\n",
        "gres.conf": "\n".join(["AutoDetect=off", *(gpus if shape.gpus else [])]) + "\n",
        "cgroup.conf": "CgroupPlugin=cgroup/v1\n",
    }
    if shape.accounting:
        files["slurmdbd.conf"] = _DATABASE.format(
            directory=directory, controller=place.controller, port=place.port + 3, database=place.port + 4
        )
    return files


# Time limits of a real cluster, shortened: a dead node is noticed in seconds, a requeued job waits cred_expire + 1 s.
_FIXED: Final = """
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
MailProg=/bin/true
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/none
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout=5
SlurmctldTimeout=5
MessageTimeout=5
TCPTimeout=1
KillWait=3
MinJobAge=300
MaxJobCount=100000
JobRequeue=1
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=100
GresTypes=gpu
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1,bf_continue,default_queue_depth=1000
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
"""

_PARTITIONS: Final = """
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE DefaultTime=60 PriorityTier=1 PreemptMode=OFF State=UP
PartitionName=low Nodes=ALL MaxTime=INFINITE DefaultTime=60 PriorityTier=1 PreemptMode=REQUEUE GraceTime=5 State=UP
PartitionName=high Nodes=ALL MaxTime=INFINITE DefaultTime=60 PriorityTier=10 PreemptMode=OFF State=UP
PartitionName=short Nodes=n1 MaxNodes=1 MaxTime=5 DefaultTime=1 PriorityTier=1 PreemptMode=OFF State=UP
"""

_DATABASE: Final = """
AuthType=auth/munge
AuthInfo=socket={directory}/munge/socket
DbdHost=localhost
DbdAddr={controller}
DbdPort={port}
SlurmUser=root
PidFile={directory}/pids/slurmdbd.own
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={database}
StorageUser=slurm
StoragePass=slurm
StorageLoc=slurm_acct_db
"""
