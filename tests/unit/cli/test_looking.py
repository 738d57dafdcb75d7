"""`status` and `logs` as they are typed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from proctor import api
from proctor.cli import run, status
from proctor.report.views import RunStatus, TaskStatus

from ..api.conftest import Desk, Room


@pytest.fixture
def config(tmp_path: Path) -> str:
    """A run that is recorded and owes everything."""
    room = Room(tmp_path)
    desk = Desk.open(room.run([{"native": room.task("t", ["a", "b"])}]))
    desk.context.write_configuration()
    return str(desk.context.config)


def interrupted(*_: Any) -> None:
    raise KeyboardInterrupt


def run_status(*, owed: int, unread: str | None = None) -> RunStatus:
    return RunStatus(
        run="r", tasks=(TaskStatus(model="m", task="t", requests=1, answered=1 - owed),), queue_unread=unread
    )


def looks(monkeypatch: pytest.MonkeyPatch, *found: RunStatus) -> Iterator[RunStatus]:
    """What `status` sees, look by look, without a pause between two."""
    left = iter(found)
    monkeypatch.setattr(api, "status", lambda *_: next(left), raising=False)
    monkeypatch.setattr(status.time, "sleep", lambda _: None)
    return left


def test_ctrl_c_ends_a_watch(config: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(status.time, "sleep", interrupted)
    assert run(["status", config, "--watch"]) == 0
    printed = capsys.readouterr()
    assert "0 of 2 requests answered, 0 failed, 2 owed" in printed.out
    assert printed.err == "\n"


def test_ctrl_c_stops_a_single_look(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "status", interrupted, raising=False)
    assert run(["status", "run.yaml"]) == 130


def test_a_watch_ends_when_nothing_is_owed(monkeypatch: pytest.MonkeyPatch) -> None:
    left = looks(monkeypatch, run_status(owed=1), run_status(owed=1), run_status(owed=0), run_status(owed=0))
    assert run(["status", "run.yaml", "--watch"]) == 0
    assert len(list(left)) == 1


def test_a_watch_outlives_a_queue_that_cannot_be_read(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    looks(monkeypatch, run_status(owed=0, unread="no controller"), run_status(owed=0))
    assert run(["status", "run.yaml", "--watch"]) == 0
    assert capsys.readouterr().err == "error: no controller\n"
    looks(monkeypatch, run_status(owed=0, unread="no controller"))
    assert run(["status", "run.yaml"]) == 1


def test_tables_stand_apart(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    events = Path(config).parent / "runs" / "r" / "events"
    events.mkdir(exist_ok=True)
    (events / "w.jsonl").write_text('{"worker": "w", "model": "m", "phase": "starting", "time": 1.0}\n')
    assert run(["status", config, "--detailed"]) == 0
    printed = capsys.readouterr().out
    assert "\n\nstart-up\nmodel  starts" in printed and "\n\nworkers\nworker" in printed


def test_logs_that_hold_nothing_say_so(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["logs", config]) == 0
    assert capsys.readouterr().out == "no logs: nothing has run yet\n"
    logs = Path(config).parent / "runs" / "r" / "logs"
    logs.mkdir(exist_ok=True)
    (logs / "m-0.log").touch()
    assert run(["logs", config]) == 0
    assert capsys.readouterr().out == "all of 1 log(s) are empty\n"
    assert run(["logs", config, "m"]) == 0
    assert capsys.readouterr().out.endswith("m-0.log <==\n(nothing was written)\n")
    (logs / "m-0.log").write_text("out of tea\n")
    assert run(["logs", config, "m"]) == 0
    assert capsys.readouterr().out.endswith("m-0.log <==\nout of tea\n")


def test_failed_samples_of_a_name_that_has_none(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["logs", config, "--failed"]) == 0
    assert run(["logs", config, "x", "--failed"]) == 0
    assert capsys.readouterr().out == (
        "no sample failed for good\nno sample of a model or task called 'x' failed for good\n"
    )
