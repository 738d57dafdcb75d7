"""A host that stays: imports once, a fork for each job, gone when nobody asks it any more, however that comes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from proctor import errors
from proctor.processes.resident import Residents

HOST = """
import json, os, pathlib, random, sys, time
from proctor.processes.hosting import Host

pathlib.Path(os.environ["IMPORTED"]).open("a").write(f"{os.getpid()}\\n")
drawn = []

def answer(message):
    directory = pathlib.Path(message["directory"])
    job = json.loads((directory / "job.json").read_text())
    drawn.append(job["do"])
    if job["do"] == "die":
        print("last words", file=sys.stderr, flush=True)
        os.kill(os.getpid(), 9)
    if job["do"] == "kill the host":
        os.kill(os.getppid(), 9)
    if job["do"] == "report":
        report = {"class": "TaskError", "message": "task x is odd", "hint": "do y"}
        (directory / "error.json").write_text(json.dumps(report))
        return 1
    (directory / "pid").write_text(str(os.getpid()))
    time.sleep(job.get("sleep", 0))
    said = {"drawn": drawn, "nice": os.nice(0), "env": os.environ.get("EXTRA"), "host": os.getppid()}
    (directory / "result.json").write_text(json.dumps(said))
    return 0

sys.exit(Host.on(int(sys.argv[1]), answer).serve())
"""
PATIENCE_S = 30.0


class Office:
    """A host's module, and jobs for it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._jobs = 0
        (root / "childish_host.py").write_text(HOST)
        self.env = {"PYTHONPATH": str(root), "IMPORTED": str(root / "imported")}

    def residents(self) -> Residents:
        return Residents("childish_host", self.env)

    def job(self) -> Path:
        self._jobs += 1
        directory = self.root / f"job {self._jobs}"
        directory.mkdir()
        return directory

    def ask(self, residents: Residents, do: str, directory: Path | None = None, **more: Any) -> Any:
        env = {"EXTRA": do}
        return residents.run(None, "anything", directory or self.job(), {"do": do, **more}, env=env)

    @property
    def hosts(self) -> list[int]:
        return [int(line) for line in (self.root / "imported").read_text().split()]


@pytest.fixture
def office(tmp_path: Path) -> Office:
    return Office(tmp_path)


def eventually(true: Callable[[], bool]) -> None:
    until = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < until, "it did not happen"
        time.sleep(0.02)


def test_imports_happen_once_and_every_job_finds_the_state_after_them(office: Office) -> None:
    with office.residents() as residents:
        first, second = office.ask(residents, "a"), office.ask(residents, "b")
    assert (first["drawn"], second["drawn"]) == (["a"], ["b"])
    assert (first["env"], second["env"]) == ("a", "b")
    assert office.hosts == [first["host"]] == [second["host"]]


def test_a_polite_job_gives_way(office: Office) -> None:
    with office.residents() as residents:
        polite = residents.politely(None, "anything", office.job(), {"do": "a"})
        assert polite["nice"] > office.ask(residents, "b")["nice"]


def test_jobs_run_side_by_side(office: Office) -> None:
    with office.residents() as residents:
        slow = office.job()
        waiting = threading.Thread(target=office.ask, args=(residents, "a", slow), kwargs={"sleep": 2 * PATIENCE_S})
        waiting.start()
        eventually((slow / "pid").exists)
        assert office.ask(residents, "b")["drawn"] == ["b"]
        os.kill(int((slow / "pid").read_text()), signal.SIGKILL)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(threading, "excepthook", lambda _: None)
            waiting.join(PATIENCE_S)
    assert not waiting.is_alive()


def test_what_a_job_reports_is_raised_and_the_host_goes_on(office: Office) -> None:
    with office.residents() as residents:
        with pytest.raises(errors.TaskError, match="task x is odd"):
            office.ask(residents, "report")
        with pytest.raises(errors.HarnessError, match=r"(?s)status -9.*last words"):
            office.ask(residents, "die")
        assert office.ask(residents, "c")["host"] == office.hosts[0]


def test_a_host_that_dies_is_an_error_and_the_next_job_gets_another(office: Office) -> None:
    with office.residents() as residents:
        with pytest.raises(errors.HarnessError, match="ended before its job did"):
            office.ask(residents, "kill the host", sleep=PATIENCE_S)
        eventually(lambda: not residents.alive(None))
        assert office.ask(residents, "b")["host"] == office.hosts[1] != office.hosts[0]


def test_leaving_ends_the_host_and_what_it_does(office: Office) -> None:
    failures: list[Exception] = []

    def ask(directory: Path) -> None:
        try:
            office.ask(residents, "a", directory, sleep=2 * PATIENCE_S)
        except errors.HarnessError as error:
            failures.append(error)

    with office.residents() as residents:
        slow = office.job()
        waiting = threading.Thread(target=ask, args=(slow,))
        waiting.start()
        eventually((slow / "pid").exists)
        job = int((slow / "pid").read_text())
    waiting.join(PATIENCE_S)
    assert len(failures) == 1
    eventually(lambda: not psutil.pid_exists(job) and not psutil.pid_exists(office.hosts[0]))
    with pytest.raises(errors.HarnessError, match="the run has ended"):
        office.ask(residents, "b")


def test_a_killed_owner_leaves_nothing(office: Office) -> None:
    code = f"""
import pathlib
from proctor.processes.resident import Residents
with Residents("childish_host", {office.env!r}) as residents:
    residents.run(None, "anything", pathlib.Path({str(office.job())!r}), {{"do": "a", "sleep": 600}})
"""
    owner = subprocess.Popen([sys.executable, "-c", code])
    started = office.root / "job 1" / "pid"
    eventually(lambda: started.exists() and bool(started.read_text()))
    job = int(started.read_text())
    owner.kill()
    owner.wait()
    eventually(lambda: not psutil.pid_exists(job) and not psutil.pid_exists(office.hosts[0]))
