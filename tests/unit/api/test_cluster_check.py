"""What `proctor clusters` says of a cluster: whose value each is, and what Slurm's own answers mean."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from proctor import api
from proctor.api.cluster_profiles import ResolvedCluster
from proctor.cli import run
from proctor.errors import ConfigError, UnknownName
from proctor.launch.slurm.commands import Commands, Output

HOSTS = (lambda: "uan03",)

CONFIG = """ClusterName             = lab
SLURM_VERSION           = 23.11.4
MaxArraySize            = 1001
MaxJobCount             = 10000
MinJobAge               = 300 sec
PrivateData             = none
"""
PARTITIONS = """PartitionName=gpu Default=YES State=UP MaxTime=1-00:00:00 DefaultTime=NONE MaxNodes=UNLIMITED
PartitionName=old Default=NO State=DOWN MaxTime=UNLIMITED DefaultTime=NONE MaxNodes=UNLIMITED
"""
NODES = """gpu*|n1|idle|64|512000|gpu:a100:4|gpu:a100:0|
gpu*|n2|down*|64|512000|gpu:a100:4|gpu:a100:0|
old|n3|idle|16|64000|(null)|gpu:0|
"""
ASSOCIATIONS = "lab||normal,high|50|10\nother||normal||\n"


class Slurm:
    """Answers by command; what is not there fails as Slurm's own command does."""

    def __init__(self, **changes: Output | str) -> None:
        self.asked: list[tuple[str, ...]] = []
        self.scripts: list[str] = []
        # What is particular to a test goes first, and may be the beginning of what is usual.
        self._answers: dict[str, Output | str] = {key.replace("_", " "): value for key, value in changes.items()} | {
            "scontrol show config": CONFIG,
            "scontrol -o show": PARTITIONS,
            "sinfo": NODES,
            "squeue": "",
            "sacctmgr -nP show assoc": ASSOCIATIONS,
            "sacctmgr -nP show qos": "high|5|2|12:00:00\n",
            "sbatch --test-only": Output(status=0, out="", err="sbatch: Job 7 to start at noon\n"),
        }
        self._answers |= {key.replace("_", " "): value for key, value in changes.items()}

    def __call__(self, argv: Sequence[str], environ: Mapping[str, str], text: str, timeout_s: float) -> Output:
        self.asked.append(tuple(argv))
        if text:
            self.scripts.append(text)
        said = " ".join(argv)
        for key, answer in self._answers.items():
            if said.startswith(key):
                return answer if isinstance(answer, Output) else Output(status=0, out=answer, err="")
        raise AssertionError(said)


def refused(message: str) -> Output:
    return Output(status=1, out="", err=message)


def cluster(**environ: str) -> ResolvedCluster:
    return api.resolve_cluster("generic", environ=environ, hosts=HOSTS)


async def states(found: ResolvedCluster, slurm: Slurm) -> dict[str, tuple[str, str]]:
    checked = await api.check_cluster(found, Commands(runner=slurm, environ={}))
    assert checked.usable == all(f.state != "failed" for f in checked.findings)
    return {f.what: (f.state, f.said) for f in checked.findings}


async def test_a_cluster_in_order() -> None:
    slurm = Slurm()
    found = await states(cluster(ACCOUNT="lab", PROCTOR_QOS="high", PARTITION="gpu", GPUS_PER_NODE="4"), slurm)
    assert {state for state, _ in found.values()} == {"ok"}
    assert found["Slurm"][1] == "Slurm 23.11.4, cluster 'lab'"
    assert "1,000 elements" in found["arrays"][1]
    assert found["partition"][1] == "'gpu' is UP: 1 of 2 nodes, up to 4 GPUs a node (a100), at most 1-00:00:00"
    assert found["account"][1] == "account 'lab': at most 50 jobs in the queue, 10 running"
    assert found["QOS"][1] == "QOS 'high': at most 5 jobs in the queue, 2 running, 12:00:00 each"
    assert "#SBATCH --gres=gpu:1" in slurm.scripts[0]


async def test_nothing_is_submitted() -> None:
    slurm = Slurm()
    await states(cluster(), slurm)
    assert [argv for argv in slurm.asked if argv[0] in ("sbatch", "srun", "salloc", "scancel")] == [
        ("sbatch", "--test-only")
    ]
    assert not [argv for argv in slurm.asked if argv[:2] == ("scontrol", "update")]


@pytest.mark.parametrize(
    ("environ", "changes", "what", "state", "said"),
    [
        ({"PARTITION": "gpus"}, {}, "partition", "failed", "unknown partition 'gpus'; did you mean 'gpu'?"),
        ({"PARTITION": "old"}, {}, "partition", "failed", "'old' is DOWN"),
        ({"PROCTOR_TIME_LIMIT": "2-0"}, {}, "partition", "failed", "beyond MaxTime 1-00:00:00"),
        ({"GPUS_PER_NODE": "8"}, {}, "partition", "failed", "at most 4 GPUs"),
        ({"ACCOUNT": "nobody"}, {}, "account", "failed", "account 'nobody' is none of yours: lab, other"),
        ({"ACCOUNT": "other", "PROCTOR_QOS": "high"}, {}, "QOS", "failed", "not open to you there: normal"),
        ({}, {"sacctmgr": refused("sacctmgr: error: Slurm accounting storage is disabled")}, "account", "ok", "no acc"),
        ({}, {"sacctmgr_-nP_show_assoc": ""}, "account", "warning", "no account of user"),
        ({}, {"squeue": refused("slurm_load_jobs error: Access denied")}, "queue", "failed", "squeue"),
        ({}, {"sbatch": refused("sbatch: error: Batch job submission failed: Invalid qos")}, "a job", "failed", "qos"),
        ({}, {"sinfo": NODES.replace("idle", "drained")}, "partition", "warning", "0 of 2 nodes"),
    ],
)
async def test_what_is_wrong_is_said(
    environ: dict[str, str], changes: dict[str, Output | str], what: str, state: str, said: str
) -> None:
    found = await states(cluster(**environ), Slurm(**changes))
    assert found[what][0] == state
    assert said.lower() in found[what][1].lower()


