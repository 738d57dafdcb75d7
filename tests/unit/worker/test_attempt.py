"""The clock of an attempt, and what goes on after it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from proctor.errors import LaunchError
from proctor.worker.assignment import Assignment, SlurmTerms
from proctor.worker.attempt import (
    Attempt,
    AttemptRecord,
    Continuation,
    Ending,
    carry_on,
    drain_at,
    earlier_attempts,
    read_attempts,
    stop_at,
)

TERMS = SlurmTerms(script="#!/bin/sh\n", scoring="run-score", prefix="run-")
ASSIGNMENT = Assignment(shape="s", jobs=("m.json",), costs=(1.0,), slurm=TERMS)


@dataclass
class Controller:
    """A scheduler that says what it was asked, and refuses what it is told to."""

    refuses: frozenset[str] = frozenset()
    calls: list[tuple[str, ...]] = field(default_factory=list[tuple[str, ...]])
    cluster: str = "c"

    def is_live(self, job: str, array_task: str, restart: int, user: str = "") -> bool | None:
        return None

    async def ends_at(self, job: str, array_task: str) -> float | None:
        return None

    async def requeue(self, job: str, array_task: str) -> None:
        self._note("requeue", job, array_task)

    async def submit_successor(self, script: str, *, array_task: str) -> str:
        self._note("successor", script, array_task)
        return "78"

    async def wait_for_all(self, name: str, prefix: str) -> None:
        self._note("wait", name, prefix)

    def _note(self, what: str, *words: str) -> None:
        self.calls.append((what, *words))
        if what in self.refuses:
            raise LaunchError(f"no {what} here")


async def after(
    terms: SlurmTerms, *refuses: str, answered: int = 5, earlier: int = 0
) -> tuple[Continuation, list[tuple[str, ...]]]:
    controller = Controller(refuses=frozenset(refuses))
    attempt = Attempt(index=0, scheduler=controller, job="77", array_task="3")
    done = await carry_on(attempt, replace(ASSIGNMENT, slurm=terms), answered=answered, earlier=earlier)
    return done, controller.calls


async def test_an_attempt_goes_on_by_requeue_or_else_by_a_successor_for_which_marking_waits() -> None:
    successor = [("successor", TERMS.script, "3"), ("wait", "run-score", "run-")]
    done, calls = await after(replace(TERMS, requeue="auto"))
    assert (done.ending, calls) == (Ending.REQUEUED, [("requeue", "77", "3")])
    done, calls = await after(replace(TERMS, requeue="auto"), "requeue")
    assert (done.ending, done.successor, calls) == (Ending.SUCCEEDED_BY, "78", [("requeue", "77", "3"), *successor])
    done, calls = await after(replace(TERMS, requeue="successor"))
    assert (done.ending, calls) == (Ending.SUCCEEDED_BY, successor)
    done, calls = await after(replace(TERMS, requeue="successor", scoring=""))
    assert (done.ending, calls) == (Ending.SUCCEEDED_BY, successor[:1])


async def test_marking_that_does_not_wait_is_said() -> None:
    done, _ = await after(replace(TERMS, requeue="successor"), "wait")
    assert done.ending is Ending.SUCCEEDED_BY
    assert "`proctor score`" in done.message


@pytest.mark.parametrize(
    ("terms", "refuses", "answered", "earlier", "ending"),
    [
        (replace(TERMS, requeue="never"), (), 5, 0, Ending.NOT_REQUEUED),
        (replace(TERMS, requeue="never"), (), 0, 0, Ending.NO_PROGRESS),
        (replace(TERMS, requeue="auto"), (), 0, 3, Ending.NO_PROGRESS),
        (replace(TERMS, max_attempts=1), (), 5, 0, Ending.ATTEMPTS_SPENT),
        (replace(TERMS, max_attempts=3), (), 5, 2, Ending.ATTEMPTS_SPENT),
        (replace(TERMS, max_attempts=3), (), 5, 1, Ending.REQUEUED),
        (replace(TERMS, requeue="requeue"), ("requeue",), 5, 0, Ending.RESUBMISSION_FAILED),
        (replace(TERMS, requeue="successor"), ("successor",), 5, 0, Ending.RESUBMISSION_FAILED),
        (replace(TERMS, requeue="auto"), ("requeue", "successor"), 5, 0, Ending.RESUBMISSION_FAILED),
    ],
)
async def test_a_chain_ends_with_its_reason(
    terms: SlurmTerms, refuses: tuple[str, ...], answered: int, earlier: int, ending: Ending
) -> None:
    done, calls = await after(terms, *refuses, answered=answered, earlier=earlier)
    assert done.ending is ending
    assert bool(done.hint) == (ending is not Ending.REQUEUED)
    if ending in (Ending.NOT_REQUEUED, Ending.NO_PROGRESS, Ending.ATTEMPTS_SPENT):
        assert calls == []


def record(job: str, restart: int, ending: Ending, *, successor: str = "", task: str = "3") -> AttemptRecord:
    return AttemptRecord(
        worker=f"s-{job}_{task}.{restart}",
        job=job,
        array_task=task,
        restart=restart,
        host="n1",
        started=float(restart),
        ended=restart + int(job),
        ending=ending,
        answered=1,
        failed=0,
        models=("m",),
        successor=successor,
    )


def test_earlier_attempts_are_counted_through_requeues_and_successors(tmp_path: Path) -> None:
    chain = [
        record("10", 0, Ending.REQUEUED),
        record("10", 1, Ending.MANUAL_CANCELLATION),
        record("10", 2, Ending.SUCCEEDED_BY, successor="20"),
        record("20", 0, Ending.REQUEUED),
        record("10", 0, Ending.REQUEUED, task="4"),
    ]
    for one in chain:
        one.write(tmp_path)
    (tmp_path / "half.json").write_text('{"worker": ')
    found = read_attempts(tmp_path)
    assert len(found) == len(chain)
    assert earlier_attempts(found, "20", "3") == 3, "the preempted one was not out of time"
    assert earlier_attempts(found, "10", "3") == 1
    assert earlier_attempts(found, "30", "3") == 0


@pytest.mark.parametrize("lead", [30.0, 120.0, 900.0])
@pytest.mark.parametrize("slowest", [0.0, 5.0, 60.0, 10_000.0])
def test_draining_begins_in_time_for_the_slowest_and_ends_before_the_limit(lead: float, slowest: float) -> None:
    drain, stop = drain_at(0.0, lead_s=lead, slowest_s=slowest), stop_at(0.0, lead_s=lead)
    assert drain <= stop - 10 < -20 + 1
    assert stop - drain >= min(1.5 * slowest, 1.5 * lead)
    assert drain >= -2 * lead, "an attempt of a few leads still does something"


def test_a_forgotten_copy_of_this_very_attempt_holds_nothing() -> None:
    """A controller that was killed starts a job again under the number that it had before."""

    class Sure(Controller):
        def is_live(self, job: str, array_task: str, restart: int, user: str = "") -> bool | None:
            return True

    attempt = Attempt(index=0, scheduler=Sure(), job="77", array_task="3", restart=1)
    mine, alive = attempt.owner("run"), attempt.alive()
    elsewhere = replace(mine, host="n9", machine="m9", boot="b9", pid=1)
    assert alive(mine) is True
    assert alive(elsewhere) is False
    assert [alive(replace(elsewhere, restart=2)), alive(replace(elsewhere, array_task="4"))] == [True, True]
    assert Attempt(index=0).alive()(replace(elsewhere, cluster="", job="", array_task="", restart=0)) is None
