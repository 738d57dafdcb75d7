"""Running Slurm's own commands: no shell, a time limit, a clean environment, and errors that say what to do."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from proctor.errors import LaunchError, MissingTool, Unreachable
from proctor.launch.slurm.refusals import refusal

TIMEOUT_S: Final = 60.0
"""An answer takes milliseconds; a controller that is down takes its clients 5 to 10 s, a busy one up to a minute."""
SUBMIT_TIMEOUT_S: Final = 180.0
"""With MaxJobCount jobs in the queue sbatch tries for two minutes before it gives up."""

_KEPT: Final = frozenset({"SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_CLUSTERS"})
"""Which cluster is meant. All else of these families belongs to a surrounding job, or would override a script."""
_SLURM_VARIABLE: Final = re.compile(r"(SLURM|SLURMD|SBATCH|SALLOC|SRUN|SQUEUE|SINFO|SACCT|SCANCEL|SPANK|PMI|PMIX)_")
_DOWN: Final = re.compile(
    r"unable to contact slurm controller|connect failure|connection (?:refused|reset|timed out)|broken pipe"
    r"|zero bytes were transmitted|no route to host|network is unreachable|authentication error|socket timed out"
    r"|unable to establish controller machine|slurm backup controller in standby mode|slurm_persist_conn_open"
    r"|communication connection failure|unexpected message received|transport endpoint is not connected",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """What a command left."""

    status: int
    out: str
    err: str


Runner = Callable[[Sequence[str], Mapping[str, str], str, float], Output]
"""Runs argv in an environment with text on standard input, at most for some seconds.

Raises FileNotFoundError if there is no such program, subprocess.TimeoutExpired.
"""


def run_program(argv: Sequence[str], environment: Mapping[str, str], text: str, timeout_s: float) -> Output:
    """The real `Runner`."""
    done = subprocess.run(
        list(argv),
        env=dict(environment),
        input=text.encode(),
        capture_output=True,
        timeout=timeout_s,
        check=False,
    )
    return Output(status=done.returncode, out=_decoded(done.stdout), err=_decoded(done.stderr))


def _decoded(data: bytes) -> str:
    return data.decode("utf-8", errors="replace")


def outside(environ: Mapping[str, str]) -> dict[str, str]:
    """`environ` without what a surrounding job or the user's defaults would lend to a command or a submission."""
    return {name: value for name, value in environ.items() if name in _KEPT or not _SLURM_VARIABLE.match(name)}


class Commands:
    """Slurm's commands on this machine; safe to use from several threads."""

    def __init__(
        self,
        *,
        runner: Runner = run_program,
        environ: Mapping[str, str] | None = None,
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        self._runner = runner
        self._environ = outside(os.environ if environ is None else environ)
        self._timeout_s = timeout_s

    def ask(self, *argv: str, timeout_s: float | None = None) -> str:
        """Standard output of a question. Times are printed in UTC. Blocks; raises as `call`."""
        words = {"TZ": "UTC", "SLURM_TIME_FORMAT": "standard", "SLURM_BITSTR_LEN": "0", "LC_ALL": "C.UTF-8"}
        return self._checked(argv, self._environ | words, "", timeout_s or self._timeout_s).out

    async def query(self, *argv: str, timeout_s: float | None = None) -> str:
        """`ask`, without blocking the event loop."""
        return await asyncio.to_thread(self.ask, *argv, timeout_s=timeout_s)

    async def call(
        self,
        *argv: str,
        text: str = "",
        env: Mapping[str, str] | None = None,
        timeout_s: float | None = None,
    ) -> Output:
        """Run a command that changes something, with `env` over the cleaned environment.

        Raises MissingTool if there is no such command, Unreachable if it or the controller does not answer,
        LimitReached for a limit, UnknownName or LaunchError for what Slurm refuses otherwise.
        """
        environment = self._environ | dict(env or {})
        return await asyncio.to_thread(self._checked, argv, environment, text, timeout_s or self._timeout_s)

    def _checked(self, argv: Sequence[str], environment: Mapping[str, str], text: str, timeout_s: float) -> Output:
        try:
            output = self._runner(argv, environment, text, timeout_s)
        except FileNotFoundError:
            raise MissingTool(
                f"no program {argv[0]!r}",
                hint="is this a login node of the cluster? load its Slurm module, or add its bin directory to PATH",
            ) from None
        except OSError as error:
            raise LaunchError(f"{argv[0]} cannot be run: {error}") from error
        except subprocess.TimeoutExpired:
            raise Unreachable(
                f"{argv[0]} does not answer within {timeout_s:g} s", hint="see `scontrol ping`, then repeat the command"
            ) from None
        if output.status == 0:
            return output
        if _DOWN.search(output.err):
            raise Unreachable(
                f"the Slurm controller does not answer: {argv[0]}: {_words(output.err)}",
                hint="see `scontrol ping`; nothing is lost, repeat the command when it is up",
            )
        raise refusal(argv, output.err or output.out, output.status, script=text)


def _words(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1].removeprefix("error: ") if lines else "no message"
