"""A worker that goes on to another model has its weights read meanwhile."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import yaml

from proctor.worker import shift as module
from proctor.worker.assignment import Assignment
from proctor.worker.attempt import Attempt
from proctor.worker.preread import Preread
from proctor.worker.shift import Shift

from ..api.conftest import Desk, Room


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    """Two models that owe two requests each."""
    room = Room(tmp_path)
    config = room.run([{"native": room.task("t", ["a", "b"])}], engine={"type": "fake", "latency_s": 0.05})
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "pytorch_model.bin").write_bytes(b"other weights")
    text = yaml.safe_load(config.read_text())
    text["models"]["n"] = {"path": str(tmp_path / "other")}
    config.write_text(yaml.safe_dump(text))
    desk = Desk.open(config)
    desk.context.write_configuration()
    desk.context.directory.write_plan({m.model: m.shards for m in desk.plan().models})
    for target in desk.targets:
        job = target.job(desk.context)
        job.write(desk.context.directory.jobs / f"{job.job_id}.json")
    return desk


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], Preread]]:
    """What was to be read, in order."""
    seen: list[tuple[list[str], Preread]] = []

    @asynccontextmanager
    async def fake(paths: Sequence[Path]) -> AsyncGenerator[Preread]:
        seen.append(([f"{p.parent.name}/{p.name}" for p in paths], Preread()))
        yield seen[-1][1]

    monkeypatch.setattr(module, "preread", fake)
    return seen


def shift(desk: Desk, *, swap: bool = True) -> Shift:
    assignment = Assignment(shape="s", jobs=("m.json", "n.json"), costs=(1.0, 1.0), swap=swap)
    return Shift(desk.context.directory, assignment, Attempt(index=0))


def test_the_next_one_is_read_while_one_is_asked(desk: Desk, read: list[tuple[list[str], Preread]]) -> None:
    assert asyncio.run(shift(desk).work())
    assert [sorted(paths) for paths, _ in read] in (
        [["other/pytorch_model.bin"], []],
        [["model/pytorch_model.bin"], []],  # the worker began with the other one
    )
    assert desk.plan().owed == 0


def test_a_worker_that_may_not_go_on_reads_nothing(desk: Desk, read: list[tuple[list[str], Preread]]) -> None:
    asyncio.run(shift(desk, swap=False).work())
    assert [paths for paths, _ in read] == [[]]


def test_a_worker_that_drains_stops_reading(desk: Desk, read: list[tuple[list[str], Preread]]) -> None:
    async def work() -> bool:
        task = asyncio.create_task(shift(desk).work())
        async with asyncio.timeout(60):
            while not read:
                await asyncio.sleep(0.005)
        os.kill(os.getpid(), signal.SIGTERM)
        return await task

    assert not asyncio.run(work())
    assert len(read) == 1 and read[0][1].stopped.is_set()
