"""What `doctor` finds out by a trial on this machine, and on whose terms it tries."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import yaml

from proctor import api
from proctor.api.cluster_profiles import resolve_clusters
from proctor.api.context import RunContext
from proctor.api.doctoring import REQUESTS

from .conftest import Desk, Room

WORDS = ["a", "b", "c", "d", "e", "f"]


def with_second_model(room: Room, config: Path, **entry: Any) -> None:
    """Add a model `other` whose weights are its own."""
    (room.root / "other").mkdir()
    (room.root / "other" / "pytorch_model.bin").write_bytes(b"other weights")
    text = yaml.safe_load(config.read_text())
    text["models"]["other"] = {"path": str(room.root / "other"), **entry}
    config.write_text(yaml.safe_dump(text))


def test_a_trial_asks_each_model_a_few_requests_and_keeps_the_answers(room: Room) -> None:
    config = room.run([{"native": room.task("t", WORDS)}])
    found = asyncio.run(api.doctor(config))
    assert found.healthy, found.findings
    (trial,) = [f for f in found.findings if f.what == "trial"]
    assert f"{REQUESTS} requests answered" in trial.said
    assert Desk.open(config).plan().owed == len(WORDS) - REQUESTS


def test_a_trial_takes_one_shard(room: Room) -> None:
    strategy = {"strategy": "workers", "num_worker": 3, "num_split": 3, "min_task_size": 1, "split": True}
    config = room.run([{"native": room.task("t", WORDS)}], plan=strategy)
    (trial,) = [f for f in asyncio.run(api.doctor(config)).findings if f.what == "trial"]
    assert "m: 2 requests answered" in trial.said
    assert Desk.open(config).plan().owed == len(WORDS) - 2


def test_a_trial_is_launched_as_the_models_own_launch_says(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    config = room.run([{"native": room.task("t", WORDS)}])
    with_second_model(room, config, launch={"gpus": [7]})
    found = asyncio.run(api.doctor(config))
    own, other = [f for f in found.findings if f.what == "trial"]
    assert own.state == "ok"
    assert other.state == "failed" and "other: launch.gpus: no GPU 7" in other.said
    assert not found.healthy


def test_a_cluster_is_looked_at_for_each_model_that_names_one(room: Room) -> None:
    config = room.run([{"native": room.task("t", WORDS)}])
    assert resolve_clusters(RunContext.open(config)) == []
    with_second_model(room, config, launch={"type": "slurm", "cluster": "generic", "partition": "long"})
    (one,) = resolve_clusters(RunContext.open(config), environ={})
    assert (one.profile.name, one.settings.partition) == ("generic", "long")
