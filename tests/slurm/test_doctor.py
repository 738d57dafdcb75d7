"""`doctor` tries each model where it would run, with the GPUs that it would have there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ..integration.conftest import write_model
from .cluster import Cluster
from .lab import SlurmLab

WORDS = [f"word{i}" for i in range(6)]


@pytest.fixture
def lab(slurm: Cluster, tmp_path: Path, own_cache: Path) -> SlurmLab:
    """An empty lab on the plain cluster."""
    return SlurmLab(root=tmp_path, cluster=slurm)


def test_a_model_of_the_cluster_and_one_of_this_machine(lab: SlurmLab) -> None:
    models = {
        "away": {"path": str(write_model(lab.root / "away", weights=b"away")), "engine": {"server": {"gpus": "auto"}}},
        "here": {"path": str(write_model(lab.root / "here", weights=b"here")), "launch": {"type": "local"}},
    }
    config = lab.write_sweep(tasks=[lab.write_task("t", WORDS)], models=models, shards=1)
    found = json.loads(lab.run("doctor", str(config), "--json").stdout)
    assert found["healthy"], found
    here, away = [f["said"] for f in found["findings"] if f["what"] == "trial"]
    assert here.startswith("here: 4 requests answered")
    assert "4 requests answered, away" in away
    told = json.loads((lab.root / "runs" / "run" / "jobs" / "away.json").read_text())
    assert told["engine"]["server"]["gpus"] == 1
    (script,) = (lab.root / "runs" / "run" / "assignments").glob("doctor-*.sh")
    assert "#SBATCH --gres=gpu:1" in script.read_text()
