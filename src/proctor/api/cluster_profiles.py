"""Clusters: which there are, which one this is, and what a run's jobs become on one."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from proctor.api.context import RunContext
from proctor.config.clusters import (
    Choice,
    ClusterProfile,
    SlurmSettings,
    choose,
    detect,
    load_profiles,
    resolve_launch,
    user_files,
)
from proctor.config.clusters.choice import HostNames
from proctor.config.clusters.files import user_places
from proctor.config.clusters.settings import effective
from proctor.config.engines import launch_for
from proctor.config.load import load_run
from proctor.config.spec import SlurmLaunch
from proctor.errors import ConfigError, UnknownName

HOSTS: Final[HostNames] = (socket.gethostname, socket.getfqdn)


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownClusters:
    """The profiles that can be named from here."""

    profiles: tuple[ClusterProfile, ...]
    """In the order in which they are looked through."""
    choice: Choice | None
    """The one that a run which names none would use."""
    hosts: tuple[str, ...]
    files: tuple[str, ...]
    """The user's files that were read."""
    places: tuple[str, ...]
    """Where such files are looked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedCluster:
    """One cluster as the jobs of a run would use it."""

    profile: ClusterProfile
    reason: str
    """Why this one."""
    settings: SlurmSettings
    values: Mapping[str, Any]
    """Every key of a profile with the value that is used."""


def clusters(
    config: str | Path | None = None, *, environ: Mapping[str, str] | None = None, hosts: HostNames = HOSTS
) -> KnownClusters:
    """Every profile, and the one that would be used. Raises ConfigError for a file of profiles that is malformed."""
    environ = os.environ if environ is None else environ
    files = user_files(environ, _beside(config))
    profiles = load_profiles(files, environ)
    try:
        choice = choose(profiles, stated=None, environ=environ, hosts=hosts)
    except UnknownName:
        choice = None
        if environ.get("PROCTOR_CLUSTER"):
            raise
    return KnownClusters(
        profiles=tuple(profiles.values()),
        choice=choice,
        hosts=tuple(ask() for ask in hosts) if choice is None else (),
        files=tuple(map(str, files)),
        places=tuple(map(str, user_places(_beside(config)))),
    )


def detect_cluster(
    config: str | Path | None = None, *, environ: Mapping[str, str] | None = None, hosts: HostNames = HOSTS
) -> Choice:
    """The profile that fits this machine's name, whatever is chosen otherwise. Raises UnknownName if none does."""
    environ = os.environ if environ is None else environ
    profiles = load_profiles(user_files(environ, _beside(config)), environ)
    return detect(profiles, hosts) or choose(profiles, stated=None, environ={}, hosts=hosts)


def resolve_cluster(
    name: str | None = None,
    config: str | Path | None = None,
    overrides: Sequence[str] = (),
    *,
    environ: Mapping[str, str] | None = None,
    hosts: HostNames = HOSTS,
) -> ResolvedCluster:
    """A cluster with everything that goes over its profile: the environment and, with `config`, the run's launch.

    `name` goes before what the run names. Raises ConfigError, UnknownName.
    """
    environ = os.environ if environ is None else environ
    return _resolved(_launch(config, overrides), name, config, overrides, environ, hosts)


def resolve_clusters(
    context: RunContext, *, environ: Mapping[str, str] | None = None, hosts: HostNames = HOSTS
) -> list[ResolvedCluster]:
    """Every cluster, as differently as it is used, that the run's models are sent to; none where all stay here.

    Raises ConfigError, UnknownName.
    """
    environ = os.environ if environ is None else environ
    launches: list[SlurmLaunch] = []
    for name in context.spec.models:
        launch = launch_for(context.spec, name)
        if isinstance(launch, SlurmLaunch) and launch not in launches:
            launches.append(launch)
    return [_resolved(x, None, context.config, context.overrides, environ, hosts) for x in launches]


def _resolved(
    launch: SlurmLaunch,
    name: str | None,
    config: str | Path | None,
    overrides: Sequence[str],
    environ: Mapping[str, str],
    hosts: HostNames,
) -> ResolvedCluster:
    profiles = load_profiles(user_files(environ, _beside(config)), environ)
    where = "this command" if name else f"launch.cluster of {str(config)!r}"
    choice = choose(profiles, stated=name or launch.cluster, environ=environ, hosts=hosts, where=where)
    settings = resolve_launch(launch, choice.profile, environ, origins=stated_by(overrides))
    values = effective(choice.profile, settings)
    return ResolvedCluster(profile=choice.profile, reason=choice.reason, settings=settings, values=values)


def settings_by_model(
    context: RunContext, environ: Mapping[str, str], *, only: Iterable[str] | None = None
) -> dict[str, SlurmSettings]:
    """What the jobs of each entry of `models:`, or of those in `only`, are on this cluster; all checkpoints of one have
    the same.

    Raises ConfigError for an entry whose launcher is not Slurm, UnknownName for a cluster that no profile knows.
    """
    profiles = load_profiles(user_files(environ, context.config.resolve().parent), environ)
    found: dict[str, SlurmSettings] = {}
    for name in context.spec.models if only is None else only:
        launch = launch_for(context.spec, name)
        if not isinstance(launch, SlurmLaunch):
            raise ConfigError(
                f"launch.type of model {name!r} is {launch.type!r}: only `slurm` can be submitted",
                hint="`proctor run` does the work on this machine; or write `launch: {type: slurm, cluster: NAME}`",
            )
        choice = choose(profiles, stated=launch.cluster, environ=environ, hosts=HOSTS)
        found[name] = resolve_launch(launch, choice.profile, environ, origins=stated_by(context.overrides))
    return found


def stated_by(overrides: Sequence[str]) -> dict[str, str]:
    """Keys of a launch that `--set` states → that it does."""
    targets = [o.partition("=")[0].strip() for o in overrides]
    return {t.removeprefix("launch."): f"--set {t}" for t in targets if t.startswith("launch.")}


def _launch(config: str | Path | None, overrides: Sequence[str]) -> SlurmLaunch:
    if config is None:
        if overrides:
            raise ConfigError("--set changes a configuration, and none is named", hint="add --config run.yaml")
        return SlurmLaunch()
    launch = load_run(config, overrides).launch
    if isinstance(launch, SlurmLaunch):
        return launch
    raise ConfigError(
        f"launch.type of {str(config)!r} is {launch.type!r}, which uses no cluster",
        hint="write `launch: {type: slurm}`, or add --set launch='{type: slurm}'",
    )


def _beside(config: str | Path | None) -> Path:
    return Path.cwd() if config is None else Path(config).absolute().parent
