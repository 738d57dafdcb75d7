"""The container of a job survives the job's file."""

from __future__ import annotations

from pathlib import Path

import pytest

from proctor.errors import StoreError
from proctor.processes.container import Bind, Container
from proctor.worker.job import Job

CONTAINER = Container(
    type="apptainer", image="/i m.sif", args=("--nv",), binds=(Bind(source="/a", target="/b", read_only=True),)
)


def job(container: Container | None) -> Job:
    return Job(
        run="r",
        run_directory="/r",
        store="/s",
        model="m",
        display_name="m",
        weights="w",
        resolution="x",
        engine={"type": "fake"},
        path="/m",
        served_model="m",
        container=container,
    )


@pytest.mark.parametrize("container", [None, CONTAINER])
def test_the_container_survives_the_file(tmp_path: Path, container: Container | None) -> None:
    job(container).write(tmp_path / "job.json")
    assert Job.read(tmp_path / "job.json") == job(container)


def test_a_file_without_a_container_that_can_be_is_no_job(tmp_path: Path) -> None:
    path = tmp_path / "job.json"
    job(CONTAINER).write(path)
    path.write_text(path.read_text().replace('"binds"', '"blinds"'))
    with pytest.raises(StoreError, match="cannot read the job file"):
        Job.read(path)
