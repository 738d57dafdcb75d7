"""The shape of run.yaml: strict, frozen, without I/O. `config.load` turns a file into a `RunSpec`."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal, Self, cast

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    field_validator,
    model_validator,
)

from proctor.config.names import name_fault
from proctor.config.numbers import human_int, human_ints
from proctor.config.slurm_values import one_line, options, time_or_auto, time_text


class Strict(BaseModel):
    """Unknown keys are errors; instances are immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False, populate_by_name=True)


def _no_bool(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("expected a number, not true or false")
    return value


def _listed(value: object) -> object:
    return (value,) if isinstance(value, str) else value


Texts = Annotated[tuple[str, ...], BeforeValidator(_listed, json_schema_input_type=str | tuple[str, ...])]
"""A list of texts; a single text stands for a list of one."""
Whole = Annotated[int, BeforeValidator(_no_bool)]
Number = Annotated[float, BeforeValidator(_no_bool)]
HumanInt = Annotated[int, BeforeValidator(human_int, json_schema_input_type=int | str)]
"""A whole number that may be written 2_097_152, 100B or 1.5T."""


def is_url(path: str) -> bool:
    """Whether a model's path is the base URL of an endpoint."""
    return path.startswith(("http://", "https://"))


# --- models ---------------------------------------------------------------------------------------


class CheckpointsSpec(Strict):
    """Checkpoints of one training run: child directories whose name matches `pattern`."""

    pattern: str | None = None
    """Directory name with {step} for the step number and * for anything."""
    steps: tuple[HumanInt, ...] | None = None
    """Only these, as the directories number them; each must exist."""
    step_offset: Whole = 0
    discover: bool = False
    """Find every directory with weights below the path (or below its hf/) instead of matching a pattern."""

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if self.discover == (self.pattern is not None):
            raise ValueError("needs either `pattern:` (such as checkpoint_{step}) or `discover: true`")
        if self.pattern is not None and self.pattern.count("{step}") != 1:
            raise ValueError(f"pattern {self.pattern!r} must contain {{step}} exactly once")
        if self.steps is None:
            return self
        if self.pattern is None:
            raise ValueError("`steps:` needs a `pattern:`")
        if not self.steps:
            raise ValueError("`steps:` is empty; leave it out to take all")
        twice = [str(step) for step, n in Counter(self.steps).items() if n > 1]
        if twice:
            raise ValueError(f"`steps:` names {', '.join(twice)} twice")
        return self


class ModelSpec(Strict):
    """One entry under `models:`; with checkpoints it stands for several."""

    path: str = Field(min_length=1)
    """Local directory, GGUF file, hub id, `embedded:NAME`, or the http(s) base URL of an endpoint.

    `hub:ORG/NAME` is always a hub id; so does `config.load` write one that no local path answers to.
    """
    urls: Texts = ()
    """Further base URLs of the same endpoint."""
    served_model: str | None = None
    """Endpoint: the model name to send; together with `revision` it says which weights answer."""
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
    train_batch_size: HumanInt | None = None
    """Tokens for each training step."""
    tokens_trained: Annotated[
        int | tuple[int, ...] | None,
        BeforeValidator(human_ints, json_schema_input_type=int | str | tuple[int | str, ...] | None),
    ] = None
    """A number such as 100B, or one for each of `checkpoints.steps`."""
    trust_remote_code: bool = False
    adapters: Texts = ()
    engine: dict[str, Any] | None = None
    """Merged over the run's engine for this model; another `type` starts from that type's defaults."""
    launch: dict[str, Any] | None = None
    """Merged over the run's launch for this model."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if is_url(self.path):
            if not self.served_model:
                raise ValueError("an endpoint needs `served_model:`, the name of the model it serves")
            if self.checkpoints is not None:
                raise ValueError("an endpoint has no `checkpoints:`")
        else:
            _only_for_endpoints(self)
        if self.train_batch_size == 0:
            raise ValueError("`train_batch_size:` must be > 0")
        if isinstance(self.tokens_trained, tuple):
            steps = self.checkpoints.steps if self.checkpoints else None
            if steps is None:
                raise ValueError("a list of `tokens_trained:` needs `checkpoints.steps:`")
            if len(steps) != len(self.tokens_trained):
                raise ValueError(f"`tokens_trained:` lists {len(self.tokens_trained)} numbers for {len(steps)} steps")
        return self


def _only_for_endpoints(model: ModelSpec) -> None:
    for key in ("urls", "served_model", "api_key_env"):
        if getattr(model, key):
            raise ValueError(f"`{key}:` is for endpoints, whose path begins with http:// or https://")


# --- tasks ----------------------------------------------------------------------------------------

_SLICE: Final = re.compile(r"\s*(-?\d*)\s*:\s*(-?\d*)\s*(:\s*(-?\d*)\s*)?")


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _limit(value: object) -> object:
    if value is None:
        return None
    if _whole(value) and isinstance(value, int) and value > 0:
        return value
    if isinstance(value, float) and (0 < value < 1 or (value >= 1 and value.is_integer())):
        return value if value < 1 else int(value)
    if isinstance(value, str) and _SLICE.fullmatch(value):
        return value.replace(" ", "")
    if isinstance(value, list | tuple):
        ids: list[object] = list(value)  # pyright: ignore[reportUnknownArgumentType]
        if ids and all(_whole(i) and isinstance(i, int) and i >= 0 for i in ids):
            return tuple(ids)
    raise ValueError(
        "expected a count ≥ 1, a fraction between 0 and 1, a slice such as 10:20, or a list of document ids"
    )


def _shots(value: object) -> object:
    numbers = list(cast("list[object]", value)) if isinstance(value, list | tuple) else [value]
    if value is not None and not (numbers and all(_whole(n) and isinstance(n, int) and n >= 0 for n in numbers)):
        raise ValueError("expected a number of examples ≥ 0, or a list of such numbers")
    return cast("object", value)


def _flag_or_name(value: object) -> object:
    if not isinstance(value, bool | str):
        raise ValueError("expected true, false or the name of a template")
    return {"true": True, "yes": True, "false": False, "no": False}.get(str(value).lower(), value)


def _batch_size(value: object) -> object:
    if (_whole(value) and isinstance(value, int) and value >= 1) or (
        isinstance(value, str) and re.fullmatch(r"auto(:\d+)?", value)
    ):
        return value
    raise ValueError("expected a number ≥ 1, auto, or auto:N")


Limit = Annotated[int | float | str | tuple[int, ...] | None, BeforeValidator(_limit)]
"""int: first n; float in (0, 1): fraction; "a:b" or "a:b:c": slice; list: document ids."""


class TaskBase(Strict):
    """What every task source understands."""

    num_fewshot: Annotated[int | tuple[int, ...] | None, BeforeValidator(_shots)] = None
    """None: the task's own. A list is crossed."""
    limit: Limit = None
    fewshot_seed: Whole = 1234
    apply_chat_template: Annotated[bool | str, BeforeValidator(_flag_or_name)] = False
    """True, or the name of one of the model's templates."""
    system_instruction: str | None = None
    fewshot_as_multiturn: bool | None = None
    """None: lm-eval's default, which is True with a chat template."""
    gen_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Over the task's own generation arguments."""
    repeats: Whole | None = Field(default=None, ge=1)
    replicate: Whole = Field(default=0, ge=0)


class LmEvalTask(TaskBase):
    """Tasks, groups or tags of lm-evaluation-harness."""

    lm_eval: Texts = Field(min_length=1)
    include_path: Texts = ()
    overrides: dict[str, Any] = Field(default_factory=dict)
    """Keys of the task's own YAML."""
    metadata: dict[str, Any] = Field(default_factory=dict)
    """As lm-eval's --metadata (RULER's lengths, tokenizers)."""
    python: str | None = None
    """Interpreter that has lm-eval; None: this one, if it has."""
    confirm_unsafe_code: bool = False
    trust_remote_code: bool = False
    seeds: tuple[Whole, Whole, Whole] = (0, 1234, 1234)
    """random, numpy, torch: as lm-eval's --seed."""
    bootstrap_iters: Whole = Field(default=100_000, ge=0)


class NativeTaskRef(TaskBase):
    """Task files in Proctor's own format."""

    native: Texts = Field(min_length=1)


def _task_source(value: object) -> str | None:
    """The branch of TaskSpec that a mapping means: the source whose key it has; None if none or several."""
    if isinstance(value, Mapping):
        found = [key for key in TASK_SOURCES if key in value]
        return found[0] if len(found) == 1 else None
    return next((key for key, cls in TASK_SOURCES.items() if isinstance(value, cls)), None)


TASK_SOURCES: Final[dict[str, type[TaskBase]]] = {"lm_eval": LmEvalTask, "native": NativeTaskRef}
"""The key that says which source an entry of `tasks:` belongs to."""

TaskSpec = Annotated[
    Annotated[LmEvalTask, Tag("lm_eval")] | Annotated[NativeTaskRef, Tag("native")], Discriminator(_task_source)
]

# --- engines and servers --------------------------------------------------------------------------


class ServerBase(Strict):
    """What every server that we start understands."""

    replicas: Whole = Field(default=1, ge=1)
    args: dict[str, Any] = Field(default_factory=dict)
    """The server's own options: {dtype: float32} becomes --dtype float32; true is a bare flag; false and null are
    left out."""
    env: dict[str, str] = Field(default_factory=dict)
    python: str | None = None
    """Interpreter that has the server installed."""
    start_timeout_s: Number = Field(default=600.0, gt=0)
    restarts: Whole = Field(default=2, ge=0)
    """How many times a server that dies or stalls is started again."""
    stall_s: Number = Field(default=300.0, gt=0)
    """A server with requests that answers none and computes nothing for so long is started again."""
    gpus: Literal["auto"] | Annotated[Whole, Field(ge=0)] = 0
    """GPUs for each replica, over all of its nodes; auto: as many as the model's size and attention heads say."""

    @property
    def gpu_count(self) -> int:
        """`gpus`, once it is a number. Raises ValueError while it is `auto`."""
        if isinstance(self.gpus, str):
            raise ValueError("`gpus: auto` has not been decided yet")
        return self.gpus


class LlamaCppServer(ServerBase):
    """llama.cpp through xllamacpp: the embedded default."""

    type: Literal["llama.cpp"] = "llama.cpp"
    slots: Whole = Field(default=8, ge=1)
    context: Whole = Field(default=2048, ge=16)
    """Tokens for each slot."""
    threads: Whole | None = None


class VllmServer(ServerBase):
    type: Literal["vllm"] = "vllm"
    swap: Literal["restart", "reload"] = "restart"
    """What a worker does that goes on to another checkpoint of the same model: start a server for it, or load its
    weights into the one that runs. The latter opens vLLM's routes for developers, on this machine only."""


class SglangServer(ServerBase):
    type: Literal["sglang"] = "sglang"


class CommandServer(ServerBase):
    """Any server: an argument list with {port} {model} {host} {api_key_file} {name} placeholders, or a shell line.

    Across nodes also {node_rank}, {nodes}, {master_port}; several servers in a job: {server_id}.
    """

    type: Literal["command"] = "command"
    argv: Texts | None = Field(default=None, min_length=1)
    shell: str | None = None
    health: str = "/health"

    @model_validator(mode="after")
    def _one_command(self) -> Self:
        if (self.argv is None) == (self.shell is None):
            raise ValueError("needs either `argv:` (a list, no shell) or `shell:` (one line for /bin/sh)")
        return self


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
    max_length: Whole | None = None
    """The window in tokens; None: the profile's (2048 for local-completions) or the model's own."""
    truncation: Literal["fail", "truncate_left"] = "fail"
    """A prompt that does not fit the window fails, by name; or it is cut from the left as lm-eval does, and counted."""
    add_bos_token: bool | None = None
    max_gen_toks: Whole | None = None
    loglikelihood: Literal["auto", "echo", "cached-echo", "next-token", "forced"] = "auto"
    """How log-likelihoods are measured; auto: by the cheapest way that the server was seen to do rightly."""
    batch_size: Whole | None = Field(default=None, ge=1)
    """Prompts in one HTTP call, for log-likelihood by echo; None: the choices of one question."""
    max_in_flight: Whole = Field(default=1024, ge=1)
    """The most requests at a time at each server; how many there are is found."""
    client_processes: Whole = Field(default=1, ge=1, le=64)
    """Processes that ask the servers of each worker and share `max_in_flight`; llama.cpp is asked by one."""
    timeout_s: Number = Field(default=600.0, gt=0)
    retries: Whole = Field(default=5, ge=0)
    seed: Whole = 1234
    extra_body: dict[str, Any] = Field(default_factory=dict)
    dialect: Literal["auto", "vllm", "sglang", "llama.cpp", "openai"] = "auto"
    """Whose sampling fields the server takes; auto: by its name, else by what it answers."""
    template_date: str = Field(default="2024-07-26", pattern=r"^\d{4}-\d{2}-\d{2}$")
    """What a chat template that prints the date takes for today."""


class LmEvalModelEngine(Strict):
    """Any model class of lm-eval, in a process of its own, fed in slices."""

    type: Literal["lm_eval"] = "lm_eval"
    model: str = "hf"
    model_args: dict[str, Any] = Field(default_factory=dict)
    batch_size: Annotated[int | str, BeforeValidator(_batch_size)] = 1
    device: str | None = None
    slice_size: Whole = Field(default=256, ge=1)
    """Requests handed over, and journaled, at a time: at most so many, fewer where they take long."""
    python: str | None = None
    gpus: Whole = Field(default=0, ge=0)


class FakeEngine(Strict):
    """Answers from a hash of the question, without a model: for trying out a configuration."""

    type: Literal["fake"] = "fake"
    latency_s: Number = Field(default=0.0, ge=0)


def _engine_type(value: object) -> object:
    """`type`, which may be left out for openai."""
    if isinstance(value, Mapping):
        return value.get("type", "openai")  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
    return getattr(value, "type", None)


EngineSpec = Annotated[
    Annotated[OpenAIEngine, Tag("openai")]
    | Annotated[LmEvalModelEngine, Tag("lm_eval")]
    | Annotated[FakeEngine, Tag("fake")],
    Discriminator(_engine_type),
]

# --- launch ---------------------------------------------------------------------------------------


class LocalLaunch(Strict):
    """Workers as child processes on this machine."""

    type: Literal["local"] = "local"
    workers: Whole = Field(default=1, ge=1)
    """Workers for each model."""
    gpus: tuple[Whole, ...] | None = None
    """Physical ids that may be used; None: CUDA_VISIBLE_DEVICES, else all that nvidia-smi lists."""
    slots_per_gpu: Whole = Field(default=1, ge=1)
    max_workers: Whole = Field(default=16, ge=1)
    """Workers running at a time."""


Line = Annotated[str, AfterValidator(one_line), Field(min_length=1)]
"""Text that can stand in a line of a job script."""
Lines = Annotated[tuple[Line, ...], BeforeValidator(_listed, json_schema_input_type=str | tuple[str, ...])]
SlurmTime = Annotated[str, BeforeValidator(time_text, json_schema_input_type=int | str)]
"""Minutes, m:s, h:m:s, d-h, d-h:m or d-h:m:s; 0: no limit."""
SlurmTimeOrAuto = Annotated[str, BeforeValidator(time_or_auto, json_schema_input_type=int | str)]
SbatchOptions = Annotated[
    dict[str, bool | int | float | Line | None], BeforeValidator(options, json_schema_input_type=dict[str, Any])
]
GpuFlagStyle = Literal["none", "gpus", "gres"]
RequeuePolicy = Literal["auto", "requeue", "successor", "never"]


def _variable_names(value: dict[str, str]) -> dict[str, str]:
    for name in value:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise ValueError(f"{name!r} cannot be the name of an environment variable")
    return value


Variables = Annotated[dict[str, str], AfterValidator(_variable_names)]


class SlurmEnvironment(Strict):
    """How a job comes to the Python that has Proctor. With nothing stated: the interpreter that submits."""

    modules: Lines = ()
    """Loaded first, in this order."""
    command: Texts = ()
    """Lines of shell, run as they stand after the modules."""
    venv: Line | None = None
    """Directory of a virtual environment."""
    conda: Line | None = None
    """Name or directory of a conda environment."""
    conda_sh: Line | None = None
    """conda's profile script (…/etc/profile.d/conda.sh), where `conda` is no command on the nodes."""
    pixi: Line | None = None
    """A pixi manifest (pixi.toml)."""
    pixi_env: Line | None = None
    python: Line | None = None
    """The interpreter; None: that of the environment, else the one that submits."""

    @model_validator(mode="after")
    def _one_environment(self) -> Self:
        stated = [key for key in ("venv", "conda", "pixi") if getattr(self, key) is not None]
        if len(stated) > 1:
            raise ValueError(f"has {' and '.join(f'`{key}:`' for key in stated)}; give one of them")
        for key, needs in (("conda_sh", "conda"), ("pixi_env", "pixi")):
            if getattr(self, key) is not None and getattr(self, needs) is None:
                raise ValueError(f"`{key}:` belongs to `{needs}:`")
        return self


class ContainerSpec(Strict):
    """A container around each model server. The worker itself, which talks to Slurm, runs outside."""

    type: Literal["none", "apptainer", "singularity", "pyxis", "enroot", "charliecloud", "podman"] | None = None
    image: Line | None = None
    """Without one there is no container."""
    args: Lines = ()
    """Further options of the container's program, such as --nv."""
    binds: Lines = ()
    """Directories that are seen inside: /data, /data:/inside or /data:/inside:ro."""


class StagingSpec(Strict):
    """Weights copied to a disk of the node before the server starts: one copy a node, removed at the end."""

    directory: Line | None = None
    """On the node; may name variables of the job, such as $SLURM_TMPDIR. None: weights are read where they are."""
    check_space: bool = True
    """Read from the shared file system instead where the node has too little room."""


class ScoringSpec(Strict):
    """The job without GPUs that marks the answers when the workers have ended."""

    enabled: bool = True
    partition: Line | None = None
    cpus: Whole | None = Field(default=None, ge=1)
    memory: Line | None = None
    time_limit: SlurmTime | None = None


class SlurmLaunch(Strict):
    """Workers as elements of a Slurm array. What is not stated is the cluster profile's."""

    type: Literal["slurm"] = "slurm"
    cluster: Line | None = None
    """Name of a profile; None: the one whose pattern fits this machine's name."""
    workers: Literal["auto"] | Annotated[Whole, Field(ge=1)] = "auto"
    """Array elements for all models that need the same resources; auto: as many as pay."""
    throttle: Whole | None = Field(default=None, ge=1)
    """The most that run at a time."""
    partition: Line | None = None
    account: Line | None = None
    qos: Line | None = None
    time_limit: SlurmTimeOrAuto | None = None
    """auto: from the forecast."""
    max_time: SlurmTime | None = None
    """The longest that `time_limit: auto` may ask for."""
    cpus: Whole | None = Field(default=None, ge=1)
    """For each node of a job."""
    memory: Line | None = None
    """For each node of a job, such as 64G; 0: all of the node's."""
    gpu_flag_style: GpuFlagStyle | None = None
    """How GPUs are asked for: --gres=gpu:N, --gpus=N, or not at all."""
    gpu_type: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+$")] | None = None
    """As in --gres=gpu:TYPE:N."""
    nodes_per_server: Whole | None = Field(default=None, ge=1)
    servers: Whole | None = Field(default=None, ge=1)
    """Servers in each job."""
    swap: bool | None = None
    """Whether a worker goes on to the next model when its own has nothing left."""
    signal_lead_s: Whole | None = Field(default=None, ge=30, le=65_535)
    """How long before the time limit a worker starts to end in order."""
    requeue: RequeuePolicy | None = None
    """How a job that runs out of time goes on; auto: by requeue, or by a successor where that is refused."""
    max_attempts: Whole | None = Field(default=None, ge=1)
    """Of one array element, its requeues and successors included."""
    queue_limit: Whole | None = Field(default=None, ge=1)
    """Jobs that one user may have in the queue."""
    environment: SlurmEnvironment | None = None
    """Replaces the profile's as a whole."""
    container: ContainerSpec | None = None
    """Merged over the profile's."""
    staging: StagingSpec | None = None
    """Merged over the profile's."""
    sbatch: SbatchOptions = Field(default_factory=dict)
    """Further options of sbatch, over the profile's: {reservation: eval, exclusive: true}."""
    env: Variables = Field(default_factory=dict)
    """Environment variables of the job, over the profile's. Not for secrets: see `pass_env`."""
    pass_env: Lines = ()
    """Names of variables that are handed over from the shell that submits."""
    offline: bool | None = None
    """Whether nodes are told that there is no hub (HF_HUB_OFFLINE and the like)."""
    scoring: ScoringSpec | None = None
    """Merged over the profile's."""

    @field_validator("pass_env")
    @classmethod
    def _names(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        _variable_names(dict.fromkeys(value, ""))
        return value


def _launch_type(value: object) -> object:
    """`type`, which may be left out for local."""
    if isinstance(value, Mapping):
        return value.get("type", "local")  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
    return getattr(value, "type", None)


LaunchSpec = Annotated[
    Annotated[LocalLaunch, Tag("local")] | Annotated[SlurmLaunch, Tag("slurm")], Discriminator(_launch_type)
]


# --- plan -----------------------------------------------------------------------------------------


class PlanSpec(Strict):
    """How what is owed becomes shards, which workers claim."""

    strategy: Literal["balanced", "naive", "size", "workers"] = "balanced"
    """balanced cuts by cost, large shards first; the others are OpenCompass's partitioners."""
    n: Whole = Field(default=1, ge=1)
    """naive: tasks in a shard."""
    max_task_size: Whole = Field(default=40_000, ge=1)
    """size: what a shard costs at most."""
    gen_task_coef: Whole = Field(default=20, ge=1)
    """size: what a generation costs; a log-likelihood costs 1 for each choice."""
    num_worker: Whole | None = Field(default=None, ge=1)
    """workers: shards; None: the launch's workers."""
    num_split: Whole | None = Field(default=None, ge=1)
    """workers: parts of a task; None: num_worker."""
    min_task_size: Whole = Field(default=16, ge=1)
    """workers: documents in a part at least."""
    split: bool = False
    """size, workers: every part is a shard; small ones are not merged."""


class RunSpec(Strict):
    """A whole run."""

    name: str
    store: str = "./store"
    runs: str = "./runs"
    models: dict[str, ModelSpec] = Field(min_length=1)
    tasks: tuple[TaskSpec, ...] = Field(min_length=1)
    engine: EngineSpec = Field(default_factory=OpenAIEngine)
    launch: LaunchSpec = Field(default_factory=LocalLaunch)
    plan: PlanSpec = Field(default_factory=PlanSpec)
    profile: Literal["default", "reproducible"] = "default"
    """reproducible: float32, fixed batching, one request at a time."""

    @field_validator("name")
    @classmethod
    def _usable_name(cls, value: str) -> str:
        fault = name_fault(value)
        if fault is not None:
            raise ValueError(fault)
        return value

    @field_validator("models")
    @classmethod
    def _usable_model_names(cls, value: dict[str, ModelSpec]) -> dict[str, ModelSpec]:
        for name in value:
            fault = name_fault(name)
            if fault is not None:
                raise ValueError(f"the name of a model {fault}")
        return value