async def test_a_controller_that_is_down_is_one_finding() -> None:
    down = refused("slurm_load_ctl_conf error: Unable to contact slurm controller (connect failure)")
    found = await states(cluster(), Slurm(**{"scontrol_show_config": down}))
    assert list(found) == ["Slurm"]
    assert found["Slurm"][0] == "failed"


async def test_array_limits_that_slurm_does_not_allow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "clusters.yaml").write_text(
        f"mine: {{array_limit: 5000, shared: [{tmp_path}, /no/such], queue_limit: 9,\n"
        "  environment: {venv: /no/venv}, container: {type: enroot, image: /no/image.sqsh}}\n"
    )
    found = api.resolve_cluster("mine", environ={}, hosts=HOSTS)
    checked = await api.check_cluster(found, Commands(runner=Slurm(), environ={}))
    said = {f"{f.state}: {f.said}" for f in checked.findings}
    assert any("array_limit says 5,000" in s and s.startswith("warning") for s in said)
    assert f"ok: {tmp_path} is there" in said
    assert {"failed: /no/such is not there", "failed: /no/venv/bin/activate is not there"} <= said
    assert {"failed: /no/image.sqsh is not there", "ok: 0 jobs of yours of 9 that the profile allows"} <= said


# --- what a run makes of it -----------------------------------------------------------------------

RUN = """name: x
models: {m: {path: /m}}
tasks: [{native: demo:opposites}]
launch: {type: slurm, cluster: leonardo, account: lab, sbatch: {reservation: eval}}
"""


def test_a_runs_launch_goes_over_the_profile(tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(RUN)
    found = api.resolve_cluster(None, config, ["launch.qos=high"], environ={"QUEUE_LIMIT": "5"}, hosts=HOSTS)
    assert found.reason == f"named by launch.cluster of {str(config)!r}"
    assert {o.key: o.source for o in found.settings.overrides} == {
        "queue_limit": "the environment variable QUEUE_LIMIT",
        "account": "run.yaml",
        "sbatch.reservation": "run.yaml",
        "qos": "--set launch.qos",
    }
    assert (found.values["qos"], found.values["queue_limit"], found.values["partition"]) == (
        "high",
        5,
        "boost_usr_prod",
    )


def test_a_run_without_a_cluster_is_refused(tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(RUN.replace("type: slurm, cluster: leonardo, account: lab, sbatch: {reservation: eval}", ""))
    with pytest.raises(ConfigError, match=r"launch\.type of .* is 'local'"):
        api.resolve_cluster(None, config, environ={}, hosts=HOSTS)
    with pytest.raises(ConfigError, match="none is named"):
        api.resolve_cluster("lumi", None, ["launch.qos=x"], environ={}, hosts=HOSTS)


def test_known_clusters() -> None:
    known = api.clusters(environ={}, hosts=HOSTS)
    assert known.choice is not None
    assert known.choice.profile.name == "lumi"
    assert api.clusters(environ={}, hosts=(lambda: "laptop",)).choice is None
    assert api.detect_cluster(environ={"PROCTOR_CLUSTER": "jureca"}, hosts=HOSTS).profile.name == "lumi"
    with pytest.raises(UnknownName):
        api.clusters(environ={"PROCTOR_CLUSTER": "nowhere"}, hosts=HOSTS)


# --- the verb -------------------------------------------------------------------------------------


@pytest.fixture
def lumi(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PARTITION", "ACCOUNT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PROCTOR_CLUSTER", "lumi")


@pytest.mark.usefixtures("lumi")
def test_the_verb_prints_tables(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(["clusters"]) == 0
    out = capsys.readouterr().out
    assert "lumi *" in out
    assert "named by the environment variable PROCTOR_CLUSTER" in out
    monkeypatch.setenv("PARTITION", "stray")
    assert run(["clusters", "show"]) == 0
    out = capsys.readouterr().out
    assert "the environment variable PARTITION; the profile says small-g" in out
    assert "not the profile's: partition" in out


@pytest.mark.usefixtures("lumi")
def test_the_verb_prints_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["clusters", "show", "snellius", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["name"], shown["values"]["partition"], shown["overrides"]) == ("snellius", "gpu_h100", [])
    assert run(["clusters", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert {c["name"] for c in listed["clusters"]} >= {"leonardo", "generic"}
    assert listed["used"]["name"] == "lumi"


def test_the_verb_says_what_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["clusters", "show", "leonado"]) == 2
    assert "did you mean 'leonardo'?" in capsys.readouterr().err
    assert run(["clusters", "detect", "lumi"]) == 2
    assert "takes no name" in capsys.readouterr().err
