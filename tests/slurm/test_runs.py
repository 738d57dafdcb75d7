"""Runs from `prepare` to scores with one `submit`, and what `submit` does when it is repeated, refused or limited."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from ..integration.conftest import Lab, write_model
from .cluster import Cluster
from .lab import SlurmLab

FULL = "PROCTOR_CHAOS_SLURM" in os.environ
CHECKPOINTS = 6 if FULL else 2
WORDS = [f"word{i:03d}" for i in range(8)]


@pytest.fixture
def lab(slurm: Cluster, tmp_path: Path, own_cache: Path) -> SlurmLab:
    """An empty lab on the plain cluster."""
    return SlurmLab(root=tmp_path, cluster=slurm)


def write_models(root: Path) -> dict[str, Any]:
    """Two models and one training run, each with weights of its own."""
    for name in ("a", "b", *(f"train/step_{n}" for n in range(CHECKPOINTS))):
        (root / name).mkdir(parents=True)
        write_model(root / name, weights=name.encode().rjust(16, b"."))
    steps = {"pattern": "step_{step}"}
    return {
        "a": {"path": str(root / "a")},
        "b": {"path": str(root / "b")},
        "train": {"path": str(root / "train"), "checkpoints": steps},
    }


def write_tasks(lab: Lab, number: int = 4, words: list[str] = WORDS) -> list[Path]:
    kinds = ["generate", "multiple_choice"]
    return [lab.write_task(f"t{i}", [f"{w}-{i}" for w in words], output=kinds[i % 2]) for i in range(number)]


def test_a_sweep_equals_the_local_launcher(lab: SlurmLab) -> None:
    """Models and checkpoints over four tasks: prepare, one submit, and the scores are there when the queue is empty."""
    models = write_models(lab.root)
    # Each model answers differently: its weights are what the fake server is told.
    lab.server_flags = ["--weights", "{model}"]
    config = lab.write_sweep(tasks=write_tasks(lab), models=models, launch={"workers": 4}, gpus=1, shards=2)
    lab.run("prepare", str(config))
    sent = lab.run("submit", str(config))
    assert "sent:" in sent.stdout
    lab.wait_idle()
    print(lab.story())
    report = json.loads((lab.root / "runs" / "run" / "report" / "scores.json").read_text())
    assert len({(r["model"], r["label"]) for r in report}) == 2 + CHECKPOINTS
    assert lab.endings() == {"done": len(lab.attempts())}
    assert all(r["n"] == len(WORDS) for r in report)
    assert (lab.root / "runs" / "run" / "report" / "scores.json").exists()

    here = Lab(root=lab.root / "here", server_flags=lab.server_flags, latency_s=0.0)
    here.root.mkdir()
    local = here.write_run(tasks=write_tasks(here), models=models, launch={"type": "local", "max_workers": 2})
    here.run("run", str(local))
    assert scores_of(lab, config) == scores_of(here, local)


def scores_of(lab: Lab, config: Path) -> list[tuple[Any, ...]]:
    rows = json.loads(lab.run("score", str(config), "--json").stdout)["rows"]
    return [(r["model"], r["label"], r["step"], r["task"], r["metric"], r["value"], r["n"]) for r in rows]
