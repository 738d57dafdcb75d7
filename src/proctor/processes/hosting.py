"""The child's end of `processes.resident`: messages in, a fork for each, exit codes out. Standard library only.

A message is {module, directory, log, env, nice}, a packet on the control socket, with one more socket on which the exit
code of the job is sent back; what the job says stands in its directory, as `processes.exchange` describes. A job whose
socket closes early is killed, all jobs are when the control socket closes.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import sys
from collections.abc import Callable, Mapping
from typing import Any, Final

_MESSAGE: Final = 1 << 16
"""Bytes: paths and a few variables."""


class Host:
    """The loop: messages in, exit codes out."""

    def __init__(self, control: socket.socket, run: Callable[[Mapping[str, Any]], int]) -> None:
        """`run(message)` does one job, in a process of its own, and returns its exit code."""
        self._control = control
        self._run = run
        self._jobs: dict[int, socket.socket] = {}
        self._wake, self._wakened = os.pipe()
        for fd in (self._wake, self._wakened):
            os.set_blocking(fd, False)
        signal.set_wakeup_fd(self._wakened, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, _wake_only)

    @classmethod
    def on(cls, control: int, run: Callable[[Mapping[str, Any]], int]) -> Host:
        """With the descriptor that `processes.resident` passed on."""
        return cls(socket.socket(fileno=control), run)

    def serve(self) -> None:
        """Until CONTROL closes."""
        while True:
            clients = {client: pid for pid, client in self._jobs.items()}
            ready, _, _ = select.select([self._control, self._wake, *clients], [], [])
            with contextlib.suppress(BlockingIOError):
                os.read(self._wake, 4096)
            self._reap()
            for client in ready:
                if client in clients and clients[client] in self._jobs:
                    _kill(clients[client])  # nobody waits for it
            if self._control in ready and not self._accept():
                break
        for pid in self._jobs:
            _kill(pid)

    def _accept(self) -> bool:
        data, fds, _, _ = socket.recv_fds(self._control, _MESSAGE, 1)
        if not data:
            return False
        client = socket.socket(fileno=fds[0])
        request = json.loads(data)
        pid = os.fork()
        if pid == 0:
            os._exit(self._job(request, client))
        self._jobs[pid] = client
        return True

    def _reap(self) -> None:
        while self._jobs:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            client = self._jobs.pop(pid, None)
            if client is not None:
                with client, contextlib.suppress(OSError):
                    client.send(str(os.waitstatus_to_exitcode(status)).encode())

    def _job(self, request: Mapping[str, Any], client: socket.socket) -> int:
        code = 1
        try:
            os.setpgid(0, 0)
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            self._control.close()
            for other in (client, *self._jobs.values()):
                other.close()
            log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            os.nice(int(request["nice"]))
            os.environ.update(request["env"])
            code = self._run(request)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
        return code


def _wake_only(_number: int, _frame: object) -> None:
    """The wake-up descriptor says that a child has ended; the loop looks which."""


def _kill(pid: int) -> None:
    # The group is there once the job has made it; before that, the job alone is all there is.
    for kill in (os.killpg, os.kill):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            kill(pid, signal.SIGKILL)
