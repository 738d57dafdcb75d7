"""Which attempt lives, and how often the queue is asked about it."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from proctor.launch.slurm.attempts import Attempts
from proctor.launch.slurm.cluster import ClusterLimits
from proctor.launch.slurm.commands import Commands
from proctor.launch.slurm.scheduler import SlurmScheduler

from .conftest import Script, queue_line


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        self.now += 0.001
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def make(commands: Commands, clock: Clock) -> Callable[..., Attempts]:
    return lambda **more: Attempts(commands, clock=clock, min_gap_s=0.0, **more)


@pytest.mark.parametrize(
    ("line", "answer"),
    [
        (queue_line("7", "RUNNING", restarts=1), True),
        (queue_line("7", "COMPLETING", restarts=1), True),
        (queue_line("7", "SUSPENDED", restarts=1), True),
        (queue_line("7", "SIGNALING", restarts=1), True),
        (queue_line("7", "CONFIGURING", restarts=1), True),
        (queue_line("7", "COMPLETING", restarts=2), True),  # still being ended after its requeue
        (queue_line("7", "COMPLETING", restarts=3), False),
        (queue_line("7", "PENDING", restarts=2), False),
        (queue_line("7", "REQUEUE_HOLD", restarts=2), False),
        (queue_line("7", "SPECIAL_EXIT", restarts=2), False),
        (queue_line("7", "RUNNING", restarts=2), False),
        (queue_line("7", "PENDING", restarts=1), None),  # the controller has forgotten that it began
        (queue_line("7", "RUNNING", restarts=0), None),  # the controller has forgotten a requeue
        (queue_line("7", "COMPLETED", restarts=1), False),
        (queue_line("7", "NODE_FAIL", restarts=1), False),
        (queue_line("7", "TIMEOUT", restarts=1), False),
        (queue_line("8", "RUNNING"), False),
        ("", False),
    ],
)
def test_the_second_attempt_of_a_job(
    script: Script, make: Callable[..., Attempts], line: str, answer: bool | None
) -> None:
    script.say("squeue", line)
    assert make().is_live("7", "", 1) is answer


def test_tasks_of_an_array_are_apart_from_it_and_from_each_other(script: Script, make: Callable[..., Attempts]) -> None:
    # Slurm gives the array's own id to one of its tasks.
    script.say(
        "squeue",
        queue_line("21", "RUNNING", array="20", task="0")
        + queue_line("22", "FAILED", array="20", task="1")
        + queue_line("20", "RUNNING", array="20", task="2")
        + queue_line("23", "RUNNING"),
    )
    attempts = make()
    assert [attempts.is_live("20", task, 0) for task in ("0", "1", "2", "3", "")] == [True, False, True, False, False]
    assert [attempts.is_live(job, task, 0) for job, task in (("21", "0"), ("22", "1"))] == [True, False]
    assert script.count("squeue") == 1


def test_one_poll_answers_until_it_is_old(script: Script, make: Callable[..., Attempts], clock: Clock) -> None:
    script.say("squeue", queue_line("7", "RUNNING") + queue_line("8", "COMPLETED") + queue_line("9", "RUNNING"))
    attempts = make(max_age_s=5.0)
    for _ in range(100):
        assert attempts.is_live("7", "", 0) is True
        assert attempts.is_live("8", "", 0) is False
        assert attempts.is_live("5", "", 0) is False
    assert script.count("squeue", "--me") == script.count("squeue", "-j") == 1
    clock.now += 5.0
    assert attempts.is_live("7", "", 0) is True
    assert attempts.is_live("5", "", 0) is False
    assert (script.count("squeue", "--me"), script.count("squeue", "-j")) == (2, 1)


def test_threads_share_the_poll(script: Script, make: Callable[..., Attempts]) -> None:
    script.say("squeue", queue_line("7", "RUNNING"))
    attempts = make(max_age_s=60.0)
    threads = [threading.Thread(target=attempts.is_live, args=("7", "", 0)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert script.count("squeue") == 1


def test_what_may_have_begun_after_the_poll_is_not_dead(script: Script, make: Callable[..., Attempts]) -> None:
    before = queue_line("7", "RUNNING") + queue_line("9", "PENDING", array="9", task="0")
    script.say("squeue", before)
    script.say("squeue", before.replace("PENDING", "RUNNING") + queue_line("10", "RUNNING"))
    attempts = make()
    assert attempts.is_live("7", "", 0) is True
    assert attempts.is_live("9", "0", 0) is True, "it waited at the first poll"
    assert script.count("squeue") == 2


def test_a_job_newer_than_the_poll_is_not_dead(script: Script, make: Callable[..., Attempts]) -> None:
    script.say("squeue", queue_line("7", "RUNNING"))
    script.say("squeue", queue_line("7", "RUNNING") + queue_line("8", "RUNNING"))
    attempts = make()
    assert attempts.is_live("7", "", 0) is True
    assert attempts.is_live("8", "", 0, mine=True) is True


def test_an_unreadable_queue_says_nothing_not_even_what_it_said_before(
    script: Script, make: Callable[..., Attempts], clock: Clock
) -> None:
    script.say("squeue", queue_line("7", "RUNNING"))
    script.say("squeue", err="slurm_load_jobs error: Unable to contact slurm controller\n", status=1)
    script.say("squeue", queue_line("7", "PENDING", restarts=1))
    attempts = make(max_age_s=5.0)
    assert attempts.is_live("7", "", 0) is True
    clock.now += 6
    assert attempts.is_live("7", "", 0) is None
    assert "does not answer" in str(attempts.failure)
    assert attempts.is_live("7", "", 0) is False
    assert attempts.failure is None


def test_a_failed_poll_is_not_repeated_at_once(script: Script, commands: Commands, clock: Clock) -> None:
    script.say("squeue", err="slurm_load_jobs error: Socket timed out on send/recv operation\n", status=1)
    attempts = Attempts(commands, clock=clock, min_gap_s=10.0)
    assert [attempts.is_live(str(job), "", 0) for job in range(50)] == [None] * 50
    assert script.count("squeue") == 1


def test_a_state_of_a_later_slurm_is_no_proof_of_death(script: Script, make: Callable[..., Attempts]) -> None:
    script.say("squeue", queue_line("7", "HIBERNATING"))
    assert make().is_live("7", "", 0) is None


def test_what_is_not_mine_is_asked_for_by_its_id(script: Script, make: Callable[..., Attempts], clock: Clock) -> None:
    script.say("squeue", queue_line("7", "RUNNING"))
    script.others["3"] = queue_line("4", "RUNNING", array="3", task="1")
    attempts = make(max_age_s=5.0)
    assert [attempts.is_live("3", "1", 0) for _ in range(9)] == [True] * 9
    assert script.count("squeue", "-j") == 1
    script.others["3"] = queue_line("4", "PENDING", array="3", task="1", restarts=1)
    clock.now += 5
    assert attempts.is_live("3", "1", 0) is False
    assert attempts.is_live("3", "1", 0, mine=True) is False
    del script.others["3"]
    clock.now += 5
    assert attempts.is_live("3", "1", 0) is False


def test_where_others_jobs_are_hidden_absence_means_nothing_unless_sacct_knows_it(
    script: Script, make: Callable[..., Attempts]
) -> None:
    script.say("squeue", queue_line("7", "RUNNING"))
    attempts = make(hides_jobs=True)
    assert attempts.is_live("3", "", 0) is None
    assert attempts.is_live("3", "", 0, mine=False) is None
    assert attempts.is_live("3", "", 0, mine=True) is False
    line = "3|3|{}|0:0|2026-11-21T10:40:35|Unknown|Unknown|n1|user|a|q|main|wrap\n"
    script.say("sacct", line.format("RUNNING"))
    script.say("sacct", line.format("NODE_FAIL"))
    assert attempts.is_live("3", "", 0) is None, "sacct lags behind, or the queue does"
    assert attempts.is_live("3", "", 0) is False


def test_ones_own_jobs_are_known_to_be_gone_where_others_are_hidden(script: Script, commands: Commands) -> None:
    """Without accounting too: whose a job is stands in its claim."""
    script.say("squeue", queue_line("7", "RUNNING"))
    limits = ClusterLimits(
        cluster="c",
        version="",
        max_array=1,
        max_jobs=0,
        keeps_s=0,
        hides_jobs=True,
        requeues=True,
        enforces_partitions=False,
    )
    scheduler = SlurmScheduler(commands, limits, user="ada")
    assert scheduler.is_live("7", "", 0, "ada") is True
    assert scheduler.is_live("3", "", 0, "ada") is False
    assert scheduler.is_live("3", "", 0, "bob") is None
    assert scheduler.is_live("3", "", 0) is None
