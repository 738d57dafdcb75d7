"""Slurm's own words, recorded from version 22.05.8, and a runner that says them."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest

from proctor.launch.slurm.commands import Commands, Output

DATA = Path(__file__).parent / "data"
Answer = Output | Callable[[Sequence[str]], Output]


class Script:
    """Answers each program's calls in order; the last answer is repeated. A program without one does not exist."""

    def __init__(self) -> None:
        self.answers: dict[str, list[Answer]] = {}
        self.calls: list[tuple[str, ...]] = []
        self.texts: list[str] = []
        self.environments: list[Mapping[str, str]] = []
        self.others: dict[str, str] = {}
        """What `squeue -j` prints of jobs that are not this user's."""

    def say(self, program: str, out: str = "", *, err: str = "", status: int = 0) -> None:
        self.answers.setdefault(program, []).append(Output(status=status, out=out, err=err))

    def recorded(self, program: str, name: str) -> None:
        self.say(program, (DATA / name).read_text())

    def hang(self, program: str) -> None:
        def never(argv: Sequence[str]) -> Output:
            raise subprocess.TimeoutExpired(list(argv), 60)

        self.answers.setdefault(program, []).append(never)

    def count(self, program: str, *words: str) -> int:
        return sum(call[0] == program and set(words) <= set(call) for call in self.calls)

    def __call__(self, argv: Sequence[str], environment: Mapping[str, str], text: str, timeout_s: float) -> Output:
        self.calls.append(tuple(argv))
        self.texts.append(text)
        self.environments.append(environment)
        if argv[0] == "squeue" and "-j" in argv:
            found = self.others.get(argv[argv.index("-j") + 1])
            unknown = Output(status=1, out="", err="slurm_load_jobs error: Invalid job id specified\n")
            return unknown if found is None else Output(status=0, out=found, err="")
        waiting = self.answers.get(argv[0])
        if not waiting:
            raise FileNotFoundError(argv[0])
        answer = waiting.pop(0) if len(waiting) > 1 else waiting[0]
        return answer if isinstance(answer, Output) else answer(argv)


@pytest.fixture
def script() -> Script:
    return Script()


@pytest.fixture
def commands(script: Script) -> Commands:
    return Commands(runner=script, environ={"PATH": "/usr/bin", "SLURM_CONF": "/etc/slurm.conf"})


def queue_line(job: str, state: str, *, array: str = "", task: str = "N/A", restarts: int = 0, code: int = 0) -> str:
    """One line as squeue prints it."""
    values = [job, array or job, task, state, str(restarts), str(code), *["N/A"] * 3, "n1", "user", *["(null)"] * 2]
    return "|".join([*values, "main", "None", "name"]) + "|\n"
