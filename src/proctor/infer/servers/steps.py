"""Replicas as steps of a Slurm job: each on its own nodes, started by srun from the node that runs the worker."""

from __future__ import annotations

import random
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from proctor.errors import ConfigError, ProctorError, ServerError
from proctor.infer.server import ServedModel
from proctor.infer.servers.inside import forwarded, model_binds, wrapped
from proctor.infer.servers.placement import FOLLOWER, NODE_RANK, Site
from proctor.infer.servers.stalls import Activity
from proctor.interpreters import Command
from proctor.processes.container import Container, pyxis_options
from proctor.processes.group import ProcessGroup

PORTS: Final = range(30_000, 60_000)
"""eval-hive's. Whether one is free on another node only the server's own bind can tell; then it gets the next."""
NODES_WITHIN_S: Final = 60
"""How long srun waits for the nodes of the job that it is part of; without a limit it would wait for ever."""
LOOK_S: Final = 5.0
"""Between two looks at what a step does: each is a step of its own."""
_WHOLE_WITHIN_S: Final = 10
"""When one node's part has ended, the others get so long to follow, in seconds."""
_KEPT: Final = re.compile(r"SLURM_(CONF|JOB_?ID|ARRAY_|CLUSTER_NAME|WORKING_CLUSTER|SUBMIT_|RESTART_COUNT|TMPDIR)")
_SLURM: Final = re.compile(r"(SLURM|SRUN|PMI|PMIX)_")
"""What the batch step knows of itself would be taken by srun for options (SLURM_NTASKS_PER_NODE, SLURM_MEM_PER_CPU);
the tasks get their own."""

_ON_A_NODE: Final = f"""\
rank=${{SLURM_PROCID:-0}}
devices=$1
shift
if [ -n "$devices" ] && [ -n "$CUDA_VISIBLE_DEVICES" ]; then
  CUDA_VISIBLE_DEVICES=$(printf %s "$CUDA_VISIBLE_DEVICES" | cut -d, -f"$devices")
  export CUDA_VISIBLE_DEVICES APPTAINERENV_CUDA_VISIBLE_DEVICES="$CUDA_VISIBLE_DEVICES"
  export SINGULARITYENV_CUDA_VISIBLE_DEVICES="$CUDA_VISIBLE_DEVICES"
fi
export PROCTOR_NODE_RANK="$rank" APPTAINERENV_PROCTOR_NODE_RANK="$rank" SINGULARITYENV_PROCTOR_NODE_RANK="$rank"
export APPTAINERENV_SLURM_PROCID="$rank" SINGULARITYENV_SLURM_PROCID="$rank"
for word do
  shift
  case $word in
    {FOLLOWER}*)
      [ "$rank" = 0 ] && continue
      word=${{word#{FOLLOWER}}} ;;
  esac
  while :; do
    case $word in
      *{NODE_RANK}*) word="${{word%%{NODE_RANK}*}}$rank${{word#*{NODE_RANK}}}" ;;
      *) break ;;
    esac
  done
  set -- "$@" "$word"
done
exec "$@"
"""
"""What runs first on each node: the shell, since a node has no other interpreter for certain. Its positional words
are the node's share of GPUs (as `cut -f`) and the command; no user's word is part of the script."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTerms:
    """The job whose nodes the replicas share."""

    job: str
    hosts: tuple[str, ...]
    """In the scheduler's order."""
    addresses: tuple[str, ...]
    """Where each host is reached from the others."""
    nodes_per_server: int
    gpus: tuple[str, ...] = ()
    """On the worker's own node, as CUDA_VISIBLE_DEVICES names them."""
    end: Callable[[str], Awaitable[None]]
    """Ends every step of this name, and returns when none is left. Raises LaunchError."""
    look: Callable[[str, Sequence[str], str | None], Awaitable[Activity | None]] | None = None
    """What the step of this name does on these hosts, None if that cannot be seen. The last word is which of a node's
    GPUs are its own, as for `cut -f` ("": all); None: it has none."""


