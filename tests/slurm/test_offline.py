"""Nodes without a network: nothing on them tries to reach anything outside the cluster, or to ask a name server."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import pytest

from proctor.interpreters import OFFLINE

from .cluster import Cluster
from .lab import WORKER, SlurmLab
from .watcher import Watched, watching

GGUF = os.environ.get("PROCTOR_TEST_GGUF", "")
HARNESS = os.environ.get("PROCTOR_LM_EVAL_PYTHON", "")
MODELS = os.environ.get("PROCTOR_TEST_MODELS", "")
WORDS = [f"word{i:03d}" for i in range(6)]
TALKS = """
import contextlib, socket
with contextlib.suppress(OSError):
    socket.getaddrinfo("huggingface.co", 443)
for address in (("192.0.2.99", 443), ("203.0.113.7", 8080)):
    with contextlib.suppress(OSError):
        socket.create_connection(address, timeout=0.3)
"""


@pytest.fixture
def lab(slurm: Cluster, tmp_path: Path, own_cache: Path) -> SlurmLab:
    return SlurmLab(root=tmp_path, cluster=slurm)


@pytest.fixture
def watched(lab: SlurmLab) -> Iterator[list[Watched]]:
    """Every node."""
    place = lab.cluster._place()
    with ExitStack() as stack:
        yield [
            stack.enter_context(watching(place.namespace(node), f"{place.network}.0/24", lab.root / f"{node}.packets"))
            for node in lab.cluster.nodes
        ]


def test_the_watcher_sees_what_a_job_sends(lab: SlurmLab, watched: list[Watched]) -> None:
    """Or the test below would prove nothing."""
    environ = "ALL,RES_OPTIONS=timeout:1 attempts:1"
    lab.cluster.run("srun", "--nodelist=n2", f"--export={environ}", sys.executable, "-c", TALKS, timeout=120)
    sent = watched[1].sent()
    assert any(line.endswith(" 53") for line in sent), sent
    assert {"6 192.0.2.99 443", "6 203.0.113.7 8080"} <= set(sent)
    assert [w.sent() for n, w in enumerate(watched) if n != 1] == [[], [], []]


def _llamacpp(lab: SlurmLab) -> dict[str, Any]:
    if not GGUF:
        pytest.skip("PROCTOR_TEST_GGUF is not set")
    engine = {"type": "openai", "server": {"type": "llama.cpp", "context": 512}, "max_in_flight": 2}
    return {"models": {"m": {"path": GGUF}}, "engine": engine}


def _lm_eval(lab: SlurmLab) -> dict[str, Any]:
    if not HARNESS or not MODELS:
        pytest.skip("PROCTOR_LM_EVAL_PYTHON and PROCTOR_TEST_MODELS are not set")
    engine = {"type": "lm_eval", "model": "hf", "python": HARNESS, "device": "cpu"}
    return {"models": {"m": {"path": str(Path(MODELS) / "tiny")}}, "engine": engine}


def _fake(lab: SlurmLab) -> dict[str, Any]:
    return {}


@pytest.mark.parametrize(
    ("made", "module"),
    [
        (_fake, "proctor.testing.server"),
        (_llamacpp, "proctor.infer.servers.llamacpp_main"),
        (_lm_eval, "proctor.infer.lm_eval_host"),
    ],
    ids=["command", "llama.cpp", "lm_eval"],
)
def test_nothing_is_sent_outside_the_cluster(lab: SlurmLab, watched: list[Watched], made: Any, module: str) -> None:
    tasks = [lab.write_task("said", WORDS), lab.write_task("chosen", WORDS, output="multiple_choice")]
    config = lab.write_sweep(tasks=tasks, launch={"workers": 1, "scoring": {"enabled": True}}, shards=2, **made(lab))
    lab.run("prepare", str(config))
    lab.run("submit", str(config))
    told: dict[str, set[str | None]] = {}

    def seen() -> bool:
        """Collects what worker and server are told about the hub, while they live."""
        for node in lab.cluster.nodes:
            for process in (psutil.Process(pid) for pid in lab.cluster.node_pids(node) if psutil.pid_exists(pid)):
                try:
                    mine = {WORKER, module} & set(process.cmdline())
                    environ = process.environ() if mine else {}
                except psutil.Error:
                    continue
                if environ:
                    told.setdefault(mine.pop(), set()).update(environ.get(name) for name in OFFLINE)
        return not lab.queue()

    lab.wait(seen)
    print(lab.story())
    assert lab.endings() == {"done": 1}
    assert {(task, n) for task, _, value, n in lab.scored() if value is not None} == {("said", 6), ("chosen", 6)}
    assert told == {WORKER: {"1"}, module: {"1"}}
    assert {w.namespace: w.sent() for w in watched} == {w.namespace: [] for w in watched}
