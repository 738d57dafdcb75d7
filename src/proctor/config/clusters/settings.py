"""What a job of a run becomes on a cluster: profile < user's environment < run.yaml, and what came from where."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, cast

from proctor.config.clusters.profile import ClusterProfile
from proctor.config.slurm_values import option, seconds, time_or_auto
from proctor.config.spec import GpuFlagStyle, RequeuePolicy, ScoringSpec, SlurmEnvironment, SlurmLaunch
from proctor.errors import ConfigError
from proctor.processes.container import Bind, Container


@dataclass(frozen=True, slots=True, kw_only=True)
class Override:
    """A value of a profile that something else has replaced."""

    key: str
    profile_value: Any
    value: Any
    source: str
    """run.yaml, --set, or the environment variable."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Staging:
    """Where weights are copied to on a node."""

    directory: str
    """May name variables of the job (`$NAME`)."""
    check_space: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoringJob:
    """What the job that marks the answers asks for."""

    partition: str | None
    cpus: int
    memory: str | None
    time_limit_s: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class SlurmSettings:
    """Everything that a job script and a submitter need to know of a cluster, spelt out."""

    cluster: str
    workers: int | None
    """None: as many as pay."""
    throttle: int | None
    partition: str | None
    account: str | None
    qos: str | None
    time_limit_s: int | None
    """None: no limit, or `auto_time`."""
    auto_time: bool
    """The limit is for the forecast to say."""
    max_time_s: int | None
    cpus: int | None
    memory: str | None
    gpus_per_node: int | None
    gpu_type: str | None
    gpu_flag_style: GpuFlagStyle
    nodes_per_server: int
    servers: int
    swap: bool
    signal_lead_s: int
    requeue: RequeuePolicy
    max_attempts: int
    queue_limit: int | None
    array_limit: int | None
    shared: tuple[str, ...]
    environment: SlurmEnvironment
    container: Container | None
    staging: Staging | None
    sbatch: Mapping[str, Any]
    env: Mapping[str, str]
    pass_env: tuple[str, ...]
    offline: bool
    scoring: ScoringJob | None
    overrides: tuple[Override, ...] = field(default=())

    @property
    def nodes(self) -> int:
        """Nodes of each job."""
        return self.nodes_per_server * self.servers


def _text(value: str) -> str | None:
    return value or None


def _number(value: str) -> int:
    number = int(value)
    if number < 1:
        raise ValueError("must be 1 or more")
    return number


def _style(value: str) -> str:
    if value.lower() not in ("none", "gpus", "gres"):
        raise ValueError("valid: none, gpus, gres")
    return value.lower()


def _flag(value: str) -> bool:
    return value.lower() not in ("0", "false", "no", "off", "")


_ENVIRONMENT: Final[tuple[tuple[str, Callable[[str], Any], tuple[str, ...]], ...]] = (
    ("partition", _text, ("PROCTOR_PARTITION", "PARTITION", "SBATCH_PARTITION")),
    ("account", _text, ("PROCTOR_ACCOUNT", "ACCOUNT", "SBATCH_ACCOUNT")),
    ("qos", _text, ("PROCTOR_QOS", "SBATCH_QOS")),
    ("time_limit", time_or_auto, ("PROCTOR_TIME_LIMIT",)),
    ("queue_limit", _number, ("PROCTOR_QUEUE_LIMIT", "QUEUE_LIMIT")),
    ("gpus_per_node", _number, ("PROCTOR_GPUS_PER_NODE", "GPUS_PER_NODE")),
    ("gpu_flag_style", _style, ("PROCTOR_GPU_FLAG_STYLE", "SLURM_GPU_FLAG_STYLE")),
    ("memory", _text, ("PROCTOR_MEMORY", "SLURM_MEM")),
    ("container.type", _text, ("PROCTOR_CONTAINER",)),
    ("container.image", _text, ("PROCTOR_CONTAINER_IMAGE", "EVAL_CONTAINER_IMAGE")),
    ("container.args", lambda v: tuple(shlex.split(v)), ("PROCTOR_CONTAINER_ARGS", "SINGULARITY_ARGS")),
    ("staging.directory", _text, ("PROCTOR_STAGING",)),
    ("offline", _flag, ("PROCTOR_OFFLINE", "HF_HUB_OFFLINE")),
    ("sbatch.nodelist", _text, ("NODELIST",)),
)
"""Key of a profile, and the variables of the user's environment that go before it: Proctor's own, then oellm's, then
sbatch's, which sbatch itself would otherwise put before what the script says."""
VARIABLES: Final = tuple(name for _, _, names in _ENVIRONMENT for name in names)

_NESTED: Final = ("container", "staging", "scoring", "sbatch", "env")
_SCORING_CPUS: Final = 4
_SCORING_TIME: Final = "2:00:00"


def resolve_launch(
    launch: SlurmLaunch,
    profile: ClusterProfile,
    environ: Mapping[str, str],
    *,
    origins: Mapping[str, str] | None = None,
) -> SlurmSettings:
    """Every value of a launch, from the first of run.yaml, the user's environment and the profile that states it.

    `origins` says for keys of `launch` where they were stated, if not in run.yaml. A variable of the job (`env`)
    that the user's environment has is taken from there. Raises ConfigError for a value of the environment that
    cannot be meant, naming the variable, and for a container or bind that cannot be.
    """
    values = flat(profile.model_dump())
    state = _Values(values)
    for key, parse, names in _ENVIRONMENT:
        name = next((n for n in names if n in environ), None)
        if name is not None:
            state.put(key, _parsed(name, environ[name], parse), f"the environment variable {name}")
    for key in [k for k in values if k.startswith("env.") and k.removeprefix("env.") in environ]:
        name = key.removeprefix("env.")
        state.put(key, environ[name], f"the environment variable {name}")
    stated = flat(launch.model_dump(exclude_unset=True, exclude_none=True))
    for key, value in stated.items():
        source = (origins or {}).get(key) or (origins or {}).get(key.partition(".")[0]) or "run.yaml"
        state.put(key, value, source)
    return _settings(launch, profile, state)


