"""Commands: what they may see, and what becomes of their failures."""

from __future__ import annotations

import asyncio

import pytest

from proctor.errors import LaunchError, LimitReached, MissingTool, ProctorError, UnknownName, Unreachable
from proctor.launch.slurm.commands import Commands, outside, run_program
from proctor.launch.slurm.queue import read_accounting, read_job, read_queue
from proctor.launch.slurm.refusals import limit_in, refusal
from proctor.launch.slurm.scheduler import SlurmScheduler

from .conftest import Script

# What Slurm 22.05.8 really printed.
NO_PARTITION = (
    "sbatch: error: invalid partition specified: nope\n"
    "sbatch: error: Batch job submission failed: Invalid partition name specified\n"
)
NO_ACCOUNT = "sbatch: error: Batch job submission failed: Invalid account or account/partition combination specified\n"
NO_NODE = "sbatch: error: Batch job submission failed: Requested node configuration is not available\n"
POLICY = (
    "sbatch: error: Batch job submission failed: Job violates accounting/QOS policy "
    "(job submit limit, user's size and/or time limits)\n"
)
DOWN = "slurm_load_jobs error: Unable to contact slurm controller (connect failure)\n"


def test_nothing_of_a_surrounding_job_reaches_a_command() -> None:
    environ = {
        "PATH": "/bin",
        "SLURM_CONF": "/etc/slurm.conf",
        "SLURM_JOB_ID": "1",
        "SLURM_MEM_PER_CPU": "100",
        "SBATCH_PARTITION": "gpu",
        "SQUEUE_FORMAT": "%i",
        "PMIX_RANK": "0",
        "CUDA_VISIBLE_DEVICES": "0",
        "SLURMISH": "kept",
    }
    assert set(outside(environ)) == {"PATH", "SLURM_CONF", "CUDA_VISIBLE_DEVICES", "SLURMISH"}


def test_questions_are_answered_in_utc_and_whole(script: Script, commands: Commands) -> None:
    script.say("squeue")
    assert read_queue(commands) == []
    assert script.environments[0]["TZ"] == "UTC"
    assert script.environments[0]["SLURM_BITSTR_LEN"] == "0"
    assert script.environments[0]["SLURM_CONF"] == "/etc/slurm.conf"


async def test_a_submission_keeps_the_users_time_zone(script: Script, commands: Commands) -> None:
    script.say("sbatch", "1\n")
    await commands.call("sbatch", env={"SECRET": "s"})
    assert "TZ" not in script.environments[0]
    assert script.environments[0]["SECRET"] == "s"


@pytest.mark.parametrize("words", [DOWN, "slurm_load_jobs error: Connection reset by peer\n"])
def test_unknown_is_not_empty(script: Script, commands: Commands, words: str) -> None:
    script.say("squeue", err=words, status=1)
    with pytest.raises(Unreachable, match="the Slurm controller does not answer: squeue: slurm_load_jobs error: "):
        read_queue(commands)


def test_silence_is_not_empty_either(script: Script, commands: Commands) -> None:
    script.hang("squeue")
    with pytest.raises(Unreachable, match="squeue does not answer within 60 s"):
        read_queue(commands)


def test_no_slurm_at_all(commands: Commands) -> None:
    with pytest.raises(MissingTool, match="no program 'squeue'"):
        read_queue(commands)


@pytest.mark.parametrize(
    ("argv", "message", "kind", "words"),
    [
        (("sbatch", "--partition=nope"), NO_PARTITION, UnknownName, "partition 'nope': no such partition"),
        (("sbatch", "--account=x"), NO_ACCOUNT, UnknownName, "account 'x': no such account"),
        (("sbatch",), NO_ACCOUNT, UnknownName, "^no such account"),
        (("sbatch",), NO_NODE, LaunchError, "no node of the partition has"),
        (("sbatch",), "sbatch: error: Invalid --time specification", LaunchError, "time limit is not allowed"),
        (("sbatch",), "sbatch: error: the moon is full", LaunchError, "failed with status 1: the moon is full"),
    ],
)
def test_refusals(argv: tuple[str, ...], message: str, kind: type[ProctorError], words: str) -> None:
    error = refusal(argv, message, 1)
    assert type(error) is kind
    with pytest.raises(kind, match=words):
        raise error
    assert error.hint