class Steps:
    """`replicas` on each `nodes_per_server` nodes, in the hosts' order."""

    local = False

    def __init__(self, terms: StepTerms, *, replicas: int, gpus: int) -> None:
        """`replicas` and `gpus` (of each replica, over all of its nodes) are the server's.

        Raises ConfigError if the GPUs of a replica cannot be the same number on each of its nodes.
        """
        size = terms.nodes_per_server
        if gpus % size:
            raise ConfigError(
                f"{gpus} GPUs of a server cannot be shared evenly by its {size} nodes",
                hint="`gpus` of the server counts all of its nodes: a multiple of launch.nodes_per_server",
            )
        self._terms = terms
        self._each = replicas
        self._gpus = gpus // size
        self.replicas: Final = len(terms.hosts) // size * replicas
        self._names = [""] * self.replicas
        self._hidden = [False] * self.replicas
        self._looked: dict[int, tuple[float, Activity | None]] = {}
        self._used: set[int] = set()

    def hosts(self, replica: int) -> tuple[str, ...]:
        """The nodes of one replica, the first one first."""
        start = replica // self._each * self._terms.nodes_per_server
        return self._terms.hosts[start : start + self._terms.nodes_per_server]

    def site(self, replica: int) -> Site:
        address = self._terms.addresses[self._terms.hosts.index(self.hosts(replica)[0])]
        return Site(
            host=address,
            port=self._port(),
            master_port=self._port(),
            nodes=self._terms.nodes_per_server,
            devices=self._terms.gpus[: self._gpus],
        )

    def _port(self) -> int:
        free = [port for port in PORTS if port not in self._used] or list(PORTS)
        port = random.choice(free)
        self._used.add(port)
        return port

    def command(
        self, command: Command, replica: int, *, container: Container | None, model: ServedModel, scratch: Path
    ) -> Command:
        self._names[replica] = f"proctor-{replica}-{secrets.token_hex(6)}"
        # What podman starts is no part of the step.
        self._hidden[replica] = container is not None and container.type == "podman"
        self._looked.pop(replica, None)
        options: list[str] = []
        if container is not None and container.type == "pyxis":
            options = [*pyxis_options(container, forwarded(command), model_binds(model, scratch)), *container.args]
        elif container is not None:
            seen = dict(command.env) | dict.fromkeys(("PROCTOR_NODE_RANK", "SLURM_PROCID"), "")
            if self._gpus:
                seen["CUDA_VISIBLE_DEVICES"] = ""
            command = wrapped(container, Command(argv=command.argv, env=seen), model, scratch=scratch)
        step = [*self._srun(replica), *options]
        inner = ["/bin/sh", "-c", _ON_A_NODE, "proctor", self._share(replica), *command.argv]
        return Command(argv=(*step, *inner), env=step_environment(command.env))

    def _srun(self, replica: int) -> list[str]:
        hosts = self.hosts(replica)
        words = srun_words(self._terms.job, self._names[replica], hosts)
        return [*words, "--kill-on-bad-exit=1", f"--wait={_WHOLE_WITHIN_S}", *(["--label"] if len(hosts) > 1 else [])]

    def _share(self, replica: int) -> str:
        """Which of a node's GPUs are this replica's, for `cut -f`; empty: all."""
        if self._each == 1 or not self._gpus:
            return ""
        first = replica % self._each * self._gpus
        return f"{first + 1}-{first + self._gpus}"

    async def ended(self, replica: int) -> None:
        name = self._names[replica]
        if not name:
            return
        try:
            await self._terms.end(name)
        except ProctorError as error:
            raise ServerError(
                f"the step {name} of job {self._terms.job} may still run on {', '.join(self.hosts(replica))}: "
                f"{error.message}",
                hint=error.hint or f"see `squeue --steps --jobs {self._terms.job}`",
                state="died",
            ) from error
        self._names[replica] = ""

    async def activity(self, replica: int, group: ProcessGroup) -> Activity | None:
        """What the step's processes do on its nodes, as found at most `LOOK_S` ago."""
        look, name = self._terms.look, self._names[replica]
        if look is None or not name or self._hidden[replica]:
            return None
        when, found = self._looked.get(replica, (float("-inf"), None))
        if time.monotonic() - when >= LOOK_S:
            found = await look(name, self.hosts(replica), self._share(replica) if self._gpus else None)
            self._looked[replica] = time.monotonic(), found
        return found


def srun_words(job: str, name: str, hosts: Sequence[str]) -> list[str]:
    """srun for a step of this name, one task on each host; the program's words follow."""
    return [
        "srun",
        f"--jobid={job}",
        f"--job-name={name}",
        f"--nodes={len(hosts)}",
        f"--ntasks={len(hosts)}",
        "--ntasks-per-node=1",
        f"--nodelist={','.join(hosts)}",
        # All that the job has on these nodes, beside the worker and the other steps there.
        "--overlap",
        "--mem=0",
        "--cpu-bind=none",
        "--mpi=none",
        "--export=ALL",
        f"--immediate={NODES_WITHIN_S}",
        "--unbuffered",
    ]


def step_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """`environ` without what srun would take for options of the step."""
    return {name: value for name, value in environ.items() if _KEPT.match(name) or not _SLURM.match(name)}
