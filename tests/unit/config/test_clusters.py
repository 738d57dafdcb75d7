"""Cluster profiles: packaged ones as golden files, files of users, which cluster this is, and who overrides whom."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml

from proctor.config.clusters.choice import choose, detect
from proctor.config.clusters.files import load_profiles, user_files
from proctor.config.clusters.settings import SlurmSettings, resolve_launch
from proctor.config.spec import SlurmLaunch
from proctor.errors import ConfigError, UnknownName

GOLDEN = Path(__file__).parents[2] / "golden" / "clusters"
PACKAGED = load_profiles([], {})


def resolved(launch: dict[str, Any], cluster: str = "generic", environ: dict[str, str] | None = None) -> SlurmSettings:
    return resolve_launch(SlurmLaunch.model_validate(launch), PACKAGED[cluster], environ or {})


def sources(settings: SlurmSettings) -> dict[str, tuple[Any, Any, str]]:
    return {o.key: (o.profile_value, o.value, o.source) for o in settings.overrides}


# --- packaged -------------------------------------------------------------------------------------


@pytest.mark.parametrize("cluster", sorted(PACKAGED))
def test_packaged_profiles_are_the_golden_ones(cluster: str) -> None:
    settings = asdict(resolved({}, cluster))
    settings["environment"] = resolved({}, cluster).environment.model_dump()
    value = {"profile": PACKAGED[cluster].model_dump(mode="json"), "a job without any key of its own": settings}
    text = yaml.safe_dump(json.loads(json.dumps(value)), sort_keys=False, allow_unicode=True, width=110)
    path = GOLDEN / f"{cluster}.yaml"
    if os.environ.get("PROCTOR_UPDATE_GOLDEN"):
        path.write_text(text, encoding="utf-8")
    assert path.read_text(encoding="utf-8") == text


def test_every_golden_profile_is_packaged() -> None:
    assert {p.stem for p in GOLDEN.iterdir()} == set(PACKAGED)


@pytest.mark.parametrize(
    ("host", "cluster"),
    [
        ("login07.leonardo.local", "leonardo"),
        ("jrlogin03.jureca", "jureca"),
        ("uan02", "lumi"),
        ("jpbl-s01-01", "jupiter"),
        ("int4.snellius.surf.nl", "snellius"),
        ("lrc1.ufal.mff.cuni.cz", "ufal"),
        ("laptop", None),
        ("leonardo.local", None),
    ],
)
def test_host_names(host: str, cluster: str | None) -> None:
    found = detect(PACKAGED, (lambda: host,))
    assert (found.profile.name if found else None) == cluster


# --- which one ------------------------------------------------------------------------------------


def test_the_short_name_goes_before_the_full_one() -> None:
    found = detect(PACKAGED, (lambda: "uan01", lambda: "uan01.mff.cuni.cz"))
    assert found is not None
    assert found.profile.name == "lumi"
    found = detect(PACKAGED, (lambda: "sol1", lambda: "sol1.ufal.mff.cuni.cz"))
    assert found is not None
    assert found.reason == "this machine's name 'sol1.ufal.mff.cuni.cz' fits '*.mff.cuni.cz'"


def test_the_full_name_is_asked_for_only_if_needed() -> None:
    def never() -> str:
        raise AssertionError

    assert detect(PACKAGED, (lambda: "uan01", never)) is not None


def test_a_choice_goes_before_the_environment_and_that_before_the_host() -> None:
    hosts = (lambda: "uan01",)
    environ = {"PROCTOR_CLUSTER": "snellius"}
    assert choose(PACKAGED, stated="jureca", environ=environ, hosts=hosts).profile.name == "jureca"
    assert choose(PACKAGED, stated=None, environ=environ, hosts=hosts).profile.name == "snellius"
    assert choose(PACKAGED, stated=None, environ={}, hosts=hosts).profile.name == "lumi"


def test_nothing_is_guessed() -> None:
    with pytest.raises(UnknownName, match="called 'laptop'") as caught:
        choose(PACKAGED, stated=None, environ={}, hosts=(lambda: "laptop", lambda: "laptop"))
    assert "generic" in str(caught.value)
    with pytest.raises(UnknownName, match="did you mean 'leonardo'"):
        choose(PACKAGED, stated="leonado", environ={}, hosts=())


# --- files ----------------------------------------------------------------------------------------


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_a_users_entry_goes_over_the_packaged_one(tmp_path: Path) -> None:
    mine = write(tmp_path / "c.yaml", "leonardo: {account: lab, container: {image: /i.sif}, env: {A: 1}}\n")
    profile = load_profiles([mine], {})["leonardo"]
    assert (profile.account, profile.partition) == ("lab", "boost_usr_prod")
    assert (profile.container.image, profile.container.args) == ("/i.sif", ("--nv",))
    assert profile.env == {"A": "1"}
    assert profile.source == f"{mine}, over packaged"


def test_own_profiles_come_first_in_the_order_of_their_files(tmp_path: Path) -> None:
    first = write(tmp_path / "1.json", json.dumps({"z": {"hosts": "uan*"}, "a": {"hosts": ["uan01"]}}))
    second = write(tmp_path / "2.yaml", "shared: {queue_limit: 5, env: {A: x}}\nb: {hosts: login*, env: {B: y}}\n")
    profiles = load_profiles([first, second], {})
    assert list(profiles)[:3] == ["z", "a", "b"]
    found = detect(profiles, (lambda: "uan01",))
    assert found is not None
    assert found.profile.name == "z"
    assert (profiles["b"].queue_limit, profiles["b"].env) == (5, {"A": "x", "B": "y"})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "mine: {partion: x}",
            r"c.yaml:1: partion: unknown key 'partion'; did you mean 'partition'\? \(cluster 'mine'\)",
        ),
        ("mine:\n  queue_limit: many", r"c.yaml:2: queue_limit: expected a whole number, not 'many'"),
        ("mine: {time_limit: 1h}", "Slurm's form of a time"),
        ("mine: {env: {a-b: x}}", "cannot be the name of an environment variable"),
        ('mine: {partition: "a\\nb"}', "line breaks"),
        ("mine: 3", "expected a profile"),
        ("[1]", "expected a mapping"),
    ],
)
def test_faults_name_file_line_and_key(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_profiles([write(tmp_path / "c.yaml", text)], {})


def test_where_files_are_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    (tmp_path / "config" / "proctor").mkdir(parents=True)
    own = write(tmp_path / "config" / "proctor" / "clusters.yaml", "{}")
    beside = write(tmp_path / "clusters.yaml", "{}")
    named = write(tmp_path / "site.yaml", "{}")
    assert user_files({"PROCTOR_CLUSTERS": str(named)}, tmp_path) == [named, beside, own]
    assert user_files({}, None) == [own]
    with pytest.raises(ConfigError, match="PROCTOR_CLUSTERS names"):
        user_files({"PROCTOR_CLUSTERS": f"{named}:{tmp_path}/none"}, None)


OELLM = """
shared:
  TIME_LIMIT: "00:30:00"
  UV_LINK_MODE: copy
  PYTHON_PATH: "{EVAL_BASE_DIR}/.venv"
  EVAL_OUTPUT_DIR: "{EVAL_BASE_DIR}/{USER}"
  GPUS_PER_NODE: 1
