"""What each model runs on, and which part of that decides its answers."""

from __future__ import annotations

from typing import Any

import pytest

from proctor.config.engines import engine_for, launch_for
from proctor.config.numerics import numerics
from proctor.config.spec import (
    EndpointServer,
    LlamaCppServer,
    LmEvalModelEngine,
    OpenAIEngine,
    RunSpec,
    VllmServer,
)
from proctor.errors import ConfigError


def run(model: dict[str, Any], **rest: Any) -> RunSpec:
    return RunSpec.model_validate({"name": "x", "models": {"m": model}, "tasks": [{"lm_eval": "a"}], **rest})


def server_of(spec: RunSpec) -> Any:
    engine = engine_for(spec, "m")
    assert isinstance(engine, OpenAIEngine)
    return engine.server


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ({"path": "http://h:1", "served_model": "a"}, EndpointServer),
        ({"path": "https://h", "served_model": "a"}, EndpointServer),
        ({"path": "/m/model.gguf"}, LlamaCppServer),
        ({"path": "embedded:smollm2-135m"}, LlamaCppServer),
        ({"path": "/m/model"}, VllmServer),
        ({"path": "hub:org/name"}, VllmServer),
    ],
)
def test_the_server_suits_the_path(model: dict[str, Any], expected: type) -> None:
    assert type(server_of(run(model))) is expected


def test_a_directory_that_stands_for_its_gguf_file_runs_on_llama_cpp() -> None:
    engine = engine_for(run({"path": "/m"}), "m", "/m/only.gguf")
    assert isinstance(engine, OpenAIEngine) and isinstance(engine.server, LlamaCppServer)


def test_an_override_is_merged_deeply() -> None:
    engine = {"max_in_flight": 3, "server": {"type": "vllm", "replicas": 2, "args": {"a": 1, "b": 1}}}
    spec = run({"path": "/m", "engine": {"server": {"args": {"b": 2}}}}, engine=engine)
    server = server_of(spec)
    assert server.args == {"a": 1, "b": 2} and server.replicas == 2
    assert spec.engine.server.args == {"a": 1, "b": 1}  # type: ignore[union-attr]


def test_another_server_type_starts_from_its_own_defaults() -> None:
    engine = {"max_in_flight": 3, "server": {"type": "llama.cpp", "slots": 2, "replicas": 4, "args": {"a": 1}}}
    spec = run({"path": "/m", "engine": {"server": {"type": "vllm"}}}, engine=engine)
    assert server_of(spec) == VllmServer()
    assert engine_for(spec, "m").max_in_flight == 3  # type: ignore[union-attr]


def test_another_engine_type_starts_from_its_own_defaults() -> None:
    engine = {"max_in_flight": 3, "server": {"type": "vllm"}}
    spec = run({"path": "/m", "engine": {"type": "lm_eval", "model": "hf"}}, engine=engine)
    assert engine_for(spec, "m") == LmEvalModelEngine(model="hf")


def test_launch_override() -> None:
    spec = run({"path": "/m", "launch": {"workers": 3}}, launch={"slots_per_gpu": 2})
    launch = launch_for(spec, "m")
    assert (launch.workers, launch.slots_per_gpu) == (3, 2)


def test_an_invalid_override_names_the_model() -> None:
    spec = run({"path": "/m", "engine": {"server": {"type": "vllm", "agrs": {}}}})
    with pytest.raises(ConfigError, match=r"models\.m\.engine: server\.agrs: unknown key 'agrs'.*did you mean 'args'"):
        engine_for(spec, "m")


def test_a_model_class_that_loads_weights_has_no_use_for_a_url() -> None:
    spec = run({"path": "http://h:1", "served_model": "a"}, engine={"type": "lm_eval", "model": "hf"})
    with pytest.raises(ConfigError, match="loads weights"):
        engine_for(spec, "m")


def test_an_adapter_is_handed_to_the_class_that_can_apply_it() -> None:
    def chosen(model: str, *adapters: str) -> Any:
        return engine_for(run({"path": "/m", "adapters": adapters}, engine={"type": "lm_eval", "model": model}), "m")

    assert chosen("hf", "/a").model_args == {"peft": "/a"}
    assert chosen("vllm", "hub:org/a").model_args == {"lora_local_path": "org/a"}
    assert numerics(chosen("hf", "/a")) == numerics(chosen("hf", "/b"))  # the files are hashed, not the path
    for model, adapters in (("hf", ("/a", "/b")), ("sglang", ("/a",))):
        with pytest.raises(ConfigError, match="merge them into the weights"):
            chosen(model, *adapters)
    with pytest.raises(ConfigError, match="cannot be applied by a server of type 'vllm'"):
        engine_for(run({"path": "/m", "adapters": "/a"}), "m")


