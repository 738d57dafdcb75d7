"""Job scripts as a real sbatch reads them, and `proctor clusters check` against real controllers."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from proctor import api
from proctor.config.clusters import SlurmSettings, load_profiles, resolve_launch
from proctor.config.spec import SlurmLaunch
from proctor.launch.slurm.commands import Commands
from proctor.launch.slurm.submission import Submission, submit
from proctor.launch.slurm_script import JobScript, Variable, log_pattern, worker_script

from .cluster import Cluster

HOSTILE = "q'uo\"te $(touch pwned) `id` \\n\nline\r#SBATCH -a 0-9 ünï模🦊"
SHOW = """
import json, os, signal, sys, time
def told(*_):
    print("USR1", flush=True)
    sys.exit(0)
signal.signal(signal.SIGUSR1, told)
file = sys.argv[1] + "." + sys.argv[3]
with open(file + ".part", "w") as out:
    json.dump({"argv": sys.argv[2:], "env": dict(os.environ)}, out)
os.rename(file + ".part", file)
time.sleep(float(sys.argv[4]))
"""


def settings(**launch: Any) -> SlurmSettings:
    return resolve_launch(SlurmLaunch.model_validate(launch), load_profiles([], {})["generic"], {})


def script(directory: Path, resolved: SlurmSettings, *, seconds: int = 0) -> JobScript:
    shown = str(directory / "shown")
    return worker_script(
        resolved,
        name="x' $(touch pwned) \"y",
        log=log_pattern(directory, "%A_%a.log"),
        python=sys.executable,
        argv=("-c", SHOW, shown, HOSTILE, Variable.ARRAY_TASK, str(seconds), Variable.JOB_ID),
        gpus=1,
        time_limit_s=90,
    )


async def sent(job: JobScript, directory: Path, **more: str) -> str:
    environ = os.environ | {"SBATCH_PARTITION": "nowhere", "SLURM_ARRAY_TASK_ID": "77", "HF_TOKEN": "s3cret"} | more
    env = job.submission_environment(environ)
    submission = Submission(script=job.text(), array="0-1", env=env, cwd=directory)
    return await submit(Commands(environ=env), submission)


async def test_sbatch_reads_a_hostile_script_as_it_was_meant(slurm: Cluster, tmp_path: Path) -> None:
    directory = tmp_path / "per%cent #hash 'q\" $(touch pwned) ünï"
    directory.mkdir()
    comment = "he#llo $(touch pwned) 'x' \"y\" \\z"
    resolved = settings(sbatch={"comment": comment}, env={"A": HOSTILE}, pass_env=["HF_TOKEN"])
    job = await sent(script(directory, resolved, seconds=3), directory, OTHER="unwanted")
    files = [directory / f"shown.{index}" for index in (0, 1)]
    slurm.wait(lambda: all(f.exists() for f in files), 60, "the jobs did not write what they were given")
    for index, file in enumerate(files):
        shown = json.loads(file.read_text())
        assert shown["argv"] == [HOSTILE, str(index), "3", job]
        env = shown["env"]
        assert (env["A"], env["HF_TOKEN"], env["HF_HUB_OFFLINE"]) == (HOSTILE, "s3cret", "1")
        assert "OTHER" not in env
        assert "SBATCH_PARTITION" not in env
        assert (directory / f"{job}_{index}.log").exists()
    described = slurm.run("scontrol", "show", "job", f"{job}_0")
    assert "JobName=x' $(touch pwned) \"y\n" in described
    assert f"Comment={comment}" in described
    assert "TimeLimit=00:02:00" in described
    assert "gres/gpu=1" in described or "gres:gpu:1" in described
    assert "Requeue=1" in described
    assert "s3cret" not in slurm.run("scontrol", "write", "batch_script", f"{job}_0", "-")
    assert not list(tmp_path.rglob("pwned"))


async def test_the_signal_before_the_limit_reaches_python(slurm: Cluster, tmp_path: Path) -> None:
    job = await sent(script(tmp_path, settings(), seconds=300), tmp_path)
    slurm.wait(lambda: (tmp_path / "shown.1").exists(), 60, "the job did not start")
    slurm.run("scancel", "--batch", "--signal=USR1", f"{job}_1")
    log = tmp_path / f"{job}_1.log"
    slurm.wait(lambda: "USR1" in log.read_text(), 30, "Python was not told")
    slurm.run("scancel", job)


async def test_a_cluster_is_checked(slurm: Cluster) -> None:
    found = api.resolve_cluster("generic", environ={"GPUS_PER_NODE": "4"})
    checked = await api.check_cluster(found)
    assert checked.usable, checked
    said = {f.what: f.said for f in checked.findings}
    assert "up to 4 GPUs a node" in said["partition"]
    assert "accounting" in said["account"]
    assert said["a job"].startswith("would be accepted")
    wrong = await api.check_cluster(api.resolve_cluster("lumi", environ={}))
    assert {f.what for f in wrong.findings if f.state == "failed"} == {"partition", "a job"}
    assert not slurm.run("squeue", "-h").strip()


async def test_accounts_are_checked(slurm_accounting: Cluster) -> None:
    good = await api.check_cluster(api.resolve_cluster("generic", environ={"ACCOUNT": "limited"}))
    assert good.usable, good
    assert "at most 3 jobs" in next(f.said for f in good.findings if f.what == "account")
    bad = await api.check_cluster(api.resolve_cluster("generic", environ={"ACCOUNT": "nobody"}))
    account = next(f for f in bad.findings if f.what == "account")
    assert account.state == "failed"
    assert "limited" in account.said
