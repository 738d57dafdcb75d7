"""Which attempt of a job lives, by the word of a real controller; and what a running job asks of it."""

from __future__ import annotations

import asyncio
import json
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from proctor.errors import LaunchError
from proctor.launch.launcher import JobState
from proctor.launch.slurm.attempts import Attempts
from proctor.launch.slurm.commands import Commands
from proctor.launch.slurm.queue import read_queue
from proctor.launch.slurm.scheduler import SlurmScheduler
from proctor.launch.slurm.submission import Submission, submit

from .cluster import Cluster

# Writes <task>.<restart> when it begins; takes two seconds to end, as a worker that flushes does.
SCRIPT = """#!/bin/sh
#SBATCH --output=/dev/null --open-mode=append --requeue --time=30
trap 'sleep 2; exit 0' TERM
touch {directory}/${{SLURM_ARRAY_TASK_ID:-x}}.${{SLURM_RESTART_COUNT:-0}}
while :; do sleep 0.1; done
"""


async def start(directory: Path, array: str | None = None, **more: str) -> str:
    return await submit(Commands(), Submission(script=SCRIPT.format(directory=directory), array=array, **more))


async def seen(condition: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.1)


def state(job: str, task: str = "") -> str:
    found = [r.state for r in read_queue(Commands()) if (r.array, r.array_task) == (job, task)]
    return found[0] if found else ""


@pytest.fixture
def attempts() -> Attempts:
    return Attempts(Commands(), max_age_s=0.2, min_gap_s=0.05)


async def test_only_the_attempt_that_runs_is_live(slurm: Cluster, attempts: Attempts, tmp_path: Path) -> None:
    job = await start(tmp_path, array="0-1")
    await seen(lambda: (tmp_path / "0.0").exists() and (tmp_path / "1.0").exists())
    assert [attempts.is_live(job, task, 0) for task in "01"] == [True, True]
    assert attempts.is_live(job, "2", 0) is False
    assert attempts.is_live(str(int(job) + 1000), "", 0) is False

    scheduler = await SlurmScheduler.open()
    await scheduler.requeue(job, "0")
    assert attempts.is_live(job, "0", 0) is True, "its processes are still being ended"
    await seen(lambda: state(job, "0") == "PENDING")
    assert [attempts.is_live(job, task, 0) for task in "01"] == [False, True]
    assert attempts.is_live(job, "0", 1) is None, "the next attempt has not begun, as far as the controller knows"
    await seen(lambda: (tmp_path / "0.1").exists(), 60)
    assert attempts.is_live(job, "0", 0) is False
    assert attempts.is_live(job, "0", 1) is True

    await scheduler.cancel([f"{job}_0"])
    await seen(lambda: state(job, "0") == "CANCELLED")
    assert [attempts.is_live(job, task, number) for task, number in (("0", 1), ("1", 0))] == [False, True]


async def test_a_requeued_and_held_job_does_not_strand_its_work(
    slurm: Cluster, attempts: Attempts, tmp_path: Path
) -> None:
    job = await start(tmp_path)
    await seen((tmp_path / "x.0").exists)
    slurm.run("scontrol", "requeuehold", job)
    await seen(lambda: state(job) not in ("RUNNING", "COMPLETING"))
    assert attempts.is_live(job, "", 0) is False


async def test_suspended_is_live(slurm: Cluster, attempts: Attempts, tmp_path: Path) -> None:
    job = await start(tmp_path)
    await seen((tmp_path / "x.0").exists)
    slurm.run("scontrol", "suspend", job)
    await seen(lambda: state(job) == "SUSPENDED")
    assert attempts.is_live(job, "", 0) is True
    slurm.run("scontrol", "resume", job)


async def test_nothing_is_concluded_while_the_controller_is_away(
    slurm: Cluster, attempts: Attempts, tmp_path: Path
) -> None:
    job = await start(tmp_path)
    await seen((tmp_path / "x.0").exists)
    assert attempts.is_live(job, "", 0) is True
    await asyncio.sleep(6)  # it saves new jobs that often; that a job has begun is saved some time later
    slurm.kill_controller()
    await asyncio.sleep(0.3)
    assert attempts.is_live(job, "", 0) is None
    assert attempts.failure is not None
    slurm.start_controller()
    # It comes back with what it last saved: the job may wait again, to begin anew under the same number.
    deadline = time.monotonic() + 60
    while not (word := attempts.is_live(job, "", 0)):
        assert word is None
        assert time.monotonic() < deadline
        await asyncio.sleep(0.1)


