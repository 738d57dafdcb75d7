"""Run one of our modules as a child to its end; job, result and error travel as files in one directory.

The child is `<python> -m MODULE DIRECTORY`. It reads `job.json` and what else the caller put there, and leaves
`result.json` (and what else it likes) or `error.json`: {"class": a name in proctor.errors, "message", "hint"}.
"""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, Protocol

from proctor import errors
from proctor.interpreters import cache_directory, module_command
from proctor.processes.group import last_words

_GUARD: Final = Path(__file__).with_name("guard.py")
_GRACE_S: Final = 5


class RunModule(Protocol):
    """How a job is handed to a module: `run_module`, or a process that stays (`processes.resident`)."""

    def __call__(
        self,
        python: str | None,
        module: str,
        directory: Path,
        job: Mapping[str, Any],
        *,
        env: Mapping[str, str] | None = None,
        partly: Callable[[Any], bool] = ...,
    ) -> Any: ...


def run_module(
    python: str | None,
    module: str,
    directory: Path,
    job: Mapping[str, Any],
    *,
    env: Mapping[str, str] | None = None,
    partly: Callable[[Any], bool] = lambda _: False,
) -> Any:
    """Hand `job` to `module` in `directory`; return its result. Its output goes to a log that is kept if it fails.

    `partly` says of a result whether part of the job failed: the log is kept then too, named by `log` in the job.

    Raises what the child reports, by class; HarnessError with the last log lines if it dies without a word;
    MissingTool if there is no such interpreter.
    """
    command = module_command(python, module, str(directory), env=env)
    log = log_for(module)
    write_job(directory, job, log)
    return outcome(module, directory, log, _run(command.argv, command.env, log), partly)


def log_for(module: str) -> Path:
    """Where a child of this module is to write; a new file each time, whose directory is there."""
    stamp = f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}-{secrets.token_hex(3)}"
    log = cache_directory() / "logs" / f"{module.removeprefix('proctor.')}-{stamp}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    return log


def write_job(directory: Path, job: Mapping[str, Any], log: Path) -> None:
    """Hand the job over, with the log's name."""
    (directory / "job.json").write_text(json.dumps({**job, "log": str(log)}), encoding="utf-8")


def outcome(module: str, directory: Path, log: Path, code: int, partly: Callable[[Any], bool]) -> Any:
    """What a child that ended with `code` left in `directory`: its result, or its error raised. See `run_module`."""
    problem = directory / "error.json"
    if problem.exists():
        raise _logged(error_of(json.loads(problem.read_text(encoding="utf-8"))), log)
    result = directory / "result.json"
    if code != 0 or not result.exists():
        raise errors.HarnessError(
            f"{module} ended with status {code} and no result; its last lines:\n{last_words(log)}",
            hint=f"the log: {log}",
        )
    value = json.loads(result.read_text(encoding="utf-8"))
    if not partly(value):
        log.unlink(missing_ok=True)
    return value


def _run(argv: tuple[str, ...], env: Mapping[str, str], log: Path) -> int:
    # Leaving this block, also by KeyboardInterrupt, closes the guard's pipe: it ends the child and is waited for.
    with guarded(argv, env, log) as process:
        return process.wait()


def guarded(
    argv: tuple[str, ...], env: Mapping[str, str], log: Path, fds: tuple[int, ...] = ()
) -> subprocess.Popen[bytes]:
    """Start a command under a guard that ends it when we end, however we do; it inherits `fds`."""
    with log.open("ab") as output:
        return subprocess.Popen(
            (sys.executable, "-I", str(_GUARD), str(_GRACE_S), ",".join(map(str, fds)), "--", *argv),
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            env=dict(env),
            start_new_session=True,
            pass_fds=fds,
        )


def error_of(report: Mapping[str, Any]) -> errors.ProctorError:
    """The error that a child reported: {class, message, hint}. A class that we do not know is a HarnessError."""
    kind = getattr(errors, str(report.get("class")), errors.HarnessError)
    return kind(str(report.get("message")), hint=report.get("hint"))


def _logged(error: errors.ProctorError, log: Path) -> errors.ProctorError:
    if isinstance(error, errors.HarnessError):
        return errors.HarnessError(f"{error.message}\n{last_words(log)}".rstrip(), hint=error.hint or f"the log: {log}")
    return error
