"""Command lines and environments of the servers, without starting any."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from proctor.config.spec import CommandServer, EndpointServer, SglangServer, VllmServer
from proctor.errors import ConfigError
from proctor.infer.server import ServedModel, ServerPaths
from proctor.infer.servers.arguments import argument_list, describe_parallelism
from proctor.infer.servers.build import build_server
from proctor.infer.servers.command import CommandRecipe, fill
from proctor.infer.servers.endpoint import base_url
from proctor.infer.servers.known_options import known_options
from proctor.infer.servers.launched import Place
from proctor.infer.servers.ports import PortFinder
from proctor.infer.servers.sglang import SglangRecipe
from proctor.infer.servers.vllm import VllmRecipe

HOSTILE = "/m/a 'b' \"c\" $(touch x)\n{port}"
PLACE = Place(replica=0, port=4711, api_key="sesame", api_key_file=Path("/s/.key"), devices=())
PATHS = ServerPaths(logs=Path("/l"), scratch=Path("/s"))


def test_vllm_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    args = {"dtype": "float32", "enforce_eager": True, "max-num-seqs": 4, "x": False, "y": None, "lora": ["a=b", "c=d"]}
    model = ServedModel(path=HOSTILE, name="n m", revision="r1", tokenizer="/tok", trust_remote_code=True)
    command = VllmRecipe(VllmServer(args=args | {"hf-overrides": {"a": 1}}), model).command(PLACE)
    assert command.argv == (
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", HOSTILE, "--host", "127.0.0.1", "--port", "4711", "--served-model-name", "n m"),
        *("--generation-config", "vllm", "--revision", "r1", "--tokenizer", "/tok", "--trust-remote-code"),
        *("--dtype", "float32", "--enforce-eager", "--max-num-seqs", "4", "--lora", "a=b", "c=d"),
        *("--hf-overrides", '{"a": 1}'),
    )
    assert command.env["VLLM_API_KEY"] == "sesame"
    assert command.env["VLLM_NO_USAGE_STATS"] == command.env["DO_NOT_TRACK"] == command.env["HF_HUB_OFFLINE"] == "1"
    assert int(command.env["VLLM_CPU_KVCACHE_SPACE"]) >= 1


def test_vllm_leaves_the_users_cache_size_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "7")
    command = VllmRecipe(VllmServer(), ServedModel(path="/m")).command(PLACE)
    assert command.env["VLLM_CPU_KVCACHE_SPACE"] == "7"


@pytest.mark.parametrize(
    ("declared", "args", "inside", "added"),
    [
        ("enable_scale_out: bool = False", {}, False, ["--enable-scale-out"]),
        (
            "enable_scale_out: bool\nenable_prompt_tokens_details: bool",
            {"enable_scale_out": False},
            False,
            ["--enable-prompt-tokens-details"],
        ),
        ("enable_scale_out: bool\nenable_prompt_tokens_details: bool", {}, True, []),
        ("# enable_scale_out", {}, False, []),
        (None, {}, False, []),
    ],
    ids=["one of them", "the user says no", "in a container", "an old version", "no such package"],
)
def test_vllm_gets_the_options_of_its_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, declared: str | None, args: dict, inside: bool, added: list[str]
) -> None:
    known_options.cache_clear()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    if declared is not None:
        place = tmp_path / "vllm" / "entrypoints" / "launchers"
        place.mkdir(parents=True)
        (tmp_path / "vllm" / "__init__.py").write_text("raise SystemExit('imported')")
        (place / "cli_args.py").write_text(declared)
    command = VllmRecipe(VllmServer(args=args), ServedModel(path="/m")).command(replace(PLACE, inside=inside))
    known_options.cache_clear()
    assert [word for word in command.argv if word.startswith("--enable")] == added


@pytest.mark.parametrize(
    ("swap", "place", "opened"),
    [
        ("restart", {}, False),
        ("reload", {}, True),
        ("reload", {"host": "10.0.0.7"}, False),
        ("reload", {"nodes": 2}, False),
        ("reload", {"inside": True}, False),
    ],
)
def test_vllms_routes_without_a_key_are_opened_on_this_machine_only(
    monkeypatch: pytest.MonkeyPatch, swap: str, place: dict, opened: bool
) -> None:
    monkeypatch.delenv("VLLM_SERVER_DEV_MODE", raising=False)
    command = VllmRecipe(VllmServer(swap=swap), ServedModel(path="/m")).command(replace(PLACE, **place))
    assert (command.env.get("VLLM_SERVER_DEV_MODE") == "1") is opened


def test_sglang_command_line_has_no_key() -> None:
    model = ServedModel(path=HOSTILE, name="n", trust_remote_code=True)
    recipe = SglangRecipe(SglangServer(args={"tp": 2, "trust-remote-code": True}), model)
    command = recipe.command(PLACE)
    assert command.argv == (
        *(sys.executable, "-m", "sglang.launch_server", "--model-path", HOSTILE, "--host", "127.0.0.1"),
        *("--port", "4711", "--served-model-name", "n", "--sampling-defaults", "openai"),
        *("--enable-metrics", "--tp", "2", "--trust-remote-code"),
    )
    assert not recipe.keyed
    assert "sesame" not in command.env.values()


@pytest.mark.parametrize("name", ["port", "--host", "served_model_name", "api-key", "model"])
def test_options_that_are_ours_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"engine.server.args.{name}"):
        build_server(VllmServer(args={name: "x"}), ServedModel(path="/m"), paths=PATHS)


def test_argument_list_of_nothing() -> None:
    assert argument_list({}, reserved=(), engine="e") == []


@pytest.mark.parametrize(
    ("args", "shown"),
    [
        ({}, "tp1"),
        ({"tensor_parallel_size": 4}, "tp4"),
        ({"tp": 2, "dp-size": 3}, "tp2dp3"),
        ({"tensor-parallel-size": 8, "pipeline_parallel_size": 2, "data-parallel-size": 1}, "tp8pp2"),
        ({"tp-size": 8, "enable_expert_parallel": True}, "tp8ep"),
    ],
)
def test_parallelism(args: dict[str, object], shown: str) -> None:
    assert describe_parallelism(args) == shown


def test_command_fills_each_word_once_and_literally() -> None:
    spec = CommandServer(argv=("serve", "--m={model}", "{{x}}", "{host}:{port}", "{name}", "{api_key_file}"))
    command = CommandRecipe(spec, ServedModel(path=HOSTILE, name="$(n)")).command(PLACE)
    assert command.argv == ("serve", f"--m={HOSTILE}", "{x}", "127.0.0.1:4711", "$(n)", "/s/.key")
    assert command.env["PROCTOR_MODEL"] == HOSTILE
    assert command.env["PROCTOR_API_KEY_FILE"] == "/s/.key"
    assert set(os.environ) <= set(command.env)


def test_shell_line_is_passed_as_it_is() -> None:
    line = 'exec serve "$PROCTOR_MODEL" -p $PROCTOR_PORT {port} | tee log'
    command = CommandRecipe(CommandServer(shell=line), ServedModel(path=HOSTILE)).command(PLACE)
    assert command.argv == ("/bin/sh", "-c", line)
    assert command.env["PROCTOR_PORT"] == "4711"


@pytest.mark.parametrize("word", ["{prot}", "{}", "{0}", "{port!r}", "{port:>9}", "{model.__class__}", "{port", "}"])
def test_unknown_placeholders_are_refused_with_the_valid_ones(word: str) -> None:
    with pytest.raises(ConfigError) as caught:
        CommandRecipe(CommandServer(argv=("serve", word)), ServedModel(path="/m"))
    assert repr(word) in str(caught.value)
    assert "{{ and }}" in str(caught.value)
    if word == "{prot}":
        assert "{port}, {host}, {model}, {name}, {api_key_file}" in str(caught.value)


def test_fill_never_fills_what_it_filled() -> None:
    assert fill("{a}{b}", {"a": "{b}", "b": "{a}"}) == "{b}{a}"


def test_a_command_server_is_either_list_or_line() -> None:
    model = ServedModel(path="/m")
    for spec in (
        CommandServer.model_construct(argv=None, shell=None),
        CommandServer.model_construct(argv=("a",), shell="b"),
        CommandServer.model_construct(argv=(), shell=None),
        CommandServer.model_construct(argv=("a",), shell=None, args={"x": 1}),
    ):
        with pytest.raises(ConfigError):
            CommandRecipe(spec, model)


def test_devices_must_suit_the_replicas() -> None:
    with pytest.raises(ConfigError, match="2 replicas need as many groups of GPUs, not 1"):
        build_server(VllmServer(replicas=2), ServedModel(path="/m"), paths=PATHS, gpus=[[0]])
    with pytest.raises(ConfigError, match="each replica needs 2 GPUs"):
        build_server(VllmServer(gpus=2), ServedModel(path="/m"), paths=PATHS, gpus=[[0]])


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("http://h:8000", "http://h:8000"),
        ("http://h:8000/", "http://h:8000"),
        ("https://h/v1", "https://h"),
        ("https://h/v1/", "https://h"),
        ("https://h/api/v1/chat/completions", "https://h/api"),
        ("https://h/v1/completions", "https://h"),
        ("http://h/v1/models", "http://h"),
        (" http://[::1]:80/x?q=1#f ", "http://[::1]:80/x"),
    ],
)
def test_base_url(text: str, url: str) -> None:
    assert base_url(text) == url


def test_the_same_endpoint_twice_is_one() -> None:
    server = build_server(EndpointServer(), ServedModel(path="http://h"), paths=PATHS, urls=["http://h/v1", "http://i"])
    assert server._urls == ["http://h", "http://i"]  # pyright: ignore


def test_ports_are_free_and_never_given_twice_in_a_row() -> None:
    finder = PortFinder()
    ports = [finder.find() for _ in range(50)]
    assert len(set(ports)) == 50
