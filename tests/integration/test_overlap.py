"""Workers and their servers come up while tasks are recorded, and whatever becomes of that, nothing is left of them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from pathlib import Path

import pytest

from proctor import api
from proctor.api.running import Outcome
from proctor.catalog.native import NativeSource
from proctor.catalog.source import Made
from proctor.config.spec import TaskSpec
from proctor.errors import TaskError

from .conftest import Lab, start_server
from .test_signals import left_behind

WORDS = [f"word{i:03d}" for i in range(12)]
PATIENCE_S = 120.0


def phases(lab: Lab) -> list[str]:
    """What the workers have said so far."""
    found: list[str] = []
    for file in (lab.root / "runs" / "run" / "events").glob("*.jsonl"):
        found += [json.loads(line)["phase"] for line in file.read_text().splitlines() if line.endswith("}")]
    return found


class SlowSource:
    """Records only when workers have begun; then as usual, or not at all."""

    def __init__(self, lab: Lab, monkeypatch: pytest.MonkeyPatch, *, fails: bool = False) -> None:
        self.calls = 0
        real = NativeSource.make

        def make(source: NativeSource, spec: TaskSpec) -> Made:
            self.calls += 1
            until, before = time.monotonic() + PATIENCE_S, lab.asked()
            while not phases(lab):
                assert time.monotonic() < until, "no worker has begun while the tasks are recorded"
                time.sleep(0.05)
            assert lab.asked() == before, "asked before there is a plan"
            if fails:
                raise TaskError("no such task")
            return real(source, spec)

        monkeypatch.setattr(NativeSource, "make", make)


def run(config: Path, **more: bool) -> Outcome:
    return asyncio.run(api.run(config, **more))


@pytest.mark.parametrize("running", [False, True], ids=["server", "endpoint"])
def test_workers_start_while_tasks_are_recorded(lab: Lab, monkeypatch: pytest.MonkeyPatch, running: bool) -> None:
    with start_server(lab) if running else contextlib.nullcontext() as url:
        there = {"models": {"m": {"path": url, "served_model": "default"}}, "engine": {"server": {"type": "endpoint"}}}
        config = lab.write_run(tasks=[lab.write_task("words", WORDS)], **(there if running else {}))
        source = SlowSource(lab, monkeypatch)
        outcome = run(config)
    assert source.calls == 1
    assert outcome.complete
    assert all(lab.asked()[lab.digest(w)] == 1 for w in WORDS)
    assert not left_behind(lab)


def test_what_the_plan_does_not_need_is_ended_without_a_word(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three workers for what one shard holds, and a second time nothing to do at all."""
    config = lab.write_run(tasks=[lab.write_task("words", WORDS[:2])], launch={"type": "local", "workers": 3})
    SlowSource(lab, monkeypatch)
    outcome = run(config)
    assert outcome.complete
    assert outcome.errors == ()
    before = lab.asked()
    again = run(config, fresh=True)
    assert again.complete
    assert again.errors == ()
    assert lab.asked() == before
    assert not left_behind(lab)


def test_a_recording_that_fails_ends_the_workers(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    config = lab.write_run(tasks=[lab.write_task("words", WORDS)])
    SlowSource(lab, monkeypatch, fails=True)
    with pytest.raises(TaskError, match="no such task"):
        run(config)
    assert not lab.asked()
    assert not left_behind(lab)


def test_models_that_owe_nothing_more_are_not_asked(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """A task file that changes is recorded beside the servers; what is answered already stays answered."""
    task = lab.write_task("words", WORDS[:4])
    config = lab.write_run(tasks=[task])
    assert run(config).complete
    lab.write_task("words", WORDS[:6])
    SlowSource(lab, monkeypatch)
    for file in (lab.root / "runs" / "run" / "events").iterdir():
        file.unlink()
    outcome = run(config)
    assert outcome.complete
    assert sorted(lab.asked()) == sorted(lab.digest(w) for w in WORDS[:6])
    assert set(lab.asked().values()) == {1}
    assert not left_behind(lab)


def test_a_run_that_has_nothing_to_record_begins_no_server_early(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    config = lab.write_run(tasks=[lab.write_task("words", WORDS)])
    assert run(config).complete
    for file in (lab.root / "runs" / "run" / "events").iterdir():
        file.unlink()
    assert run(config).complete
    assert phases(lab) == []
