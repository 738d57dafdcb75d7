"""How a server is started on the nodes of a job: srun's words, and what each node makes of the command."""

from __future__ import annotations

import os
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from proctor.config.spec import CommandServer, LlamaCppServer, SglangServer, VllmServer
from proctor.errors import ConfigError, LaunchError, ServerError
from proctor.infer.server import ServedModel, ServerPaths
from proctor.infer.servers.build import build_server
from proctor.infer.servers.command import CommandRecipe
from proctor.infer.servers.launched import Place
from proctor.infer.servers.placement import FOLLOWER, NODE_RANK, OnThisMachine
from proctor.infer.servers.sglang import SglangRecipe
from proctor.infer.servers.steps import PORTS, Steps, StepTerms, step_environment
from proctor.infer.servers.vllm import VllmRecipe
from proctor.interpreters import Command
from proctor.launch.slurm.commands import Commands, Output
from proctor.processes.container import Container
from proctor.worker.assignment import SlurmTerms
from proctor.worker.nodes import step_terms

MODEL = ServedModel(path="/models/big", name="big")
PLACE = Place(
    replica=1,
    port=31000,
    api_key="secret",
    api_key_file=Path("/k"),
    devices=(),
    host="10.0.0.3",
    nodes=2,
    node_rank=NODE_RANK,
    master_port=31001,
)


async def nothing(name: str) -> None:
    pass


TERMS = StepTerms(
    job="42",
    hosts=("n1", "n2", "n3", "n4"),
    addresses=("10.0.0.1", "10.0.0.2", "10.0.0.3", "10.0.0.4"),
    nodes_per_server=2,
    end=nothing,
)


def on_node(command: Command, rank: int, **env: str) -> list[str]:
    """What the node's own part of a step's command makes of it, as it would be run there."""
    inner = command.argv[command.argv.index("/bin/sh") :]
    inner = (*inner[:5], "printf", "%s\\0", *inner[5:])
    done = subprocess.run(
        inner, env={"PATH": os.environ["PATH"], "SLURM_PROCID": str(rank)} | env, capture_output=True, check=True
    )
    return done.stdout.decode().split("\0")[:-1]


def wrap(steps: Steps, argv: tuple[str, ...], replica: int = 0, container: Container | None = None) -> Command:
    return steps.command(
        Command(argv=argv, env={"SLURM_NTASKS": "4", "SLURM_JOB_ID": "42", "X": "y"}),
        replica,
        container=container,
        model=MODEL,
        scratch=Path("/scratch"),
    )


def test_hosts_are_sliced_in_their_order() -> None:
    steps = Steps(TERMS, replicas=1, gpus=8)
    assert [steps.hosts(i) for i in range(steps.replicas)] == [("n1", "n2"), ("n3", "n4")]
    site = steps.site(1)
    assert (site.host, site.nodes) == ("10.0.0.3", 2)
    assert site.port in PORTS
    assert site.master_port in PORTS
    each = Steps(replace(TERMS, nodes_per_server=1), replicas=2, gpus=2)
    assert [each.hosts(i)[0] for i in range(each.replicas)] == ["n1", "n1", "n2", "n2", "n3", "n3", "n4", "n4"]
    with pytest.raises(ConfigError, match="3 GPUs of a server cannot be shared evenly by its 2 nodes"):
        Steps(TERMS, replicas=1, gpus=3)


def test_srun_is_told_everything_and_waits_for_nothing() -> None:
    command = wrap(Steps(TERMS, replicas=1, gpus=0), ("serve",), replica=1)
    words = command.argv[: command.argv.index("/bin/sh")]
    assert words[0] == "srun"
    for word in ("--jobid=42", "--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--nodelist=n3,n4", "--overlap"):
        assert word in words
    assert any(word.startswith("--immediate=") for word in words), "or it would wait for nodes for ever"
    assert command.env == {"SLURM_JOB_ID": "42", "X": "y"}


def test_each_node_knows_itself_and_no_word_is_shell() -> None:
    hostile = "a 'b' \"$(touch /tmp/never)\"\n; *"
    words = ("serve", hostile, f"--rank={NODE_RANK}/{NODE_RANK}", f"{FOLLOWER}--headless", "")
    command = wrap(Steps(TERMS, replicas=1, gpus=0), words)
    assert on_node(command, 0) == ["serve", hostile, "--rank=0/0", ""]
    assert on_node(command, 1) == ["serve", hostile, "--rank=1/1", "--headless", ""]


