"""The nodes of the job that this process is part of, what its steps do, and their end."""

from __future__ import annotations

import asyncio
import ipaddress
import re
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from proctor.errors import LaunchError, MissingTool, Unreachable
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


@dataclass(frozen=True, slots=True, kw_only=True)
class StepUse:
    """What a step's processes use on all of its nodes."""

    cpu_s: float
    """CPU time so far, of those that live."""
    gpu_percent: float | None
    """Highest utilisation of its GPUs; None if nobody tells."""


async def step_use(
    commands: Commands, job: str, name: str, srun: Sequence[str], nodes: int, devices: str | None
) -> StepUse | None:
    """Look on each of its nodes at what the step of that name does; None where that cannot be seen.

    `srun` begins a command that has one task on each of the `nodes`. `devices`: which of a node's GPUs are the step's,
    as `cut -f` takes it ("": all); None: it has none.
    """
    try:
        found = await _steps(commands, job, name)
        if len(found) != 1:
            return None
        # squeue shows steps of an array's element as 4711_3.0, which listpids does not know.
        step = f"{job}.{found[0].rpartition('.')[2]}"
        words = (step, devices or "", "" if devices is None else "gpus")
        said = await commands.query(*srun, "/bin/sh", "-c", _LOOK, "look", *words)
    except (LaunchError, MissingTool):
        return None
    rows = _USE.findall(said)
    if len(rows) != nodes or any(pids == "0" for pids, *_ in rows):
        return None
    used = [float(percent) for *_, percent in rows if percent != "-"]
    ticks = sum(int(ticks) / int(rate) for _, ticks, rate, _ in rows)
    return StepUse(cpu_s=ticks, gpu_percent=max(used, default=None))


_USE: Final = re.compile(r"use (\d+) (\d+) (\d+) (\d+|-)$", re.MULTILINE)
_LOOK: Final = """\
step=$1 devices=$2 gpus=$3
pids=0 ticks=0 percent=-
add() {
  stat=$(cat "/proc/$1/stat" 2>/dev/null) || return 0
  set -- ${stat##*) }
  pids=$((pids + 1)) ticks=$((ticks + ${12} + ${13}))
}
for pid in $(scontrol listpids "$step" 2>/dev/null | cut -d" " -f1); do
  case $pid in *[!0-9]*) ;; *) add "$pid" ;; esac
done
if [ -n "$gpus" ] && command -v nvidia-smi >/dev/null; then
  own=$CUDA_VISIBLE_DEVICES
  [ -n "$devices" ] && own=$(printf %s "$own" | cut -d, -f"$devices")
  for used in $(timeout 20 nvidia-smi ${own:+-i "$own"} --query-gpu=utilization.gpu --format=csv,noheader,nounits); do
    case $used in
      *[!0-9]*) ;;
      *) [ "$percent" = - ] && percent=0; [ "$used" -gt "$percent" ] && percent=$used ;;
    esac
  done
fi
echo "use $pids $ticks $(getconf CLK_TCK) $percent"
"""
"""Run on each node: the shell, since a node has no other interpreter for certain."""


async def _steps(commands: Commands, job: str, name: str) -> list[str]:
    out = await commands.query("squeue", "--steps", "--noheader", f"--jobs={job}", "--format=%i %j")
    rows = (line.split(None, 1) for line in out.splitlines())
    return [row[0] for row in rows if len(row) == 2 and row[1].strip() == name]
