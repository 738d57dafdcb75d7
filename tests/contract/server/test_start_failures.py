"""Start-up that goes wrong: the state, the hint, the log, and nothing left running."""

from __future__ import annotations

import asyncio
import socket
import sys
from pathlib import Path

import psutil
import pytest

from proctor.config.spec import CommandServer, EndpointServer, LlamaCppServer, VllmServer
from proctor.errors import ConfigError, MissingTool, ServerError
from proctor.infer.server import ServedModel, ServerPaths
from proctor.infer.servers.build import build_server
from proctor.infer.servers.command import CommandRecipe
from proctor.infer.servers.health import StartLimits
from proctor.infer.servers.launched import LaunchedServer
from proctor.infer.servers.ports import PortFinder

MODEL = ServedModel(path="/models/m", name="m")


def watched(spec: CommandServer, paths: ServerPaths, limits: StartLimits) -> LaunchedServer:
    return LaunchedServer(CommandRecipe(spec, MODEL), spec, MODEL, paths=paths, limits=limits)


async def failure(server) -> ServerError:
    before = set(psutil.Process().children())
    with pytest.raises(ServerError) as caught:
        async with server:
            raise AssertionError("it started")
    # A cluster of other tests may be up beside this one.
    assert set(psutil.Process().children()) <= before
    return caught.value


async def test_a_server_that_dies_shows_its_last_words_and_a_hint(mini, paths: ServerPaths) -> None:
    spec = mini("--die", "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB")
    error = await failure(build_server(spec, MODEL, paths=paths))
    assert error.state == "failed"
    assert "ended with exit status 1 (GPU out of memory)" in error.message
    assert "serving '/models/m'\n    torch.OutOfMemoryError: CUDA out of memory" in error.message
    assert error.hint is not None and "gpu_memory_utilization" in error.hint
    assert error.log is not None and error.log in error.message


async def test_one_of_two_replicas_dies_and_the_other_is_stopped(mini, paths: ServerPaths, tmp_path: Path) -> None:
    line = f'mkdir "{tmp_path}/first" || exit 4; exec sleep 600'
    spec = CommandServer(shell=line, replicas=2)
    error = await failure(build_server(spec, MODEL, paths=paths))
    assert "(replica " in error.message
    assert "exit status 4" in error.message


async def test_a_server_that_hangs_is_stalled(mini, paths: ServerPaths) -> None:
    limits = StartLimits(whole_s=60, stalled_s=1.5)
    error = await failure(watched(mini("--hang"), paths, limits))
    assert error.state == "stalled"
    assert "no output and no computing" in error.message


async def test_a_server_that_only_needs_longer_is_starting(paths: ServerPaths) -> None:
    spec = CommandServer(shell="while :; do :; done")
    error = await failure(watched(spec, paths, StartLimits(whole_s=1.0)))
    assert error.state == "starting"
    assert error.hint is not None and "start_timeout_s" in error.hint


async def test_a_program_that_does_not_exist(paths: ServerPaths) -> None:
    error = await failure(build_server(CommandServer(argv=("no-such-server",)), MODEL, paths=paths))
    assert "cannot run 'no-such-server': No such file or directory" in error.message


async def test_a_command_that_serves_one_model_serves_the_one_that_was_meant(mini, paths: ServerPaths) -> None:
    spec = mini()
    argv = tuple(word.replace("{name}", "other") for word in spec.argv)
    one = build_server(CommandServer(argv=argv), MODEL, paths=paths)
    async with one:
        assert one.backends[0].served_model == "other"


