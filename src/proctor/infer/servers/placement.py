"""Where the replicas of a server run, and how a command gets there: a process group of this machine, or a job step."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from proctor.infer.server import ServedModel
from proctor.infer.servers.hardware import gpu_utilisation
from proctor.infer.servers.inside import wrapped
from proctor.infer.servers.ports import PortFinder
from proctor.infer.servers.stalls import Activity
from proctor.interpreters import Command
from proctor.processes.container import Container
from proctor.processes.group import ProcessGroup

LOOPBACK: Final = "127.0.0.1"
NODE_RANK: Final = "@PROCTOR_NODE_RANK@"
"""Stands in a command for the number of the node that runs it; a step puts the number in its place."""
FOLLOWER: Final = "@PROCTOR_FOLLOWER@"
"""Begins a word of a command that the first node does not get."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """What one start of one replica is given."""

    host: str
    """Where its first node listens, and is asked."""
    port: int
    master_port: int
    """A second port of the first node, for what its nodes tell each other."""
    nodes: int = 1
    devices: tuple[str, ...] = ()
    """GPUs on the first node, as CUDA_VISIBLE_DEVICES names them; empty: the environment's own."""

    @property
    def node_rank(self) -> str:
        """For the words of a command."""
        return "0" if self.nodes == 1 else NODE_RANK


class Placement(Protocol):
    """Where replicas run."""

    @property
    def replicas(self) -> int: ...

    @property
    def local(self) -> bool:
        """Whether the processes are descendants of ours, on this machine."""
        ...

    def site(self, replica: int) -> Site:
        """An address for the next start. Raises OSError if there is none."""
        ...

    def command(
        self, command: Command, replica: int, *, container: Container | None, model: ServedModel, scratch: Path
    ) -> Command:
        """What to run here, so that `command` runs there. Raises ConfigError for what cannot be expressed."""
        ...

    async def ended(self, replica: int) -> None:
        """Called when what ran here has ended: nothing is left there on return. Raises ServerError if it cannot."""
        ...

    async def activity(self, replica: int, group: ProcessGroup) -> Activity | None:
        """What the replica's processes are doing; None: that cannot be seen."""
        ...


class OnThisMachine:
    """Processes of this machine, on loopback."""

    local = True

    def __init__(self, replicas: int, *, devices: Sequence[Sequence[str]] = ()) -> None:
        self.replicas: Final = replicas
        self._devices = [tuple(group) for group in devices] or [()] * replicas
        self._ports = PortFinder(LOOPBACK)

    def site(self, replica: int) -> Site:
        # Ranks meet at master_port; here there is one.
        return Site(host=LOOPBACK, port=self._ports.find(), master_port=0, devices=self._devices[replica])

    def command(
        self, command: Command, replica: int, *, container: Container | None, model: ServedModel, scratch: Path
    ) -> Command:
        return command if container is None else wrapped(container, command, model, scratch=scratch)

    async def ended(self, replica: int) -> None:
        return

    async def activity(self, replica: int, group: ProcessGroup) -> Activity | None:
        devices = self._devices[replica]
        used = await gpu_utilisation(devices) if devices else None
        return Activity(cpu_s=await asyncio.to_thread(group.cpu_seconds), gpu_percent=used)
