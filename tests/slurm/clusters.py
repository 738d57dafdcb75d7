"""Which clusters the tests use, and what happens where there can be none."""

from __future__ import annotations

import hashlib
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from .cluster import Cluster, exclusive
from .layout import ClusterError, Shape
from .packages import obstacle

REQUIRED = "PROCTOR_REQUIRE_SLURM"
"""Set to 1 where a machine without Slurm is a failure and not a reason to skip."""


def serve(name: str, shape: Shape) -> Iterator[Cluster]:
    """A cluster of this checkout for one test session; what an earlier session left behind is taken down first."""
    reason = obstacle(accounting=shape.accounting)
    if reason is not None:
        if os.environ.get(REQUIRED) == "1":
            pytest.fail(f"{REQUIRED}=1, but {reason}", pytrace=False)
        pytest.skip(reason)
    checkout = hashlib.sha256(str(Path(__file__).resolve()).encode()).hexdigest()[:8]
    # Workers of one session that both need a cluster get one each; two sessions over one checkout take turns.
    worker = os.environ.get("PYTEST_XDIST_WORKER", "one")
    directory = Path(tempfile.gettempdir()) / f"proctor-slurm-{checkout}-{name}-{worker}"
    with exclusive(directory.with_name(directory.name + ".session")):
        cluster = Cluster(directory)
        cluster.down()
        try:
            bring_up(cluster, shape)
            yield cluster
        finally:
            cluster.down()


def bring_up(cluster: Cluster, shape: Shape) -> None:
    """Skips, by name, where the packages cannot be had or the kernel refuses what the nodes are made of."""
    try:
        cluster.up(shape)
    except (ClusterError, OSError, subprocess.SubprocessError) as error:
        if os.environ.get(REQUIRED) == "1":
            raise
        pytest.skip(f"a Slurm cluster could not be brought up here: {str(error)[-300:]}")
