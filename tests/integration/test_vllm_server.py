"""A real vLLM (CPU build): start, key, identity, death of its engine process, errors with hints."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path

import aiohttp
import psutil
import pytest

from proctor.config.spec import VllmServer
from proctor.errors import ServerError
from proctor.infer.server import Backend, ServedModel, ServerPaths
from proctor.infer.servers.build import build_server

PYTHON = os.environ.get("PROCTOR_VLLM_PYTHON") or None
MODELS = os.environ.get("PROCTOR_TEST_MODELS")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        PYTHON is None or MODELS is None, reason="PROCTOR_VLLM_PYTHON and PROCTOR_TEST_MODELS are not set"
    ),
]


@pytest.fixture
def paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ServerPaths:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    return ServerPaths(logs=tmp_path / "logs", scratch=tmp_path / "scratch")


@pytest.fixture
def model() -> ServedModel:
    return ServedModel(path=str(Path(MODELS or "") / "tiny"), name="tiny $(model)")


async def complete(backend: Backend, key: str | None) -> int:
    body = {"model": backend.served_model, "prompt": "Hi", "max_tokens": 3, "temperature": 0}
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{backend.url}/v1/completions", json=body, headers=headers) as response,
    ):
        return response.status


def family() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)


@pytest.mark.timeout(600)
async def test_vllm_answers_survives_the_death_of_its_engine_and_leaves_nothing(
    paths: ServerPaths, model: ServedModel
) -> None:
    args = {"dtype": "float32", "max_model_len": 256, "enforce_eager": True}
    async with build_server(VllmServer(python=PYTHON, args=args, restarts=1), model, paths=paths) as server:
        assert server.info.engine == "vllm"
        assert server.info.version[0].isdigit()
        assert server.info.dtype == "float32"
        backend = server.backends[0]
        assert backend.served_model == model.name
        assert await complete(backend, None) == 401
        assert await complete(backend, backend.api_key) == 200
        # The engine is a process of its own: the API process outlives it for a while.
        engine = next(process for process in family() if "EngineCore" in " ".join(process.cmdline()))
        engine.send_signal(signal.SIGKILL)
        deadline = time.monotonic() + 240
        while server.backends[0] == backend:
            assert time.monotonic() < deadline, "the death of the engine was not noticed"
            await server.ensure()
            await asyncio.sleep(0.5)
        assert await complete(server.backends[0], backend.api_key) == 200
        started = family()
        assert backend.api_key is not None
        assert not any(backend.api_key in " ".join(process.cmdline()) for process in started)
    assert not [process for process in started if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
    assert not any(backend.api_key in log.read_text() for log in paths.logs.iterdir())


@pytest.mark.parametrize(
    ("args", "hint"),
    [
        ({"max_model_len": 999_999}, "lower max_model_len"),
        ({"no_such_option": 1}, "not one of its options"),
        ({"tensor_parallel_size": 5}, "tensor_parallel_size"),
    ],
)
async def test_vllm_failures_have_hints(paths: ServerPaths, model: ServedModel, args: dict, hint: str) -> None:
    with pytest.raises(ServerError) as caught:
        async with build_server(VllmServer(python=PYTHON, args=args), model, paths=paths):
            raise AssertionError("it started")
    assert caught.value.state == "failed"
    assert hint in str(caught.value.hint), caught.value.message
