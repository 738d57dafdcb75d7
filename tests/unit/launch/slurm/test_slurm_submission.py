"""Cutting work into arrays, and stopping where Slurm says stop."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proctor.errors import LaunchError, LimitReached, Unreachable
from proctor.launch.launcher import Job, JobState
from proctor.launch.slurm.cluster import choose_partition, limits_of, partitions_of
from proctor.launch.slurm.commands import Commands, Output
from proctor.launch.slurm.launcher import SlurmLauncher
from proctor.launch.slurm.records import parse_settings
from proctor.launch.slurm.scheduler import SlurmScheduler
from proctor.launch.slurm.submission import Chunk, Submission, chunks, submit, submit_elements

from .conftest import DATA, Script, queue_line

LIMIT = "sbatch: error: QOSMaxSubmitJobPerUserLimit\nsbatch: error: Job violates accounting/QOS policy\n"


def render(chunk: Chunk) -> Submission:
    return Submission(script=f"#!/bin/sh\n# {chunk.offset}\n")


def accepting(script: Script, room: int) -> None:
    """sbatch that takes arrays while `room` elements are left, whole or not at all."""
    left = [room]

    def sbatch(argv: Sequence[str]) -> Output:
        array = next(word for word in argv if word.startswith("--array=")).removeprefix("--array=")
        size = int(array.split("%")[0].split("-")[-1]) + 1
        if size > left[0]:
            return Output(status=1, out="", err=LIMIT)
        left[0] -= size
        return Output(status=0, out=f"{100 + script.count('sbatch')};proctor\n", err="")

    script.answers["sbatch"] = [sbatch]


@given(count=st.integers(0, 900), most=st.integers(1, 1200), room=st.none() | st.integers(0, 900))
def test_chunks_cover_what_fits_in_as_few_arrays_as_possible(count: int, most: int, room: int | None) -> None:
    made = chunks(count, max_array=most, room=room)
    total = count if room is None else min(count, room)
    assert [index for c in made for index in range(c.offset, c.offset + c.size)] == list(range(total))
    assert len(made) == -(-total // most)
    assert all(1 <= c.size <= most for c in made)


def test_no_index_reaches_max_array_size() -> None:
    assert [chunk.spec(8) for chunk in chunks(2002, max_array=1001)] == ["0-1000%8", "0-1000%8"]
    assert [chunk.spec() for chunk in chunks(1, max_array=1001)] == ["0"]
    with pytest.raises(ValueError, match="allows no arrays"):
        chunks(1, max_array=0)


def test_the_command_of_a_submission() -> None:
    plain = Submission(script="x")
    assert plain.argv() == ("sbatch", "--parsable")
    full = Submission(
        script="x", array="0-3%2", dependency="afterany:7", partition="p", account="a", qos="q", cwd=Path("/a b")
    )
    assert full.argv() == (
        *("sbatch", "--parsable", "--array=0-3%2", "--dependency=afterany:7", "--partition=p"),
        *("--account=a", "--qos=q", "--chdir=/a b", "--kill-on-invalid-dep=yes"),
    )


async def test_the_script_goes_to_standard_input_and_the_id_comes_back(script: Script, commands: Commands) -> None:
    script.say("sbatch", "123;cluster\n")
    assert await submit(commands, Submission(script="#!/bin/sh\n", env={"A": "b"})) == "123"
    assert (script.texts, script.environments[0]["A"]) == (["#!/bin/sh\n"], "b")
    script.answers["sbatch"].clear()
    script.say("sbatch", "thank you\n")
    with pytest.raises(LaunchError, match="printed no job id but 'thank you'"):
        await submit(commands, Submission(script="#!/bin/sh\n"))


@pytest.mark.parametrize("room", [0, 1, 4, 7, 49, 64, 99])
async def test_a_limit_of_unknown_size_is_filled_by_halves(script: Script, commands: Commands, room: int) -> None:
    accepting(script, room)
    done = await submit_elements(commands, render, 100, max_array=1001)
    taken = sum(chunk.size for chunk, _ in done.jobs)
    assert room // 2 <= taken <= room
    assert done.owed == 100 - taken
    assert isinstance(done.stopped_by, LimitReached)
    assert done.stopped_by.limit == "QOSMaxSubmitJobPerUserLimit"
    assert script.count("sbatch") <= 16
    covered = [index for chunk, _ in done.jobs for index in range(chunk.offset, chunk.offset + chunk.size)]
    assert covered == list(range(taken))


async def test_a_full_cluster_is_asked_once(script: Script, commands: Commands) -> None:
    script.say("sbatch", err="sbatch: error: Resource temporarily unavailable\n", status=1)
    done = await submit_elements(commands, render, 100, max_array=1001)
    assert (done.jobs, done.owed, script.count("sbatch")) == ((), 100, 1)


async def test_the_load_counts_against_the_queue_limit(script: Script, commands: Commands) -> None:
    accepting(script, 1000)
    script.say("squeue", queue_line("1", "RUNNING") + queue_line("2", "PENDING") + queue_line("3", "COMPLETED"))
    done = await submit_elements(commands, render, 10, max_array=1001, queue_limit=8)
    assert [chunk.size for chunk, _ in done.jobs] == [6]
    assert done.owed == 4
    assert "room for 6 of 10" in str(done.stopped_by)


async def test_an_unknown_load_is_an_error_and_not_none(script: Script, commands: Commands) -> None:
    accepting(script, 1000)
    script.hang("squeue")
    with pytest.raises(Unreachable):
        await submit_elements(commands, render, 10, max_array=1001, queue_limit=8)
    assert script.count("sbatch") == 0


async def test_what_the_first_call_raises_is_raised_and_later_failures_are_told(
    script: Script, commands: Commands
) -> None:
    script.say("sbatch", "5\n")
    script.say("sbatch", err="sbatch: error: Unable to contact slurm controller\n", status=1)
    done = await submit_elements(commands, render, 30, max_array=10)
    assert [job for _, job in done.jobs] == ["5"]
    assert done.owed == 20
    assert isinstance(done.stopped_by, Unreachable)
    with pytest.raises(Unreachable):
        await submit_elements(commands, render, 30, max_array=10)


# ---- the launcher, where a real cluster would take too long or would have to be broken


@pytest.fixture
def launcher(commands: Commands) -> SlurmLauncher:
    scheduler = SlurmScheduler(commands, limits_of(parse_settings((DATA / "config.txt").read_text())))
    partitions = partitions_of((DATA / "partitions.txt").read_text(), (DATA / "sinfo.txt").read_text())
    return SlurmLauncher(scheduler, choose_partition(None, partitions), poll_s=0.01)


def job(tmp_path: Path, name: str = "a") -> Job:
    return Job(id=name, argv=("run", "two words", "$x"), log=tmp_path / "50%j.log", env={"TOKEN": "hf_x7"})


async def test_no_secret_and_no_unquoted_word_in_what_is_sent(
    script: Script, launcher: SlurmLauncher, tmp_path: Path
) -> None:
    script.say("sbatch", "5\n")
    await launcher.submit([job(tmp_path, "a/b c")])
    assert script.texts == ["#!/bin/sh\nexec run 'two words' '$x'\n"]
    assert script.environments[0]["TOKEN"] == "hf_x7"
    assert "hf_x7" not in " ".join(script.calls[0])
    assert f"--output={tmp_path}/50%%j.log" in script.calls[0]
    assert "--job-name=a_b_c" in script.calls[0]


async def test_a_refusal_leaves_nothing_half_submitted(script: Script, launcher: SlurmLauncher, tmp_path: Path) -> None:
    script.say("sbatch", "5\n")
    script.say("sbatch", err="sbatch: error: Requested node configuration is not available\n", status=1)
    script.say("scancel")
    with pytest.raises(LaunchError, match="no node of the partition"):
        await launcher.submit([job(tmp_path, "a"), job(tmp_path, "b")])
    assert script.calls[-1] == ("scancel", "5")
    assert await launcher.poll() == {}


async def test_what_a_limit_keeps_out_waits_and_says_why(
    script: Script, launcher: SlurmLauncher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("proctor.launch.slurm.launcher.LIMIT_RETRY_S", 0.0)
    script.say("sbatch", "5\n")
    script.say("sbatch", err=LIMIT, status=1)
    script.say("sbatch", "6\n")
    script.say("squeue", queue_line("5", "RUNNING"))
    script.say("squeue", queue_line("5", "COMPLETED") + queue_line("6", "RUNNING"))
    await launcher.submit([job(tmp_path, "a"), job(tmp_path, "b")])
    assert launcher.slurm_id("b") == ""
    states = await launcher.poll()
    assert states["a"].state is JobState.RUNNING
    assert launcher.slurm_id("b") == "6"
    states = await launcher.poll()
    assert {name: status.state for name, status in states.items()} == {"a": JobState.DONE, "b": JobState.RUNNING}


async def test_a_job_that_slurm_has_forgotten_did_not_succeed(
    script: Script, launcher: SlurmLauncher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script.say("sbatch", "5\n")
    script.say("squeue")
    await launcher.submit([job(tmp_path)])
    assert (await launcher.poll())["a"].state is JobState.PENDING, "too fresh to be missed"
    monkeypatch.setattr("proctor.launch.slurm.launcher._SETTLE_S", 0.0)
    status = (await launcher.poll())["a"]
    assert status.state is JobState.FAILED
    assert "knows job 5 no more" in status.message


async def test_accounting_tells_what_became_of_it(
    script: Script, launcher: SlurmLauncher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("proctor.launch.slurm.launcher._SETTLE_S", 0.0)
    script.say("sbatch", "5\n")
    script.say("squeue")
    script.recorded("sacct", "sacct.txt")
    await launcher.submit([job(tmp_path)])
    status = (await launcher.poll())["a"]
    assert (status.state, status.returncode) == (JobState.FAILED, 137)


async def test_an_unreadable_queue_changes_no_state(script: Script, launcher: SlurmLauncher, tmp_path: Path) -> None:
    script.say("sbatch", "5\n")
    script.say("squeue", err="slurm_load_jobs error: Unable to contact slurm controller\n", status=1)
    script.say("squeue", queue_line("5", "COMPLETED"))
    await launcher.submit([job(tmp_path)])
    with pytest.raises(Unreachable):
        await launcher.poll()
    assert (await launcher.poll())["a"].state is JobState.DONE


def named(job: str, state: str, name: str) -> str:
    return queue_line(job, state).replace("|name|", f"|{name}|")


async def test_a_waiting_job_waits_for_all_that_live_and_looks_again(script: Script) -> None:
    """Another writes at the same time: what it has forgotten is put back."""
    line = named("5", "RUNNING", "run-a") + named("6", "PENDING", "run-b") + named("8", "PENDING", "run-score")
    script.say("squeue", line + named("4", "COMPLETED", "run-a") + named("7", "RUNNING", "other"))
    shown = [
        *("afterany:5(unfulfilled)", "", "afterany:5(unfulfilled),afterany:9(unfulfilled)", ""),
        "afterany:5(unfulfilled),afterany:6_*(unfulfilled)",
    ]
    for dependency in shown:
        script.say("scontrol", f"JobId=8 Dependency={dependency}\n" if dependency else "")
    scheduler = SlurmScheduler(Commands(runner=script), limits_of(parse_settings((DATA / "config.txt").read_text())))
    await scheduler.wait_for_all("run-score", "run-")
    updates = [call[-1] for call in script.calls if "update" in call]
    assert updates == ["Dependency=afterany:5:6", "Dependency=afterany:5:6:9"]
    with pytest.raises(LaunchError, match="no job 'run-mark' waits"):
        await scheduler.wait_for_all("run-mark", "run-")
