"""Job scripts: golden files for every packaged profile, and what real bash makes of hostile names."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from proctor.config.clusters.files import load_profiles
from proctor.config.clusters.settings import SlurmSettings, resolve_launch
from proctor.config.slurm_values import RESERVED
from proctor.config.spec import SlurmEnvironment, SlurmLaunch
from proctor.errors import ConfigError
from proctor.launch.slurm_script import (
    EXPORTED,
    JobScript,
    Variable,
    log_pattern,
    quoted,
    scoring_script,
    worker_script,
)

GOLDEN = Path(__file__).parents[2] / "golden" / "slurm"
PROFILES = load_profiles([], {})
COMMAND = ("-m", "proctor.worker", "/work/runs/first run", "jobs/a100.json", Variable.ARRAY_TASK)
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "limits": {
        "partition": "long,short",
        "account": "lab-7",
        "qos": "high",
        "time_limit": "1-12",
        "cpus": 32,
        "memory": "200G",
        "signal_lead_s": 300,
        "requeue": "successor",
        "sbatch": {"reservation": "eval", "exclusive": True, "constraint": "a100&nvlink"},
    },
    "typed-gpus": {"gpu_flag_style": "gpus", "gpu_type": "a100", "nodes_per_server": 2, "servers": 2},
    "no-gpu-flag": {"gpu_flag_style": "none", "sbatch": {"mem-per-gpu": "60G"}, "memory": "200G"},
    "modules-venv": {"environment": {"modules": ["GCC/12.3.0", "CUDA/12"], "venv": "/envs/proctor"}},
    "conda": {"environment": {"conda": "proctor", "conda_sh": "/opt/conda/etc/profile.d/conda.sh"}},
    "conda-hook": {"environment": {"conda": "/envs/conda env"}},
    "pixi": {"environment": {"pixi": "/work/my project/pixi.toml", "pixi_env": "cuda"}},
    "command": {"environment": {"command": ["module use /sw/stage", ". /sw/activate"], "python": "/sw/bin/python3"}},
    "online": {"offline": False, "pass_env": ["HF_TOKEN"], "env": {"HF_HOME": "/work/hf"}},
    "hostile": {
        "account": "quote'and\"double $(touch pwned)",
        "qos": "per%cent #hash `id` \\",
        "sbatch": {"comment": "-leading ünïcødé-模型-🦊"},
        "environment": {"modules": ["$(touch pwned)"], "venv": "/two words/`id`"},
        "env": {"A": "new\nline\r\n#SBATCH --array=0-9", "B": "'\"$HOME`id`\\", "C": "-x"},
    },
}


def settings(cluster: str = "generic", **launch: Any) -> SlurmSettings:
    return resolve_launch(SlurmLaunch.model_validate(launch), PROFILES[cluster], {})


def script(resolved: SlurmSettings, **changes: Any) -> JobScript:
    values: dict[str, Any] = {
        "name": "proctor-first",
        "log": "/work/runs/first/logs/%A_%a.log",
        "python": "/opt/proctor/bin/python",
        "argv": COMMAND,
        "gpus": 2,
        "time_limit_s": 4 * 3_600,
    }
    return worker_script(resolved, **(values | changes))


def golden(path: Path, text: str) -> None:
    """Compare with a file; PROCTOR_UPDATE_GOLDEN=1 writes it."""
    if os.environ.get("PROCTOR_UPDATE_GOLDEN"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    assert path.read_text(encoding="utf-8") == text


def accepted_by_bash(text: str) -> None:
    done = subprocess.run(["bash", "-n"], input=text.encode(), capture_output=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr.decode()


@pytest.mark.parametrize("cluster", sorted(PROFILES))
def test_scripts_are_the_golden_ones(cluster: str) -> None:
    texts: list[str] = []
    for case, launch in CASES.items():
        resolved = settings(cluster, **launch)
        text = script(resolved, time_limit_s=resolved.time_limit_s or 4 * 3_600).text()
        golden(GOLDEN / f"{cluster}-{case}.sh", text)
        texts.append(text)
    resolved = settings(cluster)
    assert resolved.scoring is not None
    text = scoring_script(
        resolved, resolved.scoring, name="proctor-score", log="/l/%j.log", python="/p", argv=("-m", "proctor", "score")
    ).text()
    golden(GOLDEN / f"{cluster}-scoring.sh", text)
    for each in [*texts, text]:
        accepted_by_bash(each)
        assert len(each.splitlines()) <= 40
        assert each.rstrip().splitlines()[-1].startswith("exec ")


def test_no_golden_file_is_left_over() -> None:
    expected = {f"{c}-{case}.sh" for c, case in itertools.product(PROFILES, [*CASES, "scoring"])}
    assert {p.name for p in GOLDEN.iterdir()} == expected


# --- what bash makes of it -------------------------------------------------------------------------

SHOW = """#!/bin/sh
exec "$REAL_PYTHON" -c '
import json, os, sys
json.dump({"argv": sys.argv[1:], "env": dict(os.environ)}, open(os.environ["SHOWN"], "w"))
' "$@"
"""


def run(text: str, directory: Path, *, fake_python: Path, **env: str) -> dict[str, Any]:
    """Run the script with real bash; what the program that it ends in was given."""
    shown = directory / "shown.json"
    fake_python.parent.mkdir(parents=True, exist_ok=True)
    fake_python.write_text(SHOW)
    fake_python.chmod(0o755)
    path = directory / "job.sh"
    path.write_text(text, encoding="utf-8")
    base = {"PATH": os.environ["PATH"], "HOME": "/home/nobody", "REAL_PYTHON": sys.executable, "SHOWN": str(shown)}
    done = subprocess.run(
        ["bash", str(path)], cwd=directory, env=base | env, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return json.loads(shown.read_text())


def test_nothing_that_a_user_names_expands(tmp_path: Path, hostile_name: str) -> None:
    text = script(
        settings(env={"A": hostile_name}),
        name="x",
        python=str(tmp_path / hostile_name / "python"),
        argv=("-m", "proctor.worker", hostile_name, Variable.ARRAY_TASK, "$SLURM_ARRAY_TASK_ID", Variable.JOB_ID),
    ).text()
    env = {"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_JOB_ID": "4", "SLURM_JOB_ID": "11"}
    seen = run(text, tmp_path, fake_python=tmp_path / hostile_name / "python", **env)
    assert seen["argv"] == ["-m", "proctor.worker", hostile_name, "7", "$SLURM_ARRAY_TASK_ID", "4"]
    assert seen["env"]["A"] == hostile_name
    assert not list(tmp_path.rglob("pwned"))


def test_a_job_that_is_no_array_is_element_0_of_itself(tmp_path: Path) -> None:
    text = script(settings(), python=str(tmp_path / "python"), argv=(Variable.ARRAY_TASK, Variable.JOB_ID)).text()
    assert run(text, tmp_path, fake_python=tmp_path / "python", SLURM_JOB_ID="11")["argv"] == ["0", "11"]


def test_every_byte_survives_the_shell(tmp_path: Path) -> None:
    words = ["".join(map(chr, range(1, 256))), "\udcff\udc80", "\x1fa", "\u2028x", "\\n", "a'b\nc", ""]
    text = script(settings(), python=str(tmp_path / "python"), argv=words).text()
    assert run(text, tmp_path, fake_python=tmp_path / "python")["argv"] == words


def test_a_virtual_environment_is_activated_and_its_python_runs(tmp_path: Path, hostile_name: str) -> None:
    venv = tmp_path / hostile_name
    (venv / "bin").mkdir(parents=True)
    (venv / "bin" / "activate").write_text(f"export PATH={quoted(str(venv / 'bin'))}:$PATH ACTIVE=yes\n")
    environment = SlurmEnvironment(venv=str(venv)) if "\n" not in hostile_name else None
    if environment is None:
        with pytest.raises(ValueError, match="line breaks"):
            SlurmEnvironment(venv=str(venv))
        return
    text = script(settings(environment=environment.model_dump())).text()
    seen = run(text, tmp_path, fake_python=venv / "bin" / "python")
    assert seen["env"]["ACTIVE"] == "yes"
    assert seen["argv"][:2] == ["-m", "proctor.worker"]


def test_a_job_whose_environment_is_not_there_fails_as_wrong_usage(tmp_path: Path) -> None:
    path = tmp_path / "job.sh"
    path.write_text(script(settings(environment={"venv": str(tmp_path / "none")})).text())
    done = subprocess.run(["bash", str(path)], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 2
    assert "none/bin/activate" in done.stderr


def test_pixi_and_conda_are_asked_for_their_hooks(tmp_path: Path) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("pixi", "conda"):
        tool = tools / name
        tool.write_text(f'#!/bin/sh\necho "export {name.upper()}=\'$*\'; conda() {{ export NAME=\\"\\$*\\"; }}"\n')
        tool.chmod(0o755)
    for environment in ({"pixi": "/a b/pixi.toml", "pixi_env": "cuda"}, {"conda": "/envs/a b"}):
        text = script(settings(environment=environment)).text()
        path = f"{tools}:{tmp_path / 'bin'}:{os.environ['PATH']}"
        seen = run(text, tmp_path, fake_python=tmp_path / "bin" / "python", PATH=path)["env"]
        if "pixi" in environment:
            assert seen["PIXI"] == "shell-hook --no-install --manifest-path=/a b/pixi.toml --environment=cuda"
        else:
            assert seen["NAME"] == "activate /envs/a b"


# --- directives -----------------------------------------------------------------------------------


def directives(text: str) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH")]


@pytest.mark.parametrize("place", ["name", "account", "log"])
def test_a_line_break_never_gets_into_a_directive(place: str) -> None:
    broken = "a\n#SBATCH --array=0-999"
    with pytest.raises(ConfigError, match="line breaks"):
        if place == "account":
            resolve_environment = resolve_launch(SlurmLaunch(), PROFILES["generic"], {"ACCOUNT": broken})
            script(resolve_environment).text()
        else:
            script(settings(), **{place: broken}).text()


def test_gpu_flags() -> None:
    assert "--gres=gpu:2" in directives(script(settings()).text())
    assert "--gres=gpu:a100:2" in directives(script(settings(gpu_type="a100")).text())
    spread = settings(gpu_flag_style="gpus", gpu_type="a100", nodes_per_server=3)
    assert "--gpus=a100:6" in directives(script(spread).text())
    for text in (script(settings(gpu_flag_style="none")).text(), script(settings(), gpus=0).text()):
        assert not [line for line in directives(text) if "gpu" in line]


def test_more_gpus_than_a_node_has_are_refused() -> None:
    with pytest.raises(ConfigError, match="9 GPUs on each node, but those of 'lumi' have 8"):
        script(settings("lumi"), gpus=9)


def test_the_signal_goes_to_the_process_that_the_shell_becomes() -> None:
    lines = directives(script(settings(signal_lead_s=90)).text())
    assert "--signal=B:USR1@90" in lines


@pytest.mark.parametrize(
    ("policy", "flag"),
    [("auto", "--requeue"), ("requeue", "--requeue"), ("successor", "--no-requeue"), ("never", "--no-requeue")],
)
def test_requeue_policies(policy: str, flag: str) -> None:
    assert {"--requeue", "--no-requeue"} & set(directives(script(settings(requeue=policy)).text())) == {flag}


def test_every_option_of_a_script_is_reserved_or_may_be_given_again() -> None:
    names = {line.lstrip("-").partition("=")[0] for line in directives(script(settings(cpus=1, memory="1G")).text())}
    assert names - {"mem"} <= RESERVED


# --- what a job is given of the submitter's environment ---------------------------------------------


def test_a_job_gets_little_of_the_submitting_shell() -> None:
    environ = {
        "HOME": "/h",
        "PATH": "/bin",
        "HF_TOKEN": "hf_secret",
        "OTHER_KEY": "x",
        "SBATCH_PARTITION": "nope",
        "SLURM_ARRAY_TASK_ID": "9",
        "SLURM_CONF": "/etc/slurm.conf",
        "CUDA_VISIBLE_DEVICES": "0",
    }
    job = script(settings(pass_env=["HF_TOKEN"]))
    given = job.submission_environment(environ)
    assert given == {k: environ[k] for k in ("HOME", "PATH", "SLURM_CONF", "HF_TOKEN")}
    assert "hf_secret" not in job.text()
    assert "--export=ALL" in directives(job.text())
    assert "PATH" in EXPORTED


@pytest.mark.parametrize(
    "name", ["HF_TOKEN", "OPENAI_API_KEY", "MY_SECRET", "db_password", "AWS_SECRET_ACCESS_KEY", "TOKEN"]
)
def test_a_secret_is_not_written_into_a_script(name: str) -> None:
    with pytest.raises(ConfigError, match="others can read it") as caught:
        script(settings(env={name: "value-of-it"})).text()
    assert "value-of-it" not in str(caught.value)
    script(settings(env={name: "", "TOKENIZERS_PARALLELISM": "false"})).text()


def test_only_names_of_variables_are_handed_over() -> None:
    with pytest.raises(ConfigError, match="cannot be the name"):
        script(settings(), pass_env=("A=1",)).submission_environment({})


# --- logs -------------------------------------------------------------------------------------------


def test_log_patterns() -> None:
    assert log_pattern(Path("/runs/50%a"), "%A_%a.log") == "/runs/50%%a/%A_%a.log"
    with pytest.raises(ConfigError, match="backslash"):
        log_pattern("/runs/a\\b", "%j.log")
