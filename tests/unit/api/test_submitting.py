"""What a submission makes of a plan, given what the cluster said; nothing is sent."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, cast

import pytest

from proctor import api
from proctor.api import submitting
from proctor.api.progress import Progress
from proctor.api.submitting import Site, SubmitOutcome
from proctor.errors import ProctorError
from proctor.launch.slurm.cluster import Node, Partition
from proctor.launch.slurm.scheduler import SlurmScheduler

from .conftest import Room

NODE = Node(name="n1", state="idle", cpus=8, memory_mb=1000, gpus=0, gpus_used=0, gpu_types=())
MAIN = Partition(
    name="main",
    default=True,
    state="UP",
    max_time_s=None,
    default_time_s=None,
    max_nodes=None,
    preempt_mode="OFF",
    nodes=(NODE,),
)


@pytest.fixture(autouse=True)
def cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty cluster of one node without limits."""

    async def look(progress: Progress) -> Site:
        return Site(scheduler=cast("SlurmScheduler", None), queue=(), partitions=(MAIN,))

    monkeypatch.setattr(submitting, "look", look)


def long_run(room: Room, plan: dict[str, Any], minutes: int) -> Path:
    """A task of 200 requests of 10 s each, under a limit of so many minutes."""
    task = room.task("t", [str(n) for n in range(200)], generation={"max_gen_toks": 14_286})
    launch = {"type": "slurm", "cluster": "generic", "workers": 2, "time_limit": minutes}
    return room.run([{"native": task}], plan=plan, launch=launch)


def dry(config: Path) -> SubmitOutcome:
    return asyncio.run(api.submit(config, dry_run=True))


def test_a_task_that_does_not_fit_its_job_is_cut(room: Room) -> None:
    found = dry(long_run(room, {"strategy": "naive"}, 20))
    (model,) = found.plan.models
    assert model.cost_s == pytest.approx(2000, rel=0.01)
    assert len(model.shards) == 2  # of what 20 minutes leave
    assert model.largest_shard_s < 1200
    (warning,) = found.warnings
    assert "plan.strategy naive: shards of 2002 s do not fit the time limit" in warning


@pytest.mark.parametrize("strategy", ["naive", "size"])
def test_a_task_that_fits_stays_whole(room: Room, strategy: str) -> None:
    found = dry(long_run(room, {"strategy": strategy}, 120))
    assert len(found.plan.models[0].shards) == 1
    assert found.warnings == ()


def test_a_request_that_does_not_fit_is_refused(room: Room) -> None:
    task = room.task("t", ["a"], generation={"max_gen_toks": 1_000_000})
    launch = {"type": "slurm", "cluster": "generic", "workers": 1, "time_limit": 10}
    with pytest.raises(ProctorError, match="too short"):
        dry(room.run([{"native": task}], plan={"strategy": "naive"}, launch=launch))
