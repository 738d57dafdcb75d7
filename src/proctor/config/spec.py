"""The shape of run.yaml: strict, frozen, without I/O. `config.load` turns a file into a `RunSpec`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class Strict(BaseModel):
    """Unknown keys are errors; instances are immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False, populate_by_name=True)


# --- models ---------------------------------------------------------------------------------------


class CheckpointsSpec(Strict):
    """Checkpoints of one training run: child directories whose name matches `pattern`."""

    pattern: str | None = None
    """Directory name with {step} for the step number and * for anything."""
    steps: tuple[int, ...] | None = None
    """Only these; each must exist."""
    step_offset: int = 0
    discover: bool = False
    """Find every directory with weights below the path (or below its hf/) instead of matching a pattern."""


class ModelSpec(Strict):
    """One entry under `models:`; with checkpoints it stands for several."""

    path: str
    """Local directory, GGUF file, hub id, `embedded:NAME`, or the http(s) base URL of an endpoint."""
    urls: tuple[str, ...] = ()
    """Further base URLs of the same endpoint."""
    served_model: str | None = None
    """Endpoint: the model name to send."""
    revision: str | None = None
    """Hub revision, or an endpoint's declared revision."""
    api_key_env: str | None = None
    """Endpoint: environment variable that holds the key."""
    tokenizer: str | None = None
    """Directory or hub id, where it is not the model's own."""
    display_name: str | None = None
    model_key: str | None = None
    """Entries with the same key are one training run; default: the entry's own name."""
    checkpoints: CheckpointsSpec | None = None
    train_batch_size: int | None = None
    tokens_trained: int | tuple[int, ...] | None = None
    trust_remote_code: bool = False
    adapters: tuple[str, ...] = ()
    engine: dict[str, Any] | None = None
    """Merged over the run's engine for this model."""
    launch: dict[str, Any] | None = None
    """Merged over the run's launch for this model."""


# --- tasks ----------------------------------------------------------------------------------------

Limit = int | float | str | tuple[int, ...] | None
"""int: first n; float in (0, 1): fraction; "a:b" or "a:b:c": slice; list: document ids."""


class TaskBase(Strict):
    """What every task source understands."""

    num_fewshot: int | tuple[int, ...] | None = None
    """None: the task's own. A list is crossed."""
    limit: Limit = None
    fewshot_seed: int = 1234
    apply_chat_template: bool | str = False
    """True, or the name of one of the model's templates."""
    system_instruction: str | None = None
    fewshot_as_multiturn: bool | None = None
    """None: lm-eval's default, which is True with a chat template."""
    gen_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Over the task's own generation arguments."""
    repeats: int | None = None
    replicate: int = 0


class LmEvalTask(TaskBase):
    """Tasks, groups or tags of lm-evaluation-harness."""

    lm_eval: tuple[str, ...]
    include_path: tuple[str, ...] = ()
    overrides: dict[str, Any] = Field(default_factory=dict)
    """Keys of the task's own YAML."""
    metadata: dict[str, Any] = Field(default_factory=dict)
    """As lm-eval's --metadata (RULER's lengths, tokenizers)."""
    python: str | None = None
    """Interpreter that has lm-eval; None: this one, if it has."""
    confirm_unsafe_code: bool = False
    trust_remote_code: bool = False
    seeds: tuple[int, int, int] = (0, 1234, 1234)
    """random, numpy, torch: as lm-eval's --seed."""
    bootstrap_iters: int = 100_000


class NativeTaskRef(TaskBase):
    """Task files in Proctor's own format."""

    native: tuple[str, ...]


TaskSpec = LmEvalTask | NativeTaskRef

# --- engines and servers --------------------------------------------------------------------------


class ServerBase(Strict):
    """What every server that we start understands."""

    replicas: int = Field(default=1, ge=1)
    args: dict[str, Any] = Field(default_factory=dict)
    """The server's own options: {dtype: float32} becomes --dtype float32; true is a bare flag; false and null are left out."""
    env: dict[str, str] = Field(default_factory=dict)
    python: str | None = None
    """Interpreter that has the server installed."""
    start_timeout_s: float = Field(default=600.0, gt=0)
    restarts: int = Field(default=2, ge=0)
    """How many times a server that dies is started again."""
    gpus: int = Field(default=0, ge=0)
    """GPUs for each replica."""


