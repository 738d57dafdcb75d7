"""Runs one command and makes sure that nothing of it outlives the process that asked for it.

    python -I guard.py GRACE_SECONDS FDS -- ARGV...

Started by `processes.group`, as a file and in isolated mode: standard library only, so that it starts in
milliseconds and costs a few megabytes. Standard input is a pipe whose other end the asking process holds.
When that pipe closes (also after a kill -9) or SIGTERM arrives, the command's process group gets SIGTERM,
after GRACE_SECONDS SIGKILL, and then every remaining descendant SIGKILL: as a subreaper this process
inherits those that were orphaned, also when they left the group. SIGINT, SIGHUP, SIGUSR1 and SIGUSR2 are
passed on. If this process itself is killed, the kernel kills the command.

Exit status: the command's; 128 + n if signal n ended it; 127 if there is no such program, 126 if it cannot
be run.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_PASSED_ON = (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_SWEEP_S = 10.0
"""How long to go on killing what is left; longer only for processes stuck in the kernel."""


def main(argv: list[str]) -> int:
    grace_s, fds = float(argv[0]), [int(n) for n in argv[1].split(",") if n]
    command = argv[argv.index("--") + 1 :]
    wake, wakened = os.pipe()
    os.set_blocking(wake, False)
    os.set_blocking(wakened, False)
    signal.set_wakeup_fd(wakened, warn_on_full_buffer=False)
    for number in (*_PASSED_ON, signal.SIGTERM, signal.SIGCHLD):
        signal.signal(number, _wake_only)
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    try:
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, process_group=0, pass_fds=fds, preexec_fn=_die_with_guard
        )
    except OSError as error:
        sys.stderr.write(f"cannot run {command[0]!r}: {error.strerror}\n")
        return 127 if isinstance(error, FileNotFoundError) else 126
    for fd in fds:
        os.close(fd)
    status = _watch(child.pid, wake, grace_s)
    child.returncode = status
    _kill_group(child.pid, signal.SIGKILL)
    _sweep()
    return status


def _watch(child: int, wake: int, grace_s: float) -> int:
    parent, deadline, killed = os.getppid(), None, False
    inputs = [0, wake]
    while True:
        ready, _, _ = select.select(inputs, [], [], 0.1 if deadline else 1.0)
        numbers = _drain(wake) if wake in ready else b""
        gone = os.getppid() != parent
        if 0 in ready and not os.read(0, 4096):
            inputs, gone = [wake], True
        status = _reap(child)
        if status is not None:
            return status
        for number in _PASSED_ON:
            if number in numbers:
                _kill_group(child, number)
        if deadline is None and (gone or signal.SIGTERM in numbers):
            deadline = time.monotonic() + grace_s
            _kill_group(child, signal.SIGTERM)
        if deadline is not None and not killed and time.monotonic() >= deadline:
            killed = True
            _kill_group(child, signal.SIGKILL)


def _wake_only(_number: int, _frame: object) -> None:
    """The wake-up descriptor says which; the loop in `_watch` acts."""


def _drain(fd: int) -> bytes:
    try:
        return os.read(fd, 4096)
    except BlockingIOError:
        return b""


def _reap(child: int) -> int | None:
    """Collect every ended child, also inherited ones; return the command's status once it has ended."""
    ended: int | None = None
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return ended
        if pid == 0:
            return ended
        if pid == child:
            code = os.waitstatus_to_exitcode(status)
            ended = code if code >= 0 else 128 - code


def _reap_all() -> bool:
    """Collect every ended child; whether there is no child left, not even one to collect later."""
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
        return False
    return True


def _kill_group(group: int, number: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


def _sweep() -> None:
    deadline = time.monotonic() + _SWEEP_S
    while time.monotonic() < deadline:
        childless = _reap_all()
        left = _descendants(os.getpid())
        if childless and not left:
            return
        for pid in left:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)


def _descendants(root: int) -> list[int]:
    """Every live descendant, by /proc; none where there is no /proc."""
    parents: dict[int, int] = {}
    with suppress(FileNotFoundError):
        for name in os.listdir("/proc"):
            if not name.isdigit():
                continue
            with suppress(OSError), open(f"/proc/{name}/stat", "rb") as file:
                # The second field is the name in parentheses, and may itself hold spaces and parentheses.
                state, ppid = file.read().rpartition(b")")[2].split()[:2]
                if state != b"Z":
                    parents[int(name)] = int(ppid)
    found = {root}
    grown = True
    while grown:
        fresh = {pid for pid, ppid in parents.items() if ppid in found and pid not in found}
        found |= fresh
        grown = bool(fresh)
    return sorted(found - {root})


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def _die_with_guard() -> None:
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
