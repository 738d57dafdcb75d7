"""A worker that was started before its plan was made waits for the word of the command that started it."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from proctor.worker import shift as shifts
from proctor.worker.assignment import Assignment
from proctor.worker.attempt import Attempt
from proctor.worker.run_directory import NOTHING_OWED, PLANNED, RunDirectory
from proctor.worker.shift import Shift

TERMS = Assignment(shape="s", jobs=(), costs=())


def waiting(directory: RunDirectory, token: str) -> asyncio.Task[bool]:
    shift = Shift(directory, TERMS, Attempt(index=0), plan_token=token)
    return asyncio.create_task(shift._planned())  # pyright: ignore[reportPrivateUsage]


async def test_two_commands_on_one_run_do_not_take_each_others_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shifts, "PLAN_POLL_S", 0.01)
    directory = RunDirectory(tmp_path)
    first, second = waiting(directory, "aa"), waiting(directory, "bb")
    await asyncio.sleep(0.05)
    assert not first.done()
    directory.write(directory.plan_token("aa"), PLANNED)
    directory.write(directory.plan_token("bb"), NOTHING_OWED)
    assert [await first, await second] == [True, False]