def flat(value: Mapping[str, Any]) -> dict[str, Any]:
    """The nested settings under dotted keys; everything else as it is."""
    out: dict[str, Any] = {}
    for key, item in value.items():
        if key in _NESTED and isinstance(item, Mapping):
            out |= {f"{key}.{name}": below for name, below in cast("Mapping[str, Any]", item).items()}
        else:
            out[key] = item
    return out


def effective(profile: ClusterProfile, settings: SlurmSettings) -> dict[str, Any]:
    """Every key of the profile, and those that overrides added, with the value that is used."""
    values = flat(profile.model_dump(exclude={"name", "source", "description"}))
    return values | {override.key: override.value for override in settings.overrides}


class _Values:
    """Settings under dotted keys, and which of them are no longer the profile's."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._profile = dict(values)
        self._values = dict(values)
        self._sources: dict[str, str] = {}

    def put(self, key: str, value: Any, source: str) -> None:
        self._values[key] = value
        self._sources[key] = source

    def __getitem__(self, key: str) -> Any:
        return self._values.get(key)

    def below(self, key: str) -> dict[str, Any]:
        prefix = key + "."
        found = {k.removeprefix(prefix): v for k, v in self._values.items() if k.startswith(prefix)}
        return {k: v for k, v in found.items() if v is not None}

    def overrides(self) -> tuple[Override, ...]:
        known = self._profile.keys()
        return tuple(
            Override(key=key, profile_value=self._profile.get(key), value=self._values[key], source=source)
            for key, source in self._sources.items()
            if self._values[key] != self._profile.get(key) and (key in known or key.partition(".")[0] in _NESTED)
        )


def _parsed(name: str, text: str, parse: Callable[[str], Any]) -> Any:
    try:
        return parse(text)
    except ValueError as error:
        raise ConfigError(
            f"the environment variable {name} is {text!r}: {error}", hint=f"unset {name}, or correct it"
        ) from None


def _settings(launch: SlurmLaunch, profile: ClusterProfile, v: _Values) -> SlurmSettings:
    limit = v["time_limit"]
    scoring = ScoringSpec.model_validate(v.below("scoring"))
    return SlurmSettings(
        cluster=profile.name,
        workers=None if launch.workers == "auto" else launch.workers,
        throttle=v["throttle"],
        partition=v["partition"],
        account=v["account"],
        qos=v["qos"],
        time_limit_s=None if limit == "auto" else seconds(limit),
        auto_time=limit == "auto",
        max_time_s=None if v["max_time"] is None else seconds(v["max_time"]),
        cpus=v["cpus"],
        memory=v["memory"],
        gpus_per_node=v["gpus_per_node"],
        gpu_type=v["gpu_type"],
        gpu_flag_style=v["gpu_flag_style"],
        nodes_per_server=launch.nodes_per_server or 1,
        servers=launch.servers or 1,
        swap=launch.swap is not False,
        signal_lead_s=v["signal_lead_s"],
        requeue=v["requeue"],
        max_attempts=v["max_attempts"],
        queue_limit=v["queue_limit"],
        array_limit=profile.array_limit,
        shared=profile.shared,
        environment=launch.environment or profile.environment,
        container=_container(v.below("container"), profile.shared),
        staging=_staging(v.below("staging")),
        sbatch={option(name): value for name, value in v.below("sbatch").items() if value is not False},
        env=v.below("env"),
        pass_env=launch.pass_env,
        offline=v["offline"],
        scoring=_scoring(scoring, v) if scoring.enabled else None,
        overrides=v.overrides(),
    )


def _container(values: Mapping[str, Any], shared: tuple[str, ...]) -> Container | None:
    kind, image = values.get("type"), values.get("image")
    if kind == "none" or image is None:
        return None
    if kind is None:
        raise ConfigError(
            f"the container image {image!r} has no `type:`",
            hint="launch.container.type: apptainer, singularity, pyxis, enroot, charliecloud or podman",
        )
    valid = ("apptainer", "singularity", "pyxis", "enroot", "charliecloud", "podman")
    if kind not in valid:
        raise ConfigError(f"unknown type of container {kind!r}; valid: {', '.join(valid)}, none")
    binds = tuple(Bind.parse(text) for text in (*values.get("binds", ()), *shared))
    return Container(type=kind, image=image, args=tuple(values.get("args", ())), binds=binds)


def _staging(values: Mapping[str, Any]) -> Staging | None:
    directory = values.get("directory")
    return None if directory is None else Staging(directory=directory, check_space=values.get("check_space", True))


def _scoring(spec: ScoringSpec, v: _Values) -> ScoringJob:
    return ScoringJob(
        partition=spec.partition or v["partition"],
        cpus=spec.cpus or _SCORING_CPUS,
        memory=spec.memory,
        time_limit_s=seconds(spec.time_limit or _SCORING_TIME),
    )
