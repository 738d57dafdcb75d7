"""A command with everything that it starts: a log, a sign of life, and an end that can be proved."""

from __future__ import annotations

import asyncio
import os
import re
import secrets
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final, Self

import psutil

from proctor.errors import ProctorError

_GUARD: Final = Path(__file__).with_name("guard.py")
_MARK: Final = "PROCTOR_GROUPS"
"""Environment variable that every descendant inherits: ids of the groups it belongs to, outermost first."""
_AFTER_GRACE_S: Final = 15.0
"""What the guard may take for its own sweep before we kill everything ourselves."""

_FRAME: Final = re.compile(r'  (?P<file>File) ".*", line \d+')
"""A line of a traceback, after whatever a logger puts in front."""
_SEARCHED_LINES: Final = 500


class ProcessGroup:
    """One command, run under a guard in a session of its own, with stdout and stderr in one log file.

    It ends when `stop` is called, when the last reference to our end of the guard's pipe goes, or when this
    process dies, however it dies.
    """

    def __init__(self, process: asyncio.subprocess.Process, log: Path, mark: str, grace_s: float) -> None:
        self._process = process
        self._mark = mark
        self._grace_s = grace_s
        self.log: Final = log

    @classmethod
    async def start(
        cls,
        argv: Sequence[str],
        *,
        env: Mapping[str, str],
        log: Path,
        cwd: Path | None = None,
        grace_s: float = 20.0,
        pass_fds: Sequence[int] = (),
    ) -> Self:
        """Start `argv` with exactly `env`; append its output to `log`.

        A program that does not exist is no error here: the group ends at once with status 127 and says so
        in its log. Raises OSError if the log cannot be written or no process can be made.
        """
        mark = secrets.token_hex(8)
        marks = ":".join(filter(None, (env.get(_MARK, ""), mark)))
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-I", str(_GUARD), str(grace_s), ",".join(map(str, pass_fds)), "--", *argv),
                stdin=asyncio.subprocess.PIPE,
                stdout=output,
                stderr=output,
                cwd=cwd,
                env=dict(env) | {_MARK: marks},
                start_new_session=True,
                pass_fds=tuple(pass_fds),
            )
        return cls(process, log, mark, grace_s)

    @property
    def pid(self) -> int:
        """Of the guard, which is also the session's id."""
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """None while it runs; the command's exit status, 128 + n for signal n."""
        code = self._process.returncode
        return code if code is None or code >= 0 else 128 - code

    async def wait(self) -> int:
        """Wait for the end of the command and of everything it started."""
        await self._process.wait()
        code = self.returncode
        assert code is not None
        return code

    def signal(self, number: int) -> None:
        """Pass a signal to the command's process group; SIGTERM starts the end. Nothing happens if it has ended."""
        with suppress(ProcessLookupError):
            self._process.send_signal(number)

    def commands(self) -> list[psutil.Process]:
        """The live processes of the command, without the guard."""
        try:
            return psutil.Process(self.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    def cpu_seconds(self) -> float:
        """CPU time that the live processes have used so far."""
        total = 0.0
        for process in self.commands():
            with suppress(psutil.Error):
                times = process.cpu_times()
                total += times.user + times.system
        return total

    def listens_on(self, port: int) -> bool | None:
        """Whether one of its processes listens on the TCP port; None if the system does not tell."""
        try:
            return any(
                connection.laddr.port == port and connection.status == psutil.CONN_LISTEN
                for process in self.commands()
                for connection in process.net_connections("tcp")
            )
        except psutil.Error:
            return None

    async def stop(self) -> None:
        """End everything: SIGTERM, then after the grace period SIGKILL, then prove that nobody is left.

        Runs to its end even if the caller is cancelled meanwhile. Raises ProctorError with the pids if a
        process cannot be killed.
        """
        task = asyncio.create_task(self._stop())
        cancelled: asyncio.CancelledError | None = None
        while not task.done():
            try:
                await asyncio.shield(task)
            except asyncio.CancelledError as error:
                cancelled = error
        task.result()
        if cancelled is not None:
            raise cancelled

    async def _stop(self) -> None:
        if self._process.stdin is not None:
            self._process.stdin.close()
        with suppress(TimeoutError):
            await asyncio.wait_for(self._process.wait(), self._grace_s + _AFTER_GRACE_S)
        left = self._members()
        for process in left:
            with suppress(psutil.Error):
                process.kill()
        if left:
            _, left = await asyncio.to_thread(psutil.wait_procs, left, timeout=5.0)
            left = [process for process in left if _alive(process)]
        if left:
            raise ProctorError(
                f"processes {', '.join(str(process.pid) for process in left)} do not end, even by SIGKILL",
                hint=f"they hang in the kernel (a GPU or a file system); log: {self.log}",
            )
        await self._process.wait()

    def _members(self) -> list[psutil.Process]:
        """Every live process of the session, or that inherited the mark, wherever it has gone since."""
        found: list[psutil.Process] = []
        for process in psutil.process_iter():
            with suppress(psutil.Error, OSError):
                if os.getsid(process.pid) == self.pid or self._mark in process.environ().get(_MARK, ""):
                    if _alive(process):
                        found.append(process)
        return found


def _alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def tail(log: Path, lines: int = 15, limit: int = 65_536) -> str:
    """The last lines of a log, decoded leniently, without escape codes' carriage returns; "" if there is none."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - limit))
            text = file.read().decode("utf-8", errors="replace")
    except FileNotFoundError:
        return ""
    kept = [line.rsplit("\r", 1)[-1].rstrip() for line in text.replace("\r\n", "\n").split("\n")]
    return "\n".join([line for line in kept if line][-lines:])


def last_words(log: Path, lines: int = 15) -> str:
    """The last lines of a log that say what happened: without the frames of Python's tracebacks."""
    kept: list[str] = []
    column: int | None = None
    for line in tail(log, lines=_SEARCHED_LINES).split("\n"):
        frame = _FRAME.search(line)
        if frame is not None:
            column = frame.start("file")
        elif column is not None and not line[column - 2 : column + 2].strip():
            continue  # the frame's source, and what points into it
        elif "Traceback (most recent call last):" not in line:
            column = None
            kept.append(line)
    return "\n".join(kept[-lines:])
