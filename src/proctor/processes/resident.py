"""Processes of other interpreters that stay: what they import is paid once, and each job is a fork of them."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from proctor.errors import HarnessError
from proctor.interpreters import module_command
from proctor.processes.exchange import guarded, log_for, outcome, write_job
from proctor.processes.group import last_words

GOES_S: Final = 1.0
"""What a host gets to end by itself when nobody asks it any more; then its guard ends it."""


class Residents:
    """One host for each interpreter, started when it is first needed; a context manager that ends them all.

    A host is `<python> -m HOST DESCRIPTOR` that serves as `processes.hosting` does. It is gone when this context is
    left, when this process dies, however it dies, and when its guard does. Calls may come from several threads at once.
    """

    def __init__(self, host: str, env: Mapping[str, str]) -> None:
        """`env`: variables for the hosts, over our own."""
        self._host = host
        self._env = dict(env)
        self._hosts: dict[str | None, _Resident] = {}
        self._lock = threading.Lock()
        self._closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._closed = True
            hosts = list(self._hosts.values())
            self._hosts.clear()
        for host in hosts:
            host.close()

    def start(self, python: str | None) -> None:
        """Have the interpreter's host import what it needs, without waiting for it. Raises MissingTool."""
        self._of(python)

    def alive(self, python: str | None) -> bool:
        """Whether the interpreter has a host now."""
        with self._lock:
            return python in self._hosts and self._hosts[python].alive

    def run(
        self,
        python: str | None,
        module: str,
        directory: Path,
        job: Mapping[str, Any],
        *,
        env: Mapping[str, str] | None = None,
        partly: Callable[[Any], bool] = lambda _: False,
        nice: int = 0,
    ) -> Any:
        """As `exchange.run_module`, in a fork of the interpreter's host; also raises HarnessError when closed."""
        return self._of(python).run(module, directory, job, env=env, partly=partly, nice=nice)

    def politely(
        self,
        python: str | None,
        module: str,
        directory: Path,
        job: Mapping[str, Any],
        *,
        env: Mapping[str, str] | None = None,
        partly: Callable[[Any], bool] = lambda _: False,
    ) -> Any:
        """`run` that gives way to whatever else the machine does."""
        return self.run(python, module, directory, job, env=env, partly=partly, nice=10)

    def _of(self, python: str | None) -> _Resident:
        with self._lock:
            if self._closed:
                raise HarnessError("the run has ended: no harness is started any more")
            known = self._hosts.get(python)
            if known is not None and not known.alive:
                known.close()
                known = None
            if known is None:
                known = self._hosts[python] = _Resident(python, self._host, self._env)
            return known


class _Resident:
    def __init__(self, python: str | None, module: str, env: Mapping[str, str]) -> None:
        self._module = module
        self._log = log_for(module)
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            command = module_command(python, module, str(theirs.fileno()), env=env)
            self._process = guarded(command.argv, command.env, self._log, (theirs.fileno(),))

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def run(
        self,
        module: str,
        directory: Path,
        job: Mapping[str, Any],
        *,
        env: Mapping[str, str] | None,
        partly: Callable[[Any], bool],
        nice: int,
    ) -> Any:
        log = log_for(module)
        write_job(directory, job, log)
        message = {
            "module": module,
            "directory": str(directory),
            "log": str(log),
            "env": dict(env or {}),
            "nice": nice,
        }
        ours, theirs = socket.socketpair()
        with ours:
            try:
                with theirs:
                    socket.send_fds(self._control, [json.dumps(message).encode()], [theirs.fileno()])
                # If the host dies, the kernel closes its end of the socket: there is nothing to wait for in vain.
                said = ours.recv(64)
            except OSError:
                said = b""
        if not said:
            raise HarnessError(
                f"{self._module} has ended before its job did; its last lines:\n{last_words(self._log)}".rstrip(),
                hint=f"the log: {self._log}",
            )
        return outcome(module, directory, log, int(said), partly)

    def close(self) -> None:
        self._control.close()
        # Leaving the block closes the guard's pipe, which ends whatever is still there.
        with self._process as process, contextlib.suppress(subprocess.TimeoutExpired):
            if process.wait(GOES_S) == 0:
                self._log.unlink(missing_ok=True)
