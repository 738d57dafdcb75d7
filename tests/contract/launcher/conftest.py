"""A cluster of one node for the launcher that needs one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ...slurm.cluster import Cluster
from ...slurm.clusters import serve
from ...slurm.layout import Shape


@pytest.fixture(scope="session")
def one_node_cluster() -> Iterator[Cluster]:
    yield from serve("launcher", Shape(nodes=1, gpus=1, cpus=16))


@pytest.fixture
def one_node(one_node_cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    """Sixteen CPUs and one GPU, with nothing running."""
    one_node_cluster.reset()
    for name, value in one_node_cluster.env().items():
        monkeypatch.setenv(name, value)
    return one_node_cluster