def test_replicas_share_the_gpus_of_a_node() -> None:
    steps = Steps(replace(TERMS, nodes_per_server=1), replicas=2, gpus=2)
    show = ("sh", "-c", 'echo "$CUDA_VISIBLE_DEVICES $PROCTOR_NODE_RANK $SLURM_PROCID"')
    for replica, devices in ((0, "4,5"), (1, "6,7"), (2, "4,5")):
        command = wrap(steps, show, replica)
        inner = command.argv[command.argv.index("/bin/sh") :]
        done = subprocess.run(
            inner,
            env={"PATH": os.environ["PATH"], "SLURM_PROCID": "0", "CUDA_VISIBLE_DEVICES": "4,5,6,7"},
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout == f"{devices} 0 0\n"


def test_srun_takes_no_options_from_the_batch_step() -> None:
    environ = {"SLURM_NTASKS_PER_NODE": "1", "SLURM_MEM_PER_CPU": "1", "SLURM_CONF": "c", "SLURM_JOB_ID": "1", "A": "b"}
    assert step_environment(environ) == {"SLURM_CONF": "c", "SLURM_JOB_ID": "1", "A": "b"}


def test_a_container_is_inside_the_step_and_pyxis_is_part_of_it() -> None:
    steps = Steps(TERMS, replicas=1, gpus=0)
    command = wrap(steps, ("serve", NODE_RANK), container=Container(type="apptainer", image="/i.sif"))
    assert on_node(command, 1)[:2] == ["apptainer", "exec"]
    assert on_node(command, 1)[-3:] == ["/i.sif", "serve", "1"]
    assert "APPTAINERENV_X" in command.env
    command = wrap(steps, ("serve", NODE_RANK), container=Container(type="pyxis", image="/i.sqsh", args=("--no-home",)))
    words = command.argv[: command.argv.index("/bin/sh")]
    assert "--container-image=/i.sqsh" in words
    assert "--no-home" in words
    assert command.argv.count("srun") == 1


@pytest.mark.parametrize("kind", ["podman", "enroot", "pyxis"])
def test_a_server_in_a_container_is_told_that_there_is_no_hub(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The job's own environment says so, and these kinds pass on only what they are told to."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    command = Command(argv=("serve",), env=dict(os.environ))
    steps = Steps(replace(TERMS, nodes_per_server=1), replicas=1, gpus=0)
    container = Container(type=kind, image="/i")
    for placement in (steps, OnThisMachine(1)):
        words = placement.command(command, 0, container=container, model=MODEL, scratch=Path("/scratch")).argv
        assert "HF_HUB_OFFLINE" in ",".join(words).replace("=", ",").split(",")


def test_vllm_across_nodes() -> None:
    spec = VllmServer(gpus=8, args={"tensor_parallel_size": 4, "pipeline_parallel_size": 2})
    argv = VllmRecipe(spec, MODEL).command(PLACE).argv
    assert argv[2:5] == ("vllm.entrypoints.cli.main", "serve", "/models/big")
    text = " ".join(argv)
    assert f"--nnodes 2 --node-rank {NODE_RANK} --master-addr 10.0.0.3 --master-port 31001" in text
    assert "--tensor-parallel-size 4 --pipeline-parallel-size 2" in text
    assert "--distributed-executor-backend mp" in text
    assert f"{FOLLOWER}--headless" in argv
    assert "secret" not in text


def test_sglang_and_commands_across_nodes() -> None:
    text = " ".join(SglangRecipe(SglangServer(), MODEL).command(PLACE).argv)
    assert f"--nnodes 2 --node-rank {NODE_RANK} --dist-init-addr 10.0.0.3:31001" in text
    spec = CommandServer(argv=("serve", "{host}:{port}", "{node_rank}/{nodes}", "{master_port}", "{server_id}"))
    command = CommandRecipe(spec, MODEL).command(PLACE)
    assert command.argv == ("serve", "10.0.0.3:31000", f"{NODE_RANK}/2", "31001", "1")
    assert (command.env["EH_PORT"], command.env["EH_SERVER_ID"], command.env["PROCTOR_NODES"]) == ("31000", "1", "2")


def test_llamacpp_has_one_node(tmp_path: Path) -> None:
    paths = ServerPaths(logs=tmp_path, scratch=tmp_path)
    with pytest.raises(ConfigError, match="runs on one node, not on 2"):
        build_server(LlamaCppServer(), MODEL, paths=paths, steps=TERMS)


async def test_an_end_that_cannot_be_proved_is_an_error() -> None:
    async def fails(name: str) -> None:
        raise LaunchError(f"{name} does not end")

    steps = Steps(replace(TERMS, end=fails), replicas=1, gpus=0)
    await steps.ended(0)  # never started
    wrap(steps, ("serve",))
    with pytest.raises(ServerError, match=r"of job 42 may still run on n1, n2: proctor-0-\w+ does not end"):
        await steps.ended(0)


def commands(**answers: str) -> Commands:
    def run(argv: object, environment: object, text: str, timeout_s: float) -> Output:
        words = list(argv)  # type: ignore[call-overload]
        return Output(status=0, out=answers[words[2] if words[1] == "show" else words[3]], err="")

    return Commands(runner=run, environ={})


async def test_a_job_with_another_number_of_nodes_is_refused() -> None:
    environ = {"SLURM_JOB_ID": "42", "SLURM_JOB_NUM_NODES": "3", "SLURM_JOB_NODELIST": "n[1-3]"}
    with pytest.raises(LaunchError, match="the job has 3 nodes, but 2 servers with 2 nodes each need 4"):
        await step_terms(SlurmTerms(nodes_per_server=2, servers=2), environ)
    assert await step_terms(SlurmTerms(), {"SLURM_JOB_NUM_NODES": "1"}) is None


async def test_nodes_without_a_name_that_leads_to_them_have_slurms_address() -> None:
    environ = {
        "SLURM_JOB_ID": "42",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "x",
        "CUDA_VISIBLE_DEVICES": "0,1",
    }
    found = await step_terms(
        SlurmTerms(nodes_per_server=2),
        environ,
        commands=commands(hostnames="127.0.0.1\n10.1.2.4\n", node="NodeName=a Arch=x NodeAddr=10.1.2.3 Port=1\n"),
    )
    assert found is not None
    # 127.0.0.1 stands for a node whose own name leads to loopback.
    assert found.addresses == ("10.1.2.3", "10.1.2.4")
    assert found.gpus == ("0", "1")
