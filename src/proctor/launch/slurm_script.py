"""The script that is submitted: directives, an environment, one `exec`. Everything else is Python.

Nothing that a user names is ever shell: values are quoted, or refused where Slurm has no way to quote them. The
only lines that the shell reads as they stand are those of `environment.command`, which are meant to be shell.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Final

from proctor.config.clusters.settings import ScoringJob, SlurmSettings
from proctor.config.slurm_values import clock
from proctor.config.spec import GpuFlagStyle, SlurmEnvironment
from proctor.errors import ConfigError
from proctor.interpreters import OFFLINE

EXPORTED: Final = ("HOME", "USER", "LOGNAME", "SHELL", "PATH", "LANG", "LC_ALL", "TZ", "PROCTOR_CACHE")
"""Variables that every job has from the shell that submits. No more than these, so that a job does not depend on
what else happened to be set there (CUDA_VISIBLE_DEVICES, PYTHONPATH, another virtual environment)."""
_FOR_SBATCH: Final = ("SLURM_CONF", "SLURM_CLUSTERS")
ALWAYS: Final = {"PYTHONNOUSERSITE": "1", "PYTHONUNBUFFERED": "1"}
USAGE_ERROR: Final = 2
"""What a job ends with whose environment cannot be set up: no retry helps."""
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f\x85\u2028\u2029\udc80-\udcff]")
_SECRET: Final = re.compile(
    r"(^|_)(TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?|(API|ACCESS|SECRET|PRIVATE)_?KEY)$", re.IGNORECASE
)
_OWN_MEMORY: Final = frozenset({"mem", "mem-per-cpu", "mem-per-gpu"})
_ESCAPES: Final = {"\n": r"\n", "\r": r"\r", "\t": r"\t", "\\": r"\\", "'": r"\'"}


class Variable(Enum):
    """A word of the command that Slurm knows and the submitter does not."""

    ARRAY_TASK = "${SLURM_ARRAY_TASK_ID:-0}"
    JOB_ID = "${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}"


@dataclass(frozen=True, slots=True, kw_only=True)
class JobScript:
    """One script. What differs between submissions of it (array, dependency) is the submitter's command line."""

    name: str
    log: str
    """Slurm's pattern for output and errors; see `log_pattern`."""
    argv: tuple[str | Variable, ...]
    """What follows `exec PYTHON`."""
    python: str
    """The interpreter, where the environment names none of its own."""
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    nodes: int = 1
    cpus: int | None = None
    memory: str | None = None
    gpus: int = 0
    """For each node."""
    gpu_flag_style: GpuFlagStyle = "gres"
    gpu_type: str | None = None
    time_limit_s: float | None = None
    signal_lead_s: int | None = None
    requeue: bool = False
    sbatch: Mapping[str, Any] = field(default_factory=dict[str, Any])
    environment: SlurmEnvironment = field(default_factory=SlurmEnvironment)
    env: Mapping[str, str] = field(default_factory=dict[str, str])
    pass_env: tuple[str, ...] = ()

    def text(self) -> str:
        """The script. Raises ConfigError for a value that a directive cannot hold, and for a secret in `env`."""
        lines = ["#!/bin/bash", *(f"#SBATCH {line}" for line in self.directives()), ""]
        if self.signal_lead_s is not None:
            # Slurm sends it up to a minute early, which may be before the worker listens: that must not kill the job.
            lines.append("trap '' USR1")
        lines += _activation(self.environment)
        for name, value in (ALWAYS | dict(self.env)).items():
            if value and _SECRET.search(name):
                raise ConfigError(
                    f"the value of {name} would stand in a job script, where others can read it",
                    hint=f"export {name}=… in your shell and write launch.pass_env: [{name}]",
                )
            lines.append(f"export {name}={quoted(value)}")
        words = [f'"{word.value}"' if isinstance(word, Variable) else quoted(word) for word in self.argv]
        return "\n".join([*lines, "", " ".join(["exec", quoted(self._interpreter()), *words]), ""])

    def submission_environment(self, environ: Mapping[str, str]) -> dict[str, str]:
        """What sbatch is to be run with, and hence what the job gets: EXPORTED, `pass_env`, and nothing else.

        So neither SBATCH_*, which would go before the directives, nor the SLURM_* of a job that this may be.
        """
        names = (*EXPORTED, *_FOR_SBATCH, *map(_variable_name, self.pass_env))
        return {name: environ[name] for name in names if name in environ}

    def directives(self) -> list[str]:
        """Options of sbatch in the form that a #SBATCH line has."""
        options: dict[str, Any] = {
            "job-name": self.name,
            "output": self.log,
            "open-mode": "append",
            # All that sbatch itself has, see `submission_environment`: a list of names would make each node run the
            # user's login shell first (--get-user-env).
            "export": "ALL",
            "partition": self.partition,
            "account": self.account,
            "qos": self.qos,
            "nodes": self.nodes,
            "ntasks-per-node": 1,
            "cpus-per-task": self.cpus,
            "mem": None if _OWN_MEMORY & self.sbatch.keys() else self.memory,
            **self._gpu_option(),
            "time": None if self.time_limit_s is None else clock(self.time_limit_s),
            # To the batch shell, which has become Python by then; its servers are told by Python.
            "signal": None if self.signal_lead_s is None else f"B:USR1@{self.signal_lead_s}",
            "requeue" if self.requeue else "no-requeue": True,
            **self.sbatch,
        }
        return [_directive(name, value) for name, value in options.items() if value is not None and value is not False]

    def _gpu_option(self) -> dict[str, str]:
        if not self.gpus or self.gpu_flag_style == "none":
            return {}
        kind = f"{self.gpu_type}:" if self.gpu_type else ""
        if self.gpu_flag_style == "gres":
            return {"gres": f"gpu:{kind}{self.gpus}"}
        return {"gpus": f"{kind}{self.gpus * self.nodes}"}

    def _interpreter(self) -> str:
        environment = self.environment
        if environment.python is not None:
            return environment.python
        return "python" if environment.venv or environment.conda or environment.pixi else self.python


