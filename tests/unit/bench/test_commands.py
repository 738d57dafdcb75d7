"""What the benchmarks run is what Proctor takes."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
from bench import overhead
from bench.commands import write_run
from bench.documents import write_documents

from proctor.config.load import load_run
from proctor.config.spec import OpenAIEngine

URL = "http://localhost:1"


@pytest.mark.parametrize("chat", [False, True])
def test_the_run_of_whole_commands_is_valid(tmp_path: Path, chat: bool) -> None:
    write_documents(tmp_path, 3)
    spec = load_run(write_run(tmp_path, tmp_path, URL, chat=chat, in_flight=64, workers=2, processes=3))
    assert isinstance(spec.engine, OpenAIEngine)
    assert (spec.engine.max_in_flight, spec.engine.client_processes, spec.launch.workers) == (32, 3, 2)


@pytest.mark.parametrize("route", ["chat", "completions"])
def test_the_run_whose_steps_are_measured_is_valid(tmp_path: Path, route: str) -> None:
    directory = tmp_path / "run-0"
    *_, path = overhead.prepare(directory, URL, argparse.Namespace(samples=3, route=route, in_flight=7))
    spec = load_run(path)
    assert isinstance(spec.engine, OpenAIEngine)
    assert spec.engine.max_in_flight == 7