@pytest.mark.parametrize(
    ("engine", "place"),
    [
        ({"type": "lm_eval", "model": "hf", "model_args": {"pretrained": "/other"}}, "path"),
        ({"type": "lm_eval", "model": "hf", "model_args": {"peft": "/a"}}, "adapters"),
        ({"server": {"type": "vllm", "args": {"lora_modules": "a=/a"}}}, "adapters"),
        ({"server": {"type": "llama.cpp", "args": {"lora": "/a"}}}, "adapters"),
        ({"server": {"type": "sglang", "args": {"model-path": "/other"}}}, "path"),
    ],
)
def test_weights_are_not_named_in_passing(engine: dict[str, Any], place: str) -> None:
    with pytest.raises(ConfigError, match=f"names weights that Proctor would not see.*\n.*models.NAME.{place}"):
        engine_for(run({"path": "/m"}, engine=engine), "m")


@pytest.mark.parametrize(
    ("engine", "expected"),
    [
        (
            {"server": {"type": "vllm", "args": {"max_num_seqs": 64, "dtype": "torch.float32", "max-model-len": 9}}},
            {
                "dtype": "float32",
                "enforce-eager": True,
                "max-num-seqs": 1,
                "no-enable-prefix-caching": True,
                "seed": 0,
                "max-model-len": 9,
            },
        ),
        (
            {"server": {"type": "sglang"}},
            {
                "dtype": "float32",
                "disable-cuda-graph": True,
                "max-running-requests": 1,
                "disable-radix-cache": True,
                "random-seed": 0,
            },
        ),
    ],
)
def test_reproducible_server(engine: dict[str, Any], expected: dict[str, Any]) -> None:
    chosen = engine_for(run({"path": "/m"}, engine=engine, profile="reproducible"), "m")
    assert isinstance(chosen, OpenAIEngine) and chosen.server is not None
    assert chosen.server.args == expected  # type: ignore[union-attr]
    assert (chosen.max_in_flight, chosen.batch_size) == (1, 1)


def test_reproducible_llama_cpp_and_in_process() -> None:
    assert server_of(run({"path": "/m.gguf"}, profile="reproducible")).slots == 1
    engine = {"type": "lm_eval", "model": "hf", "batch_size": "auto", "model_args": {"dtype": "float32", "x": 1}}
    chosen = engine_for(run({"path": "/m"}, engine=engine, profile="reproducible"), "m")
    assert chosen == LmEvalModelEngine(model="hf", model_args={"x": 1, "dtype": "float32"}, batch_size=1)


def test_reproducible_is_idempotent_and_changes_nothing_by_default() -> None:
    engine = {"server": {"type": "vllm", "args": {"dtype": "bfloat16"}}}
    assert server_of(run({"path": "/m"}, engine=engine)).args == {"dtype": "bfloat16"}
    with pytest.raises(ConfigError, match="float32"):
        engine_for(run({"path": "/m"}, engine=engine, profile="reproducible"), "m")


def numerics_of(engine: dict[str, Any], path: str = "/m") -> dict[str, Any]:
    model = {"path": path, "served_model": "a"} if path.startswith("http") else {"path": path}
    return numerics(engine_for(run(model, engine=engine), "m"))


def vllm(**args: Any) -> dict[str, Any]:
    return {"server": {"type": "vllm", "args": args}}


def test_numerics_are_what_changes_logits() -> None:
    plain = numerics_of(vllm())
    assert plain == {"engine": "vllm"}
    same = vllm(**{"max-model-len": 4096, "gpu-memory-utilization": 0.5, "dtype": "auto", "quantization": None})
    assert numerics_of(same | {"max_in_flight": 3}) == plain
    for args in (
        {"dtype": "float32"},
        {"quantization": "fp8"},
        {"kv_cache_dtype": "fp8"},
        {"hf-overrides": "{}"},
        {"rope-scaling": "{}"},
        {"load-format": "dummy"},
    ):
        assert numerics_of(vllm(**args)) != plain
    assert numerics_of({"server": {"type": "sglang"}}) != plain


def test_numerics_have_one_spelling() -> None:
    assert numerics_of(vllm(kv_cache_dtype="fp8")) == numerics_of(vllm(**{"--kv-cache-dtype": "fp8"}))
    hf = {"type": "lm_eval", "model": "hf", "model_args": {"dtype": "torch.float32"}}
    assert numerics_of(hf) == {"engine": "lm_eval:hf", "dtype": "float32"}


def test_numerics_of_model_classes_err_on_the_safe_side() -> None:
    def hf(**args: Any) -> dict[str, Any]:
        return numerics_of({"type": "lm_eval", "model": "hf", "model_args": args})

    assert hf(device_map="auto", parallelize=True) == hf()
    assert hf(anything_new=1) != hf()
    assert hf(add_bos_token=False) != hf()  # unset lets the tokenizer decide


def test_numerics_of_a_command_are_the_command() -> None:
    one, two = ({"server": {"type": "command", "argv": ["serve", x]}} for x in ("--fp8", "--bf16"))
    assert numerics_of(one) != numerics_of(two)


def test_an_endpoint_is_what_it_declares() -> None:
    assert numerics_of({"max_in_flight": 1}, "http://h:1") == {"engine": "endpoint"}