@pytest.mark.parametrize(
    ("message", "limit"),
    [
        ("sbatch: error: QOSMaxSubmitJobPerUserLimit\n" + POLICY, "QOSMaxSubmitJobPerUserLimit"),
        ("sbatch: error: AssocMaxSubmitJobLimit\n" + POLICY, "AssocMaxSubmitJobLimit"),
        ("sbatch: error: AssocGrpSubmitJobsLimit\n" + POLICY, "AssocGrpSubmitJobsLimit"),
        (POLICY, "Job violates accounting/QOS policy"),
        ("sbatch: error: Batch job submission failed: Invalid job array specification", "MaxArraySize"),
        ("sbatch: error: Batch job submission failed: Resource temporarily unavailable", "MaxJobCount"),
        (NO_NODE, None),
        (NO_PARTITION, None),
    ],
)
def test_limits_have_names(message: str, limit: str | None) -> None:
    assert limit_in(message) == limit
    error = refusal(("sbatch",), message, 1)
    assert isinstance(error, LimitReached) == (limit is not None)
    if isinstance(error, LimitReached):
        assert error.limit == limit
        assert limit in str(error)


def test_a_limit_that_waiting_does_not_lift_is_no_limit_to_wait_for() -> None:
    message = "sbatch: error: QOSMaxWallDurationPerJobLimit\n" + POLICY
    error = refusal(("sbatch",), message, 1)
    assert not isinstance(error, LimitReached)
    assert "QOSMaxWallDurationPerJobLimit" in str(error)


def test_no_accounting_is_said_and_other_failures_are_raised(script: Script, commands: Commands) -> None:
    assert read_accounting(commands, ["1"]) is None
    script.say("sacct", err="Slurm accounting storage is disabled\n", status=1)
    assert read_accounting(commands, ["1"]) is None
    script.answers["sacct"].clear()
    script.say("sacct", err="sacct: error: Invalid field requested: x\n", status=1)
    with pytest.raises(LaunchError, match="Invalid field"):
        read_accounting(commands, ["1"])


async def test_an_unknown_job_is_told_from_an_unknown_queue(script: Script, commands: Commands) -> None:
    script.say("scontrol", err="slurm_load_jobs error: Invalid job id specified\n", status=1)
    script.say("scontrol", err=DOWN, status=1)
    assert await read_job(commands, "7") is None
    with pytest.raises(Unreachable):
        await read_job(commands, "7")


async def test_the_end_of_a_job(script: Script, commands: Commands) -> None:
    script.recorded("scontrol", "config.txt")
    script.recorded("scontrol", "job.txt")
    script.say("scontrol", "JobId=1 TimeLimit=UNLIMITED EndTime=Unknown\n")
    script.say("scontrol", err=DOWN, status=1)
    scheduler = await SlurmScheduler.open(commands, environ={"SLURM_JOB_END_TIME": "1795261200"})
    assert await scheduler.ends_at("42", "0") == 1795261233.0
    assert script.calls[-1][-1] == "42_0"
    assert await scheduler.ends_at("1", "") is None
    assert await scheduler.ends_at("1", "") == 1795261200.0
    untold = SlurmScheduler(commands, scheduler.limits)
    with pytest.raises(Unreachable):
        await untold.ends_at("1", "")


async def test_a_requeue_that_did_nothing_is_an_error(script: Script, commands: Commands) -> None:
    script.recorded("scontrol", "config.txt")
    script.say("scontrol")
    script.say("scontrol", err="Job is pending execution for job 41\n")
    scheduler = await SlurmScheduler.open(commands)
    await scheduler.requeue("42", "3")
    assert script.calls[-1] == ("scontrol", "requeue", "42_3")
    with pytest.raises(LaunchError, match="job 41 was not requeued: Job is pending"):
        await scheduler.requeue("41", "")


async def test_ids_are_cancelled_by_the_hundred(script: Script, commands: Commands) -> None:
    script.recorded("scontrol", "config.txt")
    script.say("scancel", err="scancel: error: Kill job error on job id 5: Invalid job id specified\n", status=1)
    scheduler = await SlurmScheduler.open(commands)
    await scheduler.cancel(f"7_{index}" for index in range(250))
    sent = [call[1:] for call in script.calls if call[0] == "scancel"]
    assert [len(ids) for ids in sent] == [100, 100, 50]
    script.answers["scancel"].clear()
    script.say("scancel", err="scancel: error: Kill job error on job id 5: Access/permission denied\n", status=1)
    with pytest.raises(LaunchError, match="this user may not do that"):
        await scheduler.cancel(["5"])


def test_the_real_runner_passes_text_and_status() -> None:
    output = run_program(["sh", "-c", 'cat; echo "$A" >&2; exit 7'], {"A": "b", "PATH": "/bin:/usr/bin"}, "ü\n", 10)
    assert (output.status, output.out, output.err) == (7, "ü\n", "b\n")


async def test_a_query_does_not_block_the_loop() -> None:
    commands = Commands(environ={"PATH": "/bin:/usr/bin"})
    asked = asyncio.create_task(commands.query("sleep", "0.3"))
    ticks = 0
    while not asked.done():
        await asyncio.sleep(0.01)
        ticks += 1
    assert ticks > 5
