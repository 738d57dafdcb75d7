"""Pieces of work, each in a fork of this process: lm-eval is imported once, and random state and caches are fresh."""

from __future__ import annotations

import contextlib
import os
import select
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from proctor.catalog.lm_eval.wire import read_error, write_error, write_json
from proctor.errors import HarnessError, ProctorError

Work = Callable[[Path], Any]
"""Given the job's directory, does something there and returns a JSON value."""


class Permits:
    """How many forks may be at work at once over all jobs of one host; without a host each job counts for itself."""

    def __init__(self) -> None:
        self._ends: tuple[int, int] | None = None

    def share(self, number: int) -> None:
        """From now on this process and its forks hold `number` permits together."""
        read, write = os.pipe()
        os.set_blocking(read, False)
        os.write(write, b"." * max(1, number))
        self._ends = read, write

    def leave(self) -> None:
        """This process counts as one that holds a permit: what it forks needs none."""
        self._ends = None

    def take(self, *, wait: bool) -> bool:
        """Whether there was one; with `wait`, there is in the end."""
        while self._ends is not None:
            with contextlib.suppress(BlockingIOError):
                return bool(os.read(self._ends[0], 1))
            if not wait:
                return False
            select.select([self._ends[0]], [], [])
        return True

    def give_back(self) -> None:
        """The inverse of `take`."""
        if self._ends is not None:
            os.write(self._ends[1], b".")


permits: Final = Permits()
"""Of this process."""


def in_processes(work: Mapping[str, Work], directory: Path, workers: int) -> dict[str, ProctorError]:
    """Run each piece of work in a process of its own; its value lands in NAME.json. Returns the errors, by name."""
    waiting = list(work.items())
    running: dict[int, str] = {}
    errors: dict[str, ProctorError] = {}
    while waiting or running:
        # Only who has nothing at work may wait for a permit: others would not see that theirs are free again.
        while waiting and len(running) < max(1, workers) and permits.take(wait=not running):
            name, run = waiting.pop(0)
            running[_start(run, directory, name)] = name
        pid, status = os.wait()
        name = running.pop(pid, None)
        if name is None:
            continue
        permits.give_back()
        if status == 0:
            continue
        report = directory / f"{name}.error"
        code = os.waitstatus_to_exitcode(status)
        errors[name] = read_error(report) if report.exists() else HarnessError(f"a child process ended with {code}")
    return errors


def raise_all(errors: Mapping[str, ProctorError]) -> None:
    """Raise the errors as one, of the first one's class; nothing if there are none."""
    found = list(dict.fromkeys((type(e), e.message, e.hint) for e in errors.values()))
    if found:
        kind, message, hint = found[0]
        others = [f"{m}\n  → {h}" if h else m for _, m, h in found[1:]]
        # The first hint stands last, where ProctorError prints it.
        raise kind("\n".join([*others, message]), hint=hint)


def _start(run: Work, directory: Path, name: str) -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        permits.leave()
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
