"""What one model runs on: the run's engine and launch, the model's overrides, defaults, and the profile."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, TypeVar, cast

from pydantic import TypeAdapter, ValidationError

from proctor.config.complaints import explain
from proctor.config.document import Origin, from_plain
from proctor.config.merging import TYPED
from proctor.config.spec import (
    CommandServer,
    EndpointServer,
    EngineSpec,
    FakeEngine,
    LaunchSpec,
    LlamaCppServer,
    LmEvalModelEngine,
    LocalLaunch,
    ModelSpec,
    OpenAIEngine,
    RunSpec,
    ServerBase,
    SglangServer,
    SlurmLaunch,
    VllmServer,
    is_url,
)
from proctor.errors import ConfigError

Engine = OpenAIEngine | LmEvalModelEngine | FakeEngine
Launch = LocalLaunch | SlurmLaunch
Server = LlamaCppServer | VllmServer | SglangServer | CommandServer | EndpointServer

ENGINE: Final[TypeAdapter[Engine]] = TypeAdapter(EngineSpec)
LAUNCH: Final[TypeAdapter[Launch]] = TypeAdapter(LaunchSpec)
_LOADS_WEIGHTS: Final = frozenset({"hf", "hf-auto", "huggingface", "hf-multimodal", "vllm", "vllm-vlm", "sglang"})
ADAPTER_ARGUMENTS: Final[Mapping[str, str]] = {
    "hf": "peft",
    "hf-auto": "peft",
    "huggingface": "peft",
    "vllm": "lora_local_path",
}
"""The argument of lm-eval's model classes that names an adapter."""
_MODEL_FILES: Final[Mapping[str, str]] = {
    "pretrained": "path",
    "gguf-file": "path",
    "subfolder": "path",
    "delta": "path",
    "peft": "adapters",
    "lora-local-path": "adapters",
    "revision": "revision",
    "tokenizer": "tokenizer",
}
_SERVER_FILES: Final[Mapping[str, str]] = {
    "model-path": "path",
    "lora": "adapters",
    "lora-scaled": "adapters",
    "lora-modules": "adapters",
    "lora-paths": "adapters",
    "revision": "revision",
    "tokenizer": "tokenizer",
    "tokenizer-path": "tokenizer",
}
_Checked = TypeVar("_Checked")


def engine_for(spec: RunSpec, model: str, path: str | None = None) -> Engine:
    """The engine of one model: overrides merged, the server chosen, `profile: reproducible` applied.

    `path` is where the weights were found (a directory may stand for its GGUF file); None: as configured.
    Raises ConfigError if the merged engine is not valid, does not suit the path, or asks for what the profile
    excludes.
    """
    chosen = spec.models[model]
    engine = _checked(ENGINE, merged(spec, model, "engine"), f"models.{model}.engine", EngineSpec)
    if isinstance(engine, OpenAIEngine):
        server = server_for(path or chosen.path, engine)
        _refuse_files(server.args if isinstance(server, ServerBase) else {}, _SERVER_FILES, "engine.server.args")
        engine = engine.model_copy(update={"server": server})
    elif isinstance(engine, LmEvalModelEngine) and engine.model in _LOADS_WEIGHTS:
        engine = _in_process(engine, chosen)
    if chosen.adapters and not isinstance(engine, LmEvalModelEngine | FakeEngine):
        raise ConfigError(
            f"`adapters:` cannot be applied by a server of type {engine_kind(engine)!r}",
            hint="merge them into the weights, or use engine: {type: lm_eval, model: hf}",
        )
    return reproducible(engine) if spec.profile == "reproducible" else engine


def _in_process(engine: LmEvalModelEngine, model: ModelSpec) -> LmEvalModelEngine:
    """The engine with the model's adapter among its arguments. Raises ConfigError if the two do not fit."""
    if is_url(model.path):
        raise ConfigError(
            f"the model class {engine.model!r} loads weights, but the path {model.path!r} is a URL",
            hint="ask a server with engine.type openai",
        )
    _refuse_files(engine.model_args, _MODEL_FILES, "engine.model_args")
    if not model.adapters:
        return engine
    argument = ADAPTER_ARGUMENTS.get(engine.model)
    first, *more = model.adapters
    if argument is None or more:
        raise ConfigError(
            f"`adapters:` has {len(model.adapters)} entries; the model class {engine.model!r} "
            + ("takes none" if argument is None else "takes one"),
            hint="merge them into the weights",
        )
    # A hub id keeps its cached name here; a local path is absolute.
    args = {**engine.model_args, argument: first.removeprefix("hub:")}
    return engine.model_copy(update={"model_args": args})


def _refuse_files(args: Mapping[str, Any], belongs: Mapping[str, str], where: str) -> None:
    """Weights named in passing would not be part of the fingerprint: they are stated under `models:`."""
    for key in args:
        place = belongs.get(_option(key))
        if place is not None:
            raise ConfigError(
                f"{where}.{key} names weights that Proctor would not see", hint=f"write it as models.NAME.{place}"
            )


def client_processes(engine: Engine) -> int:
    """How many processes ask the servers of one worker. What llama.cpp answers, one core can ask."""
    if not isinstance(engine, OpenAIEngine) or isinstance(engine.server, LlamaCppServer):
        return 1
    return min(engine.client_processes, engine.max_in_flight)


def launch_for(spec: RunSpec, model: str) -> Launch:
    """The launch of one model, overrides merged. Raises ConfigError if the result is not valid."""
    return _checked(LAUNCH, merged(spec, model, "launch"), f"models.{model}.launch", LaunchSpec)


