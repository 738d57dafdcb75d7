"""The clusters that the Slurm tests share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from .cluster import Cluster
from .clusters import serve
from .layout import Shape

_HERE = Path(__file__).parent


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All of this directory needs the cluster, and one worker runs all of it, so that there is only one."""
    for item in items:
        if item.path.is_relative_to(_HERE):
            item.add_marker(pytest.mark.slurm)
            item.add_marker(pytest.mark.xdist_group("slurm"))


@pytest.fixture(scope="session")
def slurm_cluster() -> Iterator[Cluster]:
    """Four nodes with four GPUs each, no accounting: what some sites offer, and the harder case."""
    yield from serve("plain", Shape())


@pytest.fixture
def slurm(slurm_cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """The cluster with nothing running on it, and the environment that leads to it."""
    yield from _entered(slurm_cluster, monkeypatch)


@pytest.fixture(scope="session")
def slurm_accounting_cluster() -> Iterator[Cluster]:
    """Two nodes, with slurmdbd, accounts and QOS limits."""
    yield from serve("accounting", Shape(nodes=2, accounting=True))


@pytest.fixture
def slurm_accounting(slurm_accounting_cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """As `slurm`, with accounting: QOS `small` allows 4 submitted jobs a user, account `limited` 3."""
    yield from _entered(slurm_accounting_cluster, monkeypatch)


def _entered(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    cluster.reset()
    for name, value in cluster.env().items():
        monkeypatch.setenv(name, value)
    yield cluster
