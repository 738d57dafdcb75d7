"""The nodes of the job that this process is part of, and the end of its steps."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import time
from collections.abc import Sequence
from typing import Final

from proctor.errors import LaunchError, Unreachable
from proctor.launch.slurm.commands import Commands
from proctor.launch.slurm.records import parse_pairs

_END_S: Final = 90.0
"""For the steps' end: SIGKILL takes seconds; a controller that restarts, a minute."""
_PAUSE_S: Final = 0.5


async def host_names(commands: Commands, nodelist: str) -> tuple[str, ...]:
    """`n[1-3,7]` as names in Slurm's order. Needs no controller. Raises LaunchError."""
    return tuple((await commands.query("scontrol", "show", "hostnames", nodelist)).split())


async def addresses(commands: Commands, hosts: Sequence[str]) -> tuple[str, ...]:
    """Where each host can be reached from the other nodes.

    By its name, unless that leads nowhere or, as on many nodes for their own name, to loopback; then by the address
    that Slurm itself uses. Raises LaunchError for a host without either.
    """
    return tuple([await _address(commands, host) for host in hosts])


async def _address(commands: Commands, host: str) -> str:
    found = await asyncio.to_thread(_resolve, host)
    if found is None:
        shown = parse_pairs(await commands.query("scontrol", "-o", "show", "node", host))
        named = shown.get("NodeAddr", "")
        found = await asyncio.to_thread(_resolve, named) if named else None
    if found is None:
        raise LaunchError(
            f"the node {host!r} has no address that other nodes can reach",
            hint=f"see `getent hosts {host}` on the nodes, and NodeAddr in `scontrol show node {host}`",
        )
    return found


def _resolve(name: str) -> str | None:
    """The first IPv4 address that is not loopback."""
    try:
        rows = socket.getaddrinfo(name, None, family=socket.AF_INET, type=socket.SOCK_STREAM)
    except OSError:
        return None
    found = [str(row[4][0]) for row in rows]
    return next((a for a in found if not ipaddress.ip_address(a).is_loopback), None)


async def end_steps(commands: Commands, job: str, name: str) -> None:
    """Kill every step of that name of a job; on return the controller knows of none.

    Raises Unreachable if the controller does not answer for long, LaunchError if a step does not end.
    """
    deadline = time.monotonic() + _END_S
    while True:
        try:
            left = await _steps(commands, job, name)
            if not left:
                return
            await commands.call("scancel", "--signal=KILL", *left)
        except Unreachable:
            if time.monotonic() > deadline:
                raise
            left = []
        except LaunchError:
            left = []  # it has ended between the two commands: the next look says so
        if time.monotonic() > deadline:
            raise LaunchError(
                f"steps {', '.join(left) or name} of job {job} do not end",
                hint=f"see `squeue --steps --jobs {job}`; the end of the job ends them",
            )
        await asyncio.sleep(_PAUSE_S)


async def _steps(commands: Commands, job: str, name: str) -> list[str]:
    out = await commands.query("squeue", "--steps", "--noheader", f"--jobs={job}", "--format=%i %j")
    rows = (line.split(None, 1) for line in out.splitlines())
    return [row[0] for row in rows if len(row) == 2 and row[1].strip() == name]