async def test_a_node_given_up_ends_the_attempt_although_it_goes_on(
    slurm: Cluster, attempts: Attempts, tmp_path: Path
) -> None:
    job = await start(tmp_path)
    await seen((tmp_path / "x.0").exists)
    node = next(r.nodes for r in read_queue(Commands()) if r.job == job)
    slurm.isolate_node(node)
    assert attempts.is_live(job, "", 0) is True
    await seen((tmp_path / "x.1").exists, 90)
    assert slurm.node_pids(node), "the first copy goes on"
    assert attempts.is_live(job, "", 0) is False
    assert attempts.is_live(job, "", 1) is True


async def test_a_job_knows_its_end_and_only_its_own_element_is_requeued(slurm: Cluster, tmp_path: Path) -> None:
    scheduler = await SlurmScheduler.open()
    job = await start(tmp_path, array="3-4")
    await seen(lambda: (tmp_path / "3.0").exists() and (tmp_path / "4.0").exists())
    ends = await scheduler.ends_at(job, "3")
    assert ends is not None
    assert 29 * 60 < ends - time.time() < 30 * 60 + 5
    await scheduler.requeue(job, "3")
    records = {r.array_task: r for r in read_queue(Commands()) if r.array == job}
    assert (records["3"].restarts, records["4"].restarts) == (1, 0)
    with pytest.raises(LaunchError, match="does not know job 99999"):
        await scheduler.ends_at("99999", "")
    with pytest.raises(LaunchError):
        await scheduler.requeue("99999", "")


async def test_hundreds_are_cancelled_in_a_few_calls(slurm: Cluster) -> None:
    scheduler = await SlurmScheduler.open()
    script = "#!/bin/sh\n#SBATCH --hold --output=/dev/null\n"
    job = await submit(scheduler.commands, Submission(script=script, array="0-249"))
    await scheduler.cancel([*(f"{job}_{index}" for index in range(240)), "99999"])
    left = [r.array_task for r in read_queue(scheduler.commands) if r.array == job and r.stands is JobState.PENDING]
    assert left == [str(index) for index in range(240, 250)]


INSIDE = """
import asyncio, json, os, sys, time
from pathlib import Path
from proctor.launch.slurm.scheduler import SlurmScheduler

async def main():
    job, task = os.environ["SLURM_ARRAY_JOB_ID"], os.environ["SLURM_ARRAY_TASK_ID"]
    restart = int(os.environ.get("SLURM_RESTART_COUNT") or 0)
    scheduler = await SlurmScheduler.open(environ=os.environ)
    live = [scheduler.is_live(job, task, number) for number in (0, 1)]
    ends = await scheduler.ends_at(job, task)
    said = {"live": live, "left": ends - time.time(), "cluster": scheduler.cluster}
    Path(sys.argv[1], f"{task}.{restart}").write_text(json.dumps(said))
    if restart == 0 and task == "1":
        await scheduler.requeue(job, task)
        time.sleep(60)

asyncio.run(main())
"""


async def test_a_job_asks_about_itself_and_requeues_itself(slurm: Cluster, tmp_path: Path) -> None:
    (tmp_path / "inside.py").write_text(INSIDE)
    command = shlex.join([sys.executable, str(tmp_path / "inside.py"), str(tmp_path)])
    head = f"#!/bin/sh\n#SBATCH --requeue --time=20 --output={tmp_path}/log.%a --open-mode=append\n"
    await submit(Commands(), Submission(script=f"{head}exec {command}\n", array="1-2"))
    try:
        await seen((tmp_path / "1.1").exists, 60)
    finally:
        print(*(path.read_text() for path in tmp_path.glob("log.*")))
    said = {name: json.loads((tmp_path / name).read_text()) for name in ("1.0", "2.0", "1.1")}
    assert [said[name]["live"] for name in said] == [[True, None], [True, None], [False, True]]
    assert all(1000 < said[name]["left"] <= 1205 for name in said)
    assert said["1.0"]["cluster"] == "proctor"
    assert not (tmp_path / "2.1").exists()


async def test_anothers_job_is_not_taken_for_dead(slurm: Cluster, attempts: Attempts, tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    script = tmp_path / "script"
    script.write_text("#!/bin/sh\nsleep 100\n")
    flags = ["--uid=nobody", f"--chdir={tmp_path}", "--output=/dev/null", "--array=3"]
    job = slurm.run("sbatch", "--parsable", *flags, str(script)).strip()
    slurm.wait(lambda: slurm.run("squeue", "-h", "-j", job, "-o", "%T").strip() == "RUNNING", 30, "no start")
    assert job not in {record.array for record in read_queue(Commands())}
    assert attempts.is_live(job, "3", 0) is True
    slurm.run("scancel", job)
    slurm.wait(lambda: not slurm.run("squeue", "-h", "-j", job).strip(), 30, "no end")
    await asyncio.sleep(0.3)
    assert attempts.is_live(job, "3", 0) is False