def _checked(adapter: TypeAdapter[_Checked], value: dict[str, Any], where: str, schema: Any) -> _Checked:
    try:
        return adapter.validate_python(value)
    except ValidationError as error:
        tree = from_plain(value, Origin(file=where, directory=Path()))
        raise ConfigError("\n".join(explain(error, tree, schema))) from None


def server_for(path: str, engine: OpenAIEngine) -> Server:
    """The engine's server, or the one that suits a model's path.

    An http(s) path is an endpoint; GGUF and embedded models run on llama.cpp, everything else on vllm.
    Raises ConfigError for an endpoint path with a server to start, and the reverse.
    """
    remote = is_url(path)
    if engine.server is None:
        if remote:
            return EndpointServer()
        small = path.startswith("embedded:") or path.endswith(".gguf")
        return LlamaCppServer() if small else VllmServer()
    if remote and not isinstance(engine.server, EndpointServer):
        raise ConfigError(
            f"the path {path!r} is a server that runs already, but engine.server.type is {engine.server.type!r}",
            hint="leave `server:` out, or override it under this model's `engine:`",
        )
    if isinstance(engine.server, EndpointServer) and not remote:
        raise ConfigError(
            f"engine.server.type is 'endpoint', but the path {path!r} is no URL",
            hint="give the server's base URL as the model's `path:`, e.g. http://localhost:8000",
        )
    return engine.server


def merged(spec: RunSpec, model: str, key: str) -> dict[str, Any]:
    """The run's `engine` or `launch` (as stated) with the model's override on top, not validated yet."""
    base: dict[str, Any] = getattr(spec, key).model_dump(exclude_unset=True)
    base["type"] = getattr(spec, key).type
    over: dict[str, Any] | None = getattr(spec.models[model], key)
    return base if over is None else _merge(base, over, typed=True)


def _merge(base: Mapping[str, Any], over: Mapping[str, Any], *, typed: bool) -> dict[str, Any]:
    if typed and over.get("type", base.get("type")) != base.get("type"):
        return dict(over)
    out = dict(base)
    for key, value in over.items():
        old: object = out.get(key)
        if isinstance(old, Mapping) and isinstance(value, Mapping):
            below = cast("Mapping[str, Any]", old), cast("Mapping[str, Any]", value)
            out[key] = _merge(*below, typed=key in TYPED)
        else:
            out[key] = value
    return out


def reproducible(engine: Engine) -> Engine:
    """`profile: reproducible`: float32, one request at a time, nothing that depends on what ran before.

    The same engine on the same machine then gives the same bits, whatever else is asked. Raises ConfigError
    where the configuration asks for another dtype. A server of type command or endpoint is not ours to
    configure: only the client's side is fixed.
    """
    if isinstance(engine, LmEvalModelEngine):
        wanted = _IN_PROCESS.get(engine.model, {"dtype": "float32"})
        args = _with(engine.model_args, wanted, "engine.model_args")
        return engine.model_copy(update={"model_args": args, "batch_size": 1})
    if isinstance(engine, FakeEngine):
        return engine
    server = engine.server
    if isinstance(server, LlamaCppServer):
        server = server.model_copy(update={"slots": 1})
    elif isinstance(server, VllmServer | SglangServer):
        args = _with(server.args, _SERVERS[server.type], "engine.server.args")
        server = server.model_copy(update={"args": args})
    return engine.model_copy(update={"server": server, "max_in_flight": 1, "client_processes": 1, "batch_size": 1})


_SERVERS: Final[dict[str, dict[str, Any]]] = {
    "vllm": {
        "dtype": "float32",
        "enforce-eager": True,
        "max-num-seqs": 1,
        "no-enable-prefix-caching": True,
        "seed": 0,
    },
    "sglang": {
        "dtype": "float32",
        "disable-cuda-graph": True,
        "max-running-requests": 1,
        "disable-radix-cache": True,
        "random-seed": 0,
    },
}
_VLLM_IN_PROCESS: Final[dict[str, Any]] = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_num_seqs": 1,
    "enable_prefix_caching": False,
    "seed": 1234,
}
_IN_PROCESS: Final[dict[str, dict[str, Any]]] = {
    "vllm": _VLLM_IN_PROCESS,
    "vllm-vlm": _VLLM_IN_PROCESS,
    "sglang": {"dtype": "float32", "max_running_requests": 1, "disable_radix_cache": True, "random_seed": 1234},
}


def _with(args: Mapping[str, Any], wanted: Mapping[str, Any], where: str) -> dict[str, Any]:
    """`args` with `wanted`, whichever of - and _ they are spelt with."""
    canonical = {_option(key): key for key in wanted}
    out: dict[str, Any] = {}
    for key, value in args.items():
        own = canonical.get(_option(key))
        if own == "dtype" and str(value).removeprefix("torch.") not in ("float32", "float"):
            raise ConfigError(
                f"profile: reproducible computes in float32, but {where}.dtype is {value!r}",
                hint="leave one of the two out",
            )
        if own is None:
            out[key] = value
    return out | dict(wanted)


def _option(key: str) -> str:
    return key.lstrip("-").replace("_", "-")


def engine_kind(engine: Engine) -> str:
    """What answers, in one word: vllm, sglang, llama.cpp, command, endpoint, lm_eval:hf, fake."""
    if isinstance(engine, OpenAIEngine):
        return engine.server.type if engine.server is not None else "openai"
    return f"lm_eval:{engine.model}" if isinstance(engine, LmEvalModelEngine) else engine.type
