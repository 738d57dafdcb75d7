"""Pieces of work, each in a fork of this process: lm-eval is imported once, and random state and caches are fresh."""

from __future__ import annotations

import contextlib
import fcntl
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, Final

from proctor.catalog.lm_eval.wire import read_error, write_error, write_json
from proctor.errors import HarnessError, ProctorError, together

Work = Callable[[Path], Any]
"""Given the job's directory, does something there and returns a JSON value."""
_LOOK_S: Final = 0.02
"""Between two tries to get a permit."""


class Permits:
    """How many forks may be at work at once over all jobs of one host; without a host each job counts for itself.

    A permit is a lock on a byte of a file, which belongs to a process: however that ends, the kernel takes it back.
    """

    def __init__(self) -> None:
        self._file: IO[bytes] | None = None
        self._held: IO[bytes] | None = None
        self._number = 0

    def share(self, number: int) -> None:
        """From now on the forks of this process, and of these, have `number` permits together."""
        self._file = tempfile.TemporaryFile()
        self._number = max(1, number)

    def take(self) -> None:
        """Wait for a permit, for the rest of this process; what it forks needs none."""
        file, self._file = self._file, None
        while file is not None:
            for place in range(self._number):
                with contextlib.suppress(BlockingIOError, PermissionError):
                    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, place)
                    self._held = file
                    return
            time.sleep(_LOOK_S)


permits: Final = Permits()
"""Of this process."""


def in_processes(work: Mapping[str, Work], directory: Path, workers: int) -> dict[str, ProctorError]:
    """Run each piece of work in a process of its own; its value lands in NAME.json. Returns the errors, by name."""
    waiting = list(work.items())
    running: dict[int, str] = {}
    errors: dict[str, ProctorError] = {}
    while waiting or running:
        while waiting and len(running) < max(1, workers):
            name, run = waiting.pop(0)
            running[_start(run, directory, name)] = name
        pid, status = os.wait()
        name = running.pop(pid, None)
        if name is None or status == 0:
            continue
        report = directory / f"{name}.error"
        code = os.waitstatus_to_exitcode(status)
        errors[name] = read_error(report) if report.exists() else HarnessError(f"a child process ended with {code}")
    return errors


def raise_all(errors: Mapping[str, ProctorError]) -> None:
    """Raise the errors as one, of the first one's class; nothing if there are none."""
    if errors:
        raise together(errors.values())


def _start(run: Work, directory: Path, name: str) -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        permits.take()
        os._exit(_in_fork(run, directory, name))
    return pid


def _in_fork(run: Work, directory: Path, name: str) -> int:
    try:
        write_json(directory / f"{name}.json", run(directory))
    except Exception as error:  # noqa: BLE001  the boundary of the process: reported, and raised again by the parent
        write_error(directory / f"{name}.error", error)
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0