site:
  hostname_pattern: ["login*", "gw?"]
  EVAL_BASE_DIR: /work/evals
  PARTITION: booster
  ACCOUNT: lab
  QUEUE_LIMIT: 250
  EVAL_CONTAINER_IMAGE: env.sif
  SINGULARITY_ARGS: "--nv --env 'A=b c'"
  HF_HOME: "{EVAL_BASE_DIR}/hf_data"
  HF_HUB_OFFLINE: "0"
  SLURM_MEM: 32G
  NODELIST: "n[1-2]"
  LEFT: "{NOBODY_KNOWS}"
"""


def test_oellms_file_is_read_as_it_is(tmp_path: Path) -> None:
    profile = load_profiles([write(tmp_path / "clusters.yaml", OELLM)], {"USER": "ada"})["site"]
    assert profile.hosts == ("login*", "gw?")
    assert (profile.partition, profile.account, profile.queue_limit) == ("booster", "lab", 250)
    assert (profile.gpus_per_node, profile.memory, profile.offline) == (1, "32G", False)
    assert profile.container.model_dump(exclude_defaults=True) == {
        "type": "singularity",
        "image": "/work/evals/env.sif",
        "args": ("--nv", "--env", "A=b c"),
    }
    assert profile.sbatch == {"nodelist": "n[1-2]"}
    assert profile.shared == ("/work/evals",)
    assert profile.env == {
        "UV_LINK_MODE": "copy",
        "PYTHON_PATH": "/work/evals/.venv",
        "EVAL_OUTPUT_DIR": "/work/evals/ada",
        "EVAL_BASE_DIR": "/work/evals",
        "HF_HOME": "/work/evals/hf_data",
        "LEFT": "{NOBODY_KNOWS}",
    }


def test_in_oellms_templates_the_environment_goes_first(tmp_path: Path) -> None:
    environ = {"USER": "ada", "EVAL_BASE_DIR": "/mine"}
    profile = load_profiles([write(tmp_path / "clusters.yaml", OELLM)], environ)["site"]
    assert profile.env["HF_HOME"] == "/mine/hf_data"


# --- who overrides whom ---------------------------------------------------------------------------


def test_profile_then_environment_then_run_file() -> None:
    environ = {"PARTITION": "stray", "ACCOUNT": "env-account", "QUEUE_LIMIT": "7"}
    settings = resolved({"account": "run-account"}, "leonardo", environ)
    assert (settings.partition, settings.account, settings.queue_limit) == ("stray", "run-account", 7)
    assert sources(settings) == {
        "partition": ("boost_usr_prod", "stray", "the environment variable PARTITION"),
        "queue_limit": (1000, 7, "the environment variable QUEUE_LIMIT"),
        "account": (None, "run-account", "run.yaml"),
    }


def test_proctors_variables_go_before_oellms_and_those_before_sbatchs() -> None:
    environ = {"SBATCH_PARTITION": "c", "PARTITION": "b", "PROCTOR_PARTITION": "a"}
    for expected in ("PROCTOR_PARTITION", "PARTITION", "SBATCH_PARTITION"):
        settings = resolved({}, "lumi", environ)
        assert settings.partition == environ[expected]
        assert sources(settings)["partition"][2].endswith(f" {expected}")
        del environ[expected]


def test_the_same_value_again_is_no_override() -> None:
    assert resolved({"partition": "small-g"}, "lumi", {"PARTITION": "small-g"}).overrides == ()


def test_an_empty_variable_takes_a_value_away() -> None:
    assert resolved({}, "lumi", {"PARTITION": ""}).partition is None


def test_where_a_key_was_stated_is_kept() -> None:
    launch = SlurmLaunch.model_validate({"partition": "x", "env": {"A": "1"}})
    settings = resolve_launch(launch, PACKAGED["lumi"], {}, origins={"partition": "--set", "env": "--set"})
    assert {o.key: o.source for o in settings.overrides} == {"partition": "--set", "env.A": "--set"}


@pytest.mark.parametrize("name", ["QUEUE_LIMIT", "PROCTOR_GPUS_PER_NODE", "SLURM_GPU_FLAG_STYLE", "PROCTOR_TIME_LIMIT"])
def test_a_variable_that_cannot_be_meant_is_named(name: str) -> None:
    with pytest.raises(ConfigError, match=f"environment variable {name} is 'many'"):
        resolved({}, environ={name: "many"})


def test_gpu_flag_styles_of_the_environment_ignore_case() -> None:
    assert resolved({}, environ={"SLURM_GPU_FLAG_STYLE": "GPUS"}).gpu_flag_style == "gpus"


def test_containers_merge_and_need_a_type() -> None:
    settings = resolved({"container": {"image": "/i.sif", "binds": ["/a:/b:ro"]}}, "jupiter")
    assert settings.container is not None
    assert (settings.container.type, settings.container.args[:2]) == ("singularity", ("--nv", "--contain"))
    assert settings.container.binds[0].read_only
    assert resolved({"container": {"type": "none", "image": "/i.sif"}}, "jupiter").container is None
    assert resolved({}, "jupiter").container is None
    with pytest.raises(ConfigError, match="has no `type:`"):
        resolved({"container": {"image": "/i.sif"}}, "ufal")
    with pytest.raises(ConfigError, match="unknown type of container 'docker'"):
        resolved({}, "jupiter", {"PROCTOR_CONTAINER": "docker", "EVAL_CONTAINER_IMAGE": "x"})


def test_limits() -> None:
    settings = resolved({"time_limit": "1-0", "max_time": "2-0"})
    assert (settings.time_limit_s, settings.auto_time, settings.max_time_s) == (86_400, False, 172_800)
    settings = resolved({"time_limit": "auto"})
    assert (settings.time_limit_s, settings.auto_time) == (None, True)
    settings = resolved({"time_limit": "0"})
    assert (settings.time_limit_s, settings.auto_time) == (None, False)


def test_scoring_takes_the_jobs_partition_unless_it_has_its_own() -> None:
    first, second = (
        resolved({}, "lumi").scoring,
        resolved({"scoring": {"partition": "cpu", "cpus": 16}}, "lumi").scoring,
    )
    assert first is not None
    assert (first.partition, first.cpus, first.time_limit_s) == ("small-g", 4, 7_200)
    assert second is not None
    assert (second.partition, second.cpus) == ("cpu", 16)
    assert resolved({"scoring": {"enabled": False}}, "lumi").scoring is None


def test_nodes_are_servers_times_nodes_of_each() -> None:
    assert resolved({"nodes_per_server": 2, "servers": 3}).nodes == 6


def test_a_variable_of_the_job_is_taken_from_the_users_shell(tmp_path: Path) -> None:
    mine = load_profiles([write(tmp_path / "c.yaml", "mine: {env: {HF_HOME: /site, B: x}}")], {})["mine"]
    settings = resolve_launch(SlurmLaunch(), mine, {"HF_HOME": "/home/me/hf"})
    assert settings.env == {"HF_HOME": "/home/me/hf", "B": "x"}
    assert sources(settings) == {"env.HF_HOME": ("/site", "/home/me/hf", "the environment variable HF_HOME")}
