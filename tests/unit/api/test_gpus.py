"""`gpus: auto`: what a plan and the workers make of it."""

from __future__ import annotations

import asyncio
import json
import struct
from pathlib import Path
from typing import Any

import pytest
import yaml

from proctor import api
from proctor.api.context import RunContext
from proctor.api.gpus import GpuFinder
from proctor.api.local_workers import local_workers
from proctor.api.presenting import plan_to_json
from proctor.api.shapes import shapes
from proctor.api.targets import resolve_targets
from proctor.config.engines import Engine
from proctor.config.spec import FakeEngine, OpenAIEngine, VllmServer
from proctor.errors import ConfigError, LaunchError
from proctor.launch.local import LocalLauncher
from proctor.report.verbs import plan_table
from proctor.worker.job import Job

from .conftest import Desk, Room

VLLM = {"type": "openai", "server": {"type": "vllm", "gpus": "auto"}}


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CUDA_VISIBLE_DEVICES", "PROCTOR_CLUSTER", "GPUS_PER_NODE", "PROCTOR_GPUS_PER_NODE"):
        monkeypatch.delenv(name, raising=False)


def machine(room: Room, monkeypatch: pytest.MonkeyPatch, *, gpus: int, mebibytes: int | None = None) -> None:
    """A driver that lists so many GPUs; without `mebibytes` it does not say how large they are."""
    program = room.root / "bin" / "nvidia-smi"
    program.parent.mkdir(exist_ok=True)
    rows = "".join(f"echo '{i}, GPU-{i}, {mebibytes or '[N/A]'}'\n" for i in range(gpus))
    listing = "".join(f"echo 'GPU {i}: NVIDIA X (UUID: GPU-{i})'\n" for i in range(gpus))
    program.write_text(f'#!/bin/sh\nif [ "$1" = -L ]; then\n:\n{listing}else\n:\n{rows}fi\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")


def weights(room: Room, *, parameters: int, heads: int) -> None:
    """The model's files: tensors whose shapes say how many parameters there are, and no contents."""
    directory = room.root / "model"
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps({"num_attention_heads": heads, "torch_dtype": "bfloat16"}))
    tensors = {"w": {"dtype": "BF16", "shape": [parameters], "data_offsets": [0, 0]}}
    header = json.dumps(tensors).encode()
    (directory / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)


def run(room: Room, **more: Any) -> Path:
    return room.run([{"native": room.task("t", ["a", "b", "c"])}], **({"engine": VLLM} | more))


def decided(config: Path) -> tuple[int, str, dict[str, Any]]:
    """GPUs of a worker, the reason, and the server's options."""
    (target,) = resolve_targets(RunContext.open(config), None)
    assert isinstance(target.engine, OpenAIEngine) and isinstance(target.engine.server, VllmServer)
    return target.gpus, target.gpus_reason, target.engine.server.args