async def test_a_server_that_wants_another_key_is_refused(mini, paths: ServerPaths, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("its own")
    argv = tuple(word.replace("{api_key_file}", str(tmp_path / "key")) for word in mini().argv)
    error = await failure(build_server(CommandServer(argv=argv), MODEL, paths=paths))
    assert "refuses the key that it was given" in error.message


async def test_a_port_taken_in_between_is_given_up_for_another(mini, paths: ServerPaths, monkeypatch) -> None:
    with socket.socket() as thief:
        thief.bind(("127.0.0.1", 0))
        thief.listen()
        taken, free = thief.getsockname()[1], PortFinder().find()
        ports = iter([taken, taken, free])
        monkeypatch.setattr(PortFinder, "find", lambda self: next(ports))
        async with build_server(mini(), MODEL, paths=paths) as server:
            assert server.backends[0].url.endswith(f":{free}")
    assert len(list(paths.logs.iterdir())) == 3


async def test_a_port_always_taken_is_an_error(mini, paths: ServerPaths, monkeypatch) -> None:
    with socket.socket() as thief:
        thief.bind(("127.0.0.1", 0))
        thief.listen()
        monkeypatch.setattr(PortFinder, "find", lambda self: thief.getsockname()[1])
        error = await failure(build_server(mini(), MODEL, paths=paths))
    assert "(port taken)" in error.message


@pytest.mark.parametrize("damage", ["missing", "empty", "cut"])
async def test_gguf_that_cannot_be_loaded(damage: str, gguf: Path, paths: ServerPaths, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    if damage != "missing":
        with gguf.open("rb") as source:
            path.write_bytes(source.read(0 if damage == "empty" else 200_000))
    error = await failure(build_server(LlamaCppServer(slots=1, context=64), ServedModel(path=str(path)), paths=paths))
    assert error.state == "failed"
    assert "failed to load model" in error.message
    expected = "check the model's path" if damage == "missing" else "damaged or cut short"
    assert error.hint is not None and expected in error.hint


async def test_llama_cpp_names_an_option_it_does_not_have(gguf: Path, paths: ServerPaths) -> None:
    spec = LlamaCppServer(slots=1, context=64, args={"no_such_field": 1})
    error = await failure(build_server(spec, ServedModel(path=str(gguf)), paths=paths))
    assert "unknown option 'no_such_field'" in error.message
    assert error.hint is not None and "`args:`" in error.hint


async def test_vllm_in_an_interpreter_without_vllm(paths: ServerPaths) -> None:
    # The base interpreter of this environment certainly has no vLLM.
    spec = VllmServer(python=f"{sys.base_prefix}/bin/python3")
    error = await failure(build_server(spec, MODEL, paths=paths))
    assert "(missing module)" in error.message
    assert error.hint is not None and "`python:`" in error.hint


async def test_an_interpreter_that_does_not_exist(paths: ServerPaths) -> None:
    with pytest.raises(MissingTool, match="no Python interpreter at '/no/python'"):
        async with build_server(VllmServer(python="/no/python"), MODEL, paths=paths):
            pass


# --- endpoints ------------------------------------------------------------------------------------


def endpoint(url: str, paths: ServerPaths, *, name: str = "m", key: str | None = None, health: str | None = None):
    return build_server(EndpointServer(health=health), ServedModel(path=url, name=name), paths=paths, api_key=key)


async def test_endpoint_where_nobody_listens(paths: ServerPaths) -> None:
    error = await failure(endpoint(f"http://127.0.0.1:{PortFinder().find()}", paths))
    assert error.state == "unreachable"
    assert error.hint is not None and "nobody listens there" in error.hint


async def test_endpoint_whose_name_does_not_resolve(paths: ServerPaths) -> None:
    error = await failure(endpoint("http://no-such-host.invalid:8000", paths))
    assert "cannot be reached" in error.message
    assert error.hint is not None and "check the host name" in error.hint


@pytest.mark.parametrize("url", ["localhost:8000", "http://", "ftp://host/", "/models/mine", "http://h:99999", ""])
def test_endpoint_that_is_no_url(url: str, paths: ServerPaths) -> None:
    with pytest.raises(ConfigError, match="is not the URL of an endpoint"):
        endpoint(url, paths)


@pytest.fixture
async def other(mini, paths: ServerPaths):
    """A running server, as (url, key)."""
    async with build_server(mini(), ServedModel(path="x", name="listed"), paths=paths) as server:
        yield server.backends[0].url, server.backends[0].api_key


async def unreachable(server) -> ServerError:
    with pytest.raises(ServerError) as caught:
        async with server:
            raise AssertionError("it was entered")
    return caught.value


async def test_endpoint_that_wants_a_key(other, paths: ServerPaths) -> None:
    url, _ = other
    error = await unreachable(endpoint(url, paths))
    assert "wants a key (HTTP 401" in error.message
    error = await unreachable(endpoint(url, paths, key="wrong"))
    assert "refuses the key (HTTP 401" in error.message
    assert error.hint is not None and "api_key_env" in error.hint


async def test_endpoint_that_serves_something_else(other, paths: ServerPaths) -> None:
    url, key = other
    error = await unreachable(endpoint(url, paths, key=key, name="mine"))
    assert "does not serve 'mine'; it lists: 'listed'" in error.message
    async with endpoint(url, paths, key=key, name="default") as server:
        assert server.backends[0].served_model == "listed"


async def test_endpoint_under_a_wrong_path(other, paths: ServerPaths) -> None:
    url, key = other
    error = await unreachable(endpoint(f"{url}/somewhere", paths, key=key))
    assert "answers /v1/models with HTTP 404" in error.message
    error = await unreachable(endpoint(url, paths, key=key, health="/nothing"))
    assert "answers /nothing with HTTP 404" in error.message


async def test_endpoint_that_goes_away(mini, paths: ServerPaths) -> None:
    model = ServedModel(path="x", name="listed")
    async with (
        build_server(mini(), model, paths=paths, api_key="k") as first,
        build_server(mini(), model, paths=paths, api_key="k") as second,
    ):
        urls = [server.backends[0].url for server in (first, second)]
        both = build_server(
            EndpointServer(), ServedModel(path=urls[0], name="listed"), paths=paths, api_key="k", urls=urls[1:]
        )
        async with both:
            assert [backend.url for backend in both.backends] == urls
            await first.__aexit__(None, None, None)
            await both.ensure()
            await second.__aexit__(None, None, None)
            with pytest.raises(ServerError, match="cannot be reached"):
                await both.ensure()
    await asyncio.sleep(0)
