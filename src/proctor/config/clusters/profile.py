"""The shape of a cluster profile."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from proctor.config.spec import (
    ContainerSpec,
    GpuFlagStyle,
    Line,
    Lines,
    RequeuePolicy,
    SbatchOptions,
    ScoringSpec,
    SlurmEnvironment,
    SlurmTime,
    SlurmTimeOrAuto,
    StagingSpec,
    Strict,
    Variables,
    Whole,
)


class ClusterProfile(Strict):
    """A cluster: what a run that names it (or is started on it) uses where it states nothing itself."""

    name: Line
    description: str = ""
    source: str = "packaged"
    """Where it was read: files, or packaged."""
    hosts: Lines = ()
    """Patterns of host names, as of a shell (`*`, `?`, `[a-z]`). None: never detected, only chosen."""
    partition: Line | None = None
    account: Line | None = None
    qos: Line | None = None
    gpus_per_node: Whole | None = Field(default=None, ge=0)
    """The most GPUs that a job can have on one node; None: not known."""
    gpu_type: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+$")] | None = None
    gpu_flag_style: GpuFlagStyle = "gres"
    cpus: Whole | None = Field(default=None, ge=1)
    memory: Line | None = None
    time_limit: SlurmTimeOrAuto = "auto"
    max_time: SlurmTime | None = None
    throttle: Whole | None = Field(default=None, ge=1)
    queue_limit: Whole | None = Field(default=None, ge=1)
    """Jobs that one user may have in the queue; None: no limit is known."""
    array_limit: Whole | None = Field(default=None, ge=1)
    """Elements of one array; None: as Slurm says (MaxArraySize)."""
    signal_lead_s: Whole = Field(default=120, ge=30, le=65_535)
    requeue: RequeuePolicy = "auto"
    max_attempts: Whole = Field(default=10, ge=1)
    shared: Lines = ()
    """Directories that all nodes see. Containers see them too."""
    environment: SlurmEnvironment = SlurmEnvironment()
    container: ContainerSpec = ContainerSpec()
    staging: StagingSpec = StagingSpec()
    sbatch: SbatchOptions = Field(default_factory=dict)
    env: Variables = Field(default_factory=dict)
    offline: bool = True
    """Whether nodes have no internet: they are told so."""
    scoring: ScoringSpec = ScoringSpec()