def test_a_large_model_is_spread_as_its_heads_allow(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(room, monkeypatch, gpus=8)
    weights(room, parameters=70 * 10**9, heads=28)
    gpus, reason, args = decided(run(room))
    assert (gpus, args) == (4, {"tensor-parallel-size": 4})
    assert "70 billion parameters by the headers of its weights" in reason and "28 attention heads" in reason


def test_what_the_files_say_goes_before_the_name(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(room, monkeypatch, gpus=8)
    weights(room, parameters=10**9, heads=16)
    (room.root / "model").rename(room.root / "model-70b")
    gpus, reason, args = decided(run(room, models={"m": {"path": "model-70b"}}))
    assert (gpus, args) == (1, {})
    assert "1 billion parameters by the headers" in reason


def test_known_memory_is_what_counts(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(room, monkeypatch, gpus=8, mebibytes=1)
    weights(room, parameters=10**9, heads=16)
    with (room.root / "model" / "model.safetensors").open("ab") as file:
        file.truncate(2 << 20)
    gpus, reason, _ = decided(run(room))
    assert gpus == 4  # 2 MiB at three quarters of 1 MiB each
    assert "GiB of weights fit into 75% of" in reason


def test_replicas_share_what_there_is(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(room, monkeypatch, gpus=8)
    weights(room, parameters=70 * 10**9, heads=64)
    gpus, _, args = decided(run(room, engine=VLLM | {"server": VLLM["server"] | {"replicas": 2}}))  # type: ignore[operator]
    assert (gpus, args) == (8, {"tensor-parallel-size": 4})


def test_parallelism_that_is_stated_decides(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(room, monkeypatch, gpus=8)
    weights(room, parameters=10**9, heads=16)
    args = {"tensor_parallel_size": 2, "pipeline_parallel_size": 3}
    gpus, reason, found = decided(run(room, engine=VLLM | {"server": VLLM["server"] | {"args": args}}))  # type: ignore[operator]
    assert (gpus, found) == (6, args)
    assert "`args:`" in reason


def test_parallelism_that_is_no_number_is_refused(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(room, monkeypatch, gpus=8)
    weights(room, parameters=10**9, heads=16)
    server = {"type": "vllm", "gpus": "auto", "args": {"tensor_parallel_size": "all"}}
    with pytest.raises(ConfigError, match=r"'all'.*no number"):
        decided(run(room, engine={"server": server}))


def test_a_machine_without_gpus_gets_none(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(room.root))
    weights(room, parameters=70 * 10**9, heads=64)
    gpus, reason, args = decided(run(room))
    assert (gpus, reason, args) == (0, "the nodes have no GPUs", {})


def test_a_cluster_s_profile_says_what_a_node_has(room: Room) -> None:
    weights(room, parameters=70 * 10**9, heads=64)
    launch = {"type": "slurm", "cluster": "leonardo"}
    gpus, reason, _ = decided(run(room, launch=launch))
    assert gpus == 4 and "4 of the 4 GPUs of a node" in reason
    gpus, reason, args = decided(run(room, launch=launch | {"nodes_per_server": 2}))
    assert gpus == 8 and reason.startswith("4 on each of 2 nodes") and args == {"tensor-parallel-size": 8}


def test_a_cluster_that_nobody_knows_is_no_obstacle(room: Room) -> None:
    """Marking on a node whose name fits no profile needs no answer."""
    weights(room, parameters=70 * 10**9, heads=64)
    gpus, reason, _ = decided(run(room, launch={"type": "slurm"}))
    assert gpus == 8 and "usually has" in reason


def test_heads_that_no_spread_divides_are_refused(room: Room) -> None:
    weights(room, parameters=10**9, heads=25)
    with pytest.raises(ConfigError, match=r"each of 2 nodes.*25 attention heads"):
        decided(run(room, launch={"type": "slurm", "cluster": "leonardo", "nodes_per_server": 2}))


@pytest.mark.parametrize("engine", [FakeEngine(), OpenAIEngine(server=VllmServer(gpus=3)), OpenAIEngine()])
def test_what_is_stated_stays(room: Room, engine: Engine) -> None:
    weights(room, parameters=70 * 10**9, heads=64)
    (target,) = resolve_targets(RunContext.open(run(room)), None)
    assert GpuFinder(RunContext.open(run(room))).decide(target.entry, engine) == (engine, "")


async def test_inside_an_event_loop(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(room, monkeypatch, gpus=2)
    weights(room, parameters=70 * 10**9, heads=64)
    assert decided(run(room))[0] == 2


def test_the_plan_says_how_many_and_why(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(room, monkeypatch, gpus=2)
    weights(room, parameters=70 * 10**9, heads=64)
    plan = api.plan(run(room))
    (note,) = [n for n in plan_table(plan).notes if "GPU(s)" in n]
    assert note.startswith("m: 2 GPU(s) for each worker: 70 billion parameters by the headers")
    (model,) = plan_to_json(plan)["models"]
    assert model["gpus"] == 2 and model["gpus_reason"] in note


def test_workers_here_ask_for_them(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(room, monkeypatch, gpus=2)
    weights(room, parameters=70 * 10**9, heads=64)
    desk = Desk.open(run(room))
    desk.context.write_configuration()
    (job,) = local_workers(desk.context, desk.targets[0], workers=1, cost_s=1.0)
    assert job.gpus == 2
    (told,) = [Job.read(p) for p in desk.context.directory.jobs.glob("*.json")]
    assert told.engine["server"]["gpus"] == 2
    assert told.engine["server"]["args"] == {"tensor-parallel-size": 2}

    async def refused() -> None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
        async with await LocalLauncher.open(desk.context.spec.launch) as launcher:  # type: ignore[arg-type]
            await launcher.submit([job])

    with pytest.raises(LaunchError, match="wants 2 GPUs; this machine offers 1"):
        asyncio.run(refused())


def test_jobs_of_a_cluster_ask_for_them(room: Room) -> None:
    weights(room, parameters=70 * 10**9, heads=64)
    desk = Desk.open(run(room, launch={"type": "slurm", "cluster": "leonardo", "nodes_per_server": 2}))
    (shape,) = shapes(desk.context, desk.targets, desk.plan().models, {})
    assert (shape.gpus, shape.settings.nodes) == (4, 2)


def test_only_numbers_and_auto(room: Room) -> None:
    config = run(room)
    text = yaml.safe_load(config.read_text())
    text["engine"]["server"]["gpus"] = "all"
    config.write_text(yaml.safe_dump(text))
    with pytest.raises(ConfigError, match="gpus"):
        RunContext.open(config)