class LlamaCppServer(ServerBase):
    """llama.cpp through xllamacpp: the embedded default."""

    type: Literal["llama.cpp"] = "llama.cpp"
    slots: int = Field(default=8, ge=1)
    context: int = Field(default=2048, ge=16)
    """Tokens for each slot."""
    threads: int | None = None


class VllmServer(ServerBase):
    type: Literal["vllm"] = "vllm"


class SglangServer(ServerBase):
    type: Literal["sglang"] = "sglang"


class CommandServer(ServerBase):
    """Any server: an argument list with {port} {model} {host} {api_key_file} {name} placeholders, or a shell line."""

    type: Literal["command"] = "command"
    argv: tuple[str, ...] | None = None
    shell: str | None = None
    health: str = "/health"


class EndpointServer(Strict):
    """Servers that are running already: the model's path (and urls) say where."""

    type: Literal["endpoint"] = "endpoint"
    health: str | None = None


ServerSpec = Annotated[
    LlamaCppServer | VllmServer | SglangServer | CommandServer | EndpointServer, Field(discriminator="type")
]

ProfileName = Literal["hf", "vllm", "local-completions"]


class OpenAIEngine(Strict):
    """OpenAI-compatible HTTP, to servers that we start or that run already."""

    type: Literal["openai"] = "openai"
    server: ServerSpec | None = None
    """None: endpoint for http paths, llama.cpp for GGUF and embedded models, vllm otherwise."""
    profile: ProfileName = "local-completions"
    """Whose habits resolve raw arguments: BOS, window, truncation, default length, stops."""
    max_length: int | None = None
    """The window in tokens; None: the profile's (2048 for local-completions) or the model's own."""
    truncation: Literal["fail", "truncate_left"] = "truncate_left"
    add_bos_token: bool | None = None
    max_gen_toks: int | None = None
    loglikelihood: Literal["auto", "echo", "forced"] = "auto"
    batch_size: int = Field(default=1, ge=1)
    """Prompts in one HTTP call, for log-likelihood."""
    max_in_flight: int = Field(default=64, ge=1)
    timeout_s: float = Field(default=600.0, gt=0)
    retries: int = Field(default=5, ge=0)
    seed: int = 1234
    extra_body: dict[str, Any] = Field(default_factory=dict)


class LmEvalModelEngine(Strict):
    """Any model class of lm-eval, in a process of its own, fed in slices."""

    type: Literal["lm_eval"] = "lm_eval"
    model: str = "hf"
    model_args: dict[str, Any] = Field(default_factory=dict)
    batch_size: int | str = 1
    device: str | None = None
    slice_size: int = Field(default=256, ge=1)
    """Requests handed over, and journaled, at a time."""
    python: str | None = None
    gpus: int = Field(default=0, ge=0)


class FakeEngine(Strict):
    """Answers from a hash of the question, without a model: for trying out a configuration."""

    type: Literal["fake"] = "fake"
    latency_s: float = Field(default=0.0, ge=0)


EngineSpec = Annotated[OpenAIEngine | LmEvalModelEngine | FakeEngine, Field(discriminator="type")]

# --- launch ---------------------------------------------------------------------------------------


class LocalLaunch(Strict):
    """Workers as child processes on this machine."""

    type: Literal["local"] = "local"
    workers: int = Field(default=1, ge=1)
    """Workers for each model."""
    gpus: tuple[int, ...] | None = None
    """Physical ids that may be used; None: CUDA_VISIBLE_DEVICES, else all that nvidia-smi lists."""
    slots_per_gpu: int = Field(default=1, ge=1)
    max_workers: int = Field(default=16, ge=1)
    """Workers running at a time."""


LaunchSpec = Annotated[LocalLaunch, Field(discriminator="type")]


class RunSpec(Strict):
    """A whole run."""

    name: str
    store: str = "./store"
    runs: str = "./runs"
    models: dict[str, ModelSpec]
    tasks: tuple[TaskSpec, ...]
    engine: EngineSpec = Field(default_factory=OpenAIEngine)
    launch: LocalLaunch = Field(default_factory=LocalLaunch)
    profile: Literal["default", "reproducible"] = "default"
    """reproducible: float32, fixed batching, one request at a time."""