def worker_script(
    settings: SlurmSettings,
    *,
    name: str,
    log: str,
    python: str,
    argv: Sequence[str | Variable],
    gpus: int,
    time_limit_s: float | None,
    pass_env: Sequence[str] = (),
) -> JobScript:
    """The script of one array of workers. `gpus` is for each node; `argv` usually begins `-m proctor.worker`.

    Raises ConfigError if the cluster's nodes have fewer GPUs than that.
    """
    there = settings.gpus_per_node
    if there is not None and gpus > there:
        raise ConfigError(
            f"a job would need {gpus} GPUs on each node, but those of {settings.cluster!r} have {there}",
            hint="lower `gpus` or `replicas` of the server, set launch.nodes_per_server, or correct gpus_per_node "
            "of the profile (`proctor clusters show`)",
        )
    return JobScript(
        name=name,
        log=log,
        argv=tuple(argv),
        python=python,
        partition=settings.partition,
        account=settings.account,
        qos=settings.qos,
        nodes=settings.nodes,
        cpus=settings.cpus,
        memory=settings.memory,
        gpus=gpus,
        gpu_flag_style=settings.gpu_flag_style,
        gpu_type=settings.gpu_type,
        time_limit_s=time_limit_s,
        signal_lead_s=settings.signal_lead_s,
        requeue=settings.requeue in ("auto", "requeue"),
        sbatch=settings.sbatch,
        environment=settings.environment,
        env=_variables(settings),
        pass_env=(*settings.pass_env, *pass_env),
    )


def scoring_script(
    settings: SlurmSettings, job: ScoringJob, *, name: str, log: str, python: str, argv: Sequence[str | Variable]
) -> JobScript:
    """The script of the job that marks the answers: one node, no GPU, nothing to interrupt."""
    return JobScript(
        name=name,
        log=log,
        argv=tuple(argv),
        python=python,
        partition=job.partition,
        account=settings.account,
        qos=settings.qos,
        cpus=job.cpus,
        memory=job.memory,
        time_limit_s=job.time_limit_s,
        requeue=True,
        environment=settings.environment,
        env=_variables(settings),
        pass_env=settings.pass_env,
    )


def log_pattern(directory: str | os.PathLike[str], pattern: str) -> str:
    """A file in `directory` for #SBATCH --output: % in the directory's own name is no replacement symbol.

    `pattern` is a file name in Slurm's language, such as `%A_%a.log`. Raises ConfigError for a directory with a
    backslash, at which Slurm stops replacing.
    """
    if "\\" in os.fspath(directory):
        raise ConfigError(
            f"Slurm cannot write logs below {os.fspath(directory)!r}: the path has a backslash",
            hint="choose another `runs:`",
        )
    return os.fspath(directory).replace("%", "%%").rstrip("/") + "/" + pattern


def quoted(text: str) -> str:
    """One word of bash on one line that stands for `text` and nothing else, whatever it holds.

    Raises ConfigError for a NUL character, which no argument can carry.
    """
    if "\x00" in text:
        raise ConfigError(f"{text!r} contains a NUL character")
    if not _CONTROL.search(text):
        return shlex.quote(text)
    return "$'" + "".join(map(_escaped, text)) + "'"


def _escaped(ch: str) -> str:
    if ch in _ESCAPES:
        return _ESCAPES[ch]
    if _CONTROL.match(ch):
        return "".join(f"\\x{byte:02x}" for byte in ch.encode("utf-8", "surrogateescape"))
    return ch


def _variables(settings: SlurmSettings) -> dict[str, str]:
    return (dict.fromkeys(OFFLINE, "1") if settings.offline else {}) | dict(settings.env)


def _variable_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        raise ConfigError(f"{name!r} cannot be the name of an environment variable")
    return name


def _directive(name: str, value: Any) -> str:
    """`--name` or `--name=value`. sbatch splits these lines itself: double quotes, and a backslash before anything."""
    if value is True:
        return f"--{name}"
    text = str(value)
    if _CONTROL.search(text):
        raise ConfigError(f"--{name} cannot hold line breaks or control characters: {text!r}")
    if re.fullmatch(r"[\w@%+=:,./\[\]-]+", text):
        return f"--{name}={text}"
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'--{name}="{escaped}"'


def _activation(environment: SlurmEnvironment) -> list[str]:
    failed = f"|| exit {USAGE_ERROR}"
    lines: list[str] = []
    if environment.modules:
        # A shell that is no login shell may not know the command.
        lines.append("type module >/dev/null 2>&1 || . /etc/profile")
        lines.append(" ".join(["module load", *map(quoted, environment.modules), failed]))
    lines += environment.command
    if environment.venv is not None:
        lines.append(f". -- {quoted(environment.venv.rstrip('/') + '/bin/activate')} {failed}")
    if environment.conda is not None:
        if environment.conda_sh is not None:
            lines.append(f". -- {quoted(environment.conda_sh)} {failed}")
        else:
            lines.append(f'hook=$(conda shell.bash hook) && eval "$hook" {failed}')
        lines.append(f"conda activate {quoted(environment.conda)} {failed}")
    if environment.pixi is not None:
        words = ["pixi", "shell-hook", "--no-install", f"--manifest-path={environment.pixi}"]
        words += [f"--environment={environment.pixi_env}"] if environment.pixi_env else []
        lines.append(f'hook=$({" ".join(map(quoted, words))}) && eval "$hook" {failed}')
    return lines
