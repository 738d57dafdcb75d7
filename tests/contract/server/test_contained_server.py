"""A server inside a container, which here is a program that does what a container's would and writes down its words."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

import aiohttp
import pytest

from proctor.config.spec import CommandServer, LlamaCppServer, VllmServer
from proctor.infer.server import ServedModel, ServerPaths
from proctor.infer.servers.build import build_server
from proctor.infer.servers.launched import Place
from proctor.infer.servers.vllm import VllmRecipe
from proctor.processes.container import Bind, Container

CONTAINER = Container(type="charliecloud", image="/images/x y", binds=(Bind(source="/data", target="/in"),))
FAKE = """#!/bin/sh
printf '%s\\n' "$@" > {words}
while [ "$1" != -- ]; do shift; done
shift
exec "$@"
"""


@pytest.fixture
def words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the container's program writes the words that it was given."""
    tools, words = tmp_path / "tools", tmp_path / "words"
    tools.mkdir()
    (tools / "ch-run").write_text(FAKE.format(words=shlex.quote(str(words))))
    (tools / "ch-run").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    return words


async def test_a_contained_server_serves_and_sees_its_model(
    tmp_path: Path, mini, paths: ServerPaths, words: Path
) -> None:
    model = tmp_path / "snapshot of 'a' $(model)"
    blobs = tmp_path / "blobs"
    model.mkdir()
    blobs.mkdir()
    (blobs / "1").write_text("{}")
    (model / "config.json").symlink_to(blobs / "1")
    spec: CommandServer = mini()
    async with build_server(spec, ServedModel(path=str(model)), paths=paths, container=CONTAINER) as server:
        backend = server.backends[0]
        async with aiohttp.ClientSession() as session, session.get(f"{backend.url}/health") as reply:
            assert reply.status == 200
        seen = words.read_text().splitlines()
    assert seen[:2] == ["--bind", "/data:/in"]
    for place in (model, blobs, paths.scratch):
        assert f"{place}:{place}" in seen
    assert seen[seen.index("--") - 1] == "/images/x y"
    assert backend.api_key is not None
    assert backend.api_key not in words.read_text()


def place(*, inside: bool) -> Place:
    return Place(replica=2, port=1, api_key="k", api_key_file=Path("/k"), devices=(), inside=inside)


def test_the_interpreter_of_an_image_is_not_looked_for_here() -> None:
    recipe = VllmRecipe(VllmServer(python="/only/in/the/image/python"), ServedModel(path="/m"))
    assert recipe.command(place(inside=True)).argv[0] == "/only/in/the/image/python"
    recipe = VllmRecipe(VllmServer(), ServedModel(path="/m"))
    assert recipe.command(place(inside=True)).argv[0] == "python3"
    assert recipe.command(place(inside=False)).argv[0] == sys.executable


def test_llamacpp_stays_outside(paths: ServerPaths, gguf: Path) -> None:
    server = build_server(LlamaCppServer(), ServedModel(path=str(gguf)), paths=paths, container=CONTAINER)
    assert server._container is None


async def test_commands_written_for_eval_hive_find_their_variables(paths: ServerPaths, mini_script: Path) -> None:
    line = (
        f'test "$EH_SERVER_ID" = 0 && exec {shlex.quote(sys.executable)} {shlex.quote(str(mini_script))} '
        '--port "$EH_PORT" --model "$EH_MODEL_PATH" --name "$PROCTOR_NAME" --key-file "$PROCTOR_API_KEY_FILE"'
    )
    async with build_server(CommandServer(shell=line), ServedModel(path="/m"), paths=paths) as server:
        assert server.backends
