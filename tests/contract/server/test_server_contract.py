"""What every server keeps: the same suite over a command, the real llama.cpp, and an endpoint."""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp
import psutil
import pytest

from proctor.config.spec import CommandServer, EndpointServer, LlamaCppServer
from proctor.errors import ServerError
from proctor.infer.server import Backend, ServedModel, Server, ServerPaths
from proctor.infer.servers.build import build_server
from proctor.infer.servers.launched import LaunchedServer
from proctor.infer.servers.ports import PortFinder
from proctor.processes.group import ProcessGroup

HOSTILE = "a 'model' \"of\" $(touch never)\n{mine} ü; *"


async def models(backend: Backend, key: str | None) -> int:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    async with (
        aiohttp.ClientSession() as session,
        session.get(f"{backend.url}/v1/models", headers=headers) as response,
    ):
        return response.status


async def refuses(backend: Backend, key: str | None) -> bool:
    """Whether a question under this key is turned away for the key's sake."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{backend.url}/v1/completions", json={"model": "none"}, headers=headers) as response,
    ):
        return response.status == 401


def listens(url: str) -> bool:
    parts = urlsplit(url)
    with socket.socket() as probe:
        return probe.connect_ex((parts.hostname, parts.port)) == 0


def processes(server: LaunchedServer) -> list[psutil.Process]:
    return [process for pid in server.pids for process in psutil.Process(pid).children(recursive=True)]


@pytest.fixture
async def running(mini_script: Path, tmp_path: Path) -> AsyncIterator[str]:
    """Somebody else's server."""
    port = PortFinder().find()
    (tmp_path / "key").write_text("sesame")
    argv = [sys.executable, str(mini_script), "--port", str(port), "--key-file", str(tmp_path / "key")]
    group = await ProcessGroup.start([*argv, "--name", HOSTILE], env=os.environ, log=tmp_path / "running.log")
    while not listens(f"http://127.0.0.1:{port}"):
        await asyncio.sleep(0.02)
    yield f"http://127.0.0.1:{port}"
    await group.stop()


def launched(kind: str, request: pytest.FixtureRequest, paths: ServerPaths, tmp_path: Path, **fields) -> LaunchedServer:
    if kind == "llama.cpp":
        path = tmp_path / f"{HOSTILE}.gguf"
        path.symlink_to(request.getfixturevalue("gguf"))
        spec = LlamaCppServer(slots=1, context=256, threads=1, **fields)
    else:
        path = tmp_path / HOSTILE
        spec = request.getfixturevalue("mini")("--child", **fields)
    server = build_server(spec, ServedModel(path=str(path), name=HOSTILE), paths=paths)
    assert isinstance(server, LaunchedServer)
    return server


SHELL = (
    f'exec "{sys.executable}" -W ignore -m proctor.testing.server --port $PROCTOR_PORT --served-model "$PROCTOR_NAME"'
    ' --api-key "$(cat "$PROCTOR_API_KEY_FILE")"'
)


@pytest.fixture(params=["command", "shell", "llama.cpp", "endpoint"])
def server(request: pytest.FixtureRequest, paths: ServerPaths, tmp_path: Path) -> Server:
    if request.param == "endpoint":
        url = request.getfixturevalue("running")
        model = ServedModel(path=f"{url}/v1/", name=HOSTILE)
        return build_server(EndpointServer(), model, paths=paths, api_key="sesame")
    if request.param == "shell":
        return build_server(CommandServer(shell=SHELL), ServedModel(path="/m", name=HOSTILE), paths=paths)
    return launched(request.param, request, paths, tmp_path)


Started = Callable[..., LaunchedServer]


@pytest.fixture(params=["command", "llama.cpp"])
def started(request: pytest.FixtureRequest, paths: ServerPaths, tmp_path: Path) -> Started:
    return lambda **fields: launched(request.param, request, paths, tmp_path, **fields)


async def test_backends_answer_to_their_key_and_to_no_other(server: Server) -> None:
    async with server:
        for backend in server.backends:
            assert not backend.url.endswith(("/", "/v1"))
            assert backend.served_model == HOSTILE
            assert await models(backend, backend.api_key) == 200
            assert not await refuses(backend, backend.api_key)
            assert await refuses(backend, "wrong")
            assert await refuses(backend, None)
            assert backend.api_key is not None
            assert backend.api_key not in repr(backend)


async def test_a_made_key_is_no_option(paths: ServerPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command may take it as an argument; in base 64 these bytes begin with a dash."""
    monkeypatch.setattr(secrets, "token_bytes", lambda count: b"\xf8" * count)
    async with build_server(CommandServer(shell=SHELL), ServedModel(path="/m", name=HOSTILE), paths=paths) as server:
        assert await models(server.backends[0], server.backends[0].api_key) == 200


async def test_ensure_leaves_alone_what_is_well(server: Server) -> None:
    async with server:
        before = server.backends
        assert before
        await server.ensure()
        assert server.backends == before


async def test_info_names_what_answers(server: Server) -> None:
    async with server:
        assert server.info.engine in ("command", "llama.cpp", "openai")
        assert server.info.version not in ("", "unknown")
        assert len(server.info.id) == 16


async def test_nothing_is_left_after_leaving(started: Started) -> None:
    async with started(replicas=2) as server:
        assert len({backend.url for backend in server.backends}) == 2
        urls, family = [backend.url for backend in server.backends], processes(server)
        assert len(family) >= 2
    assert not [process for process in family if process.is_running()]
    assert not any(listens(url) for url in urls)
    assert server.backends == ()


async def test_the_key_is_in_no_command_line_and_in_no_log(started: Started, paths: ServerPaths) -> None:
    async with started() as server:
        key = server.backends[0].api_key
        assert key is not None
        pids = [psutil.Process(pid) for pid in server.pids]
        for process in [*pids, *processes(server)]:
            assert key not in " ".join(process.cmdline())
        files = [path for path in paths.scratch.iterdir()]
        assert all(path.stat().st_mode & 0o077 == 0 for path in files)
    for log in paths.logs.iterdir():
        assert key not in log.read_text()
    assert not list(paths.scratch.iterdir())


async def test_what_died_is_started_again_within_the_budget(started: Started, paths: ServerPaths) -> None:
    async with started(restarts=1) as server:
        processes(server)[0].send_signal(signal.SIGKILL)
        await asyncio.sleep(0.2)
        await server.ensure()
        backend = server.backends[0]
        assert await models(backend, backend.api_key) == 200
        processes(server)[0].send_signal(signal.SIGKILL)
        await asyncio.sleep(0.2)
        with pytest.raises(ServerError, match="died: it ended with exit status 137; its 1 restarts are spent") as error:
            await server.ensure()
        assert error.value.state == "died"
        assert error.value.log is not None
        assert Path(error.value.log).parent == paths.logs


async def test_cancelled_while_starting_leaves_nothing(started: Started) -> None:
    server = started()

    async def hold() -> None:
        async with server:
            await asyncio.sleep(600)

    task = asyncio.create_task(hold())
    while not (server.pids and processes(server)):
        await asyncio.sleep(0.005)
    family = processes(server)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not [process for process in family if process.is_running()]
