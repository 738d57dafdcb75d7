"""Which cluster this is: a choice goes before the host's name, and nothing is guessed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Final

from proctor.config.clusters.profile import ClusterProfile
from proctor.errors import UnknownName

VARIABLE: Final = "PROCTOR_CLUSTER"

HostNames = tuple[Callable[[], str], ...]
"""This machine's names, shortest way first; each is asked only if those before it fit nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A profile and why it is this one."""

    profile: ClusterProfile
    reason: str


def detect(profiles: Mapping[str, ClusterProfile], hosts: HostNames) -> Choice | None:
    """The first profile with a pattern that fits the host's name; if none fits, the same with its full name."""
    for ask in hosts:
        host = ask()
        for profile in profiles.values():
            fitting = next((p for p in profile.hosts if fnmatchcase(host, p)), None)
            if fitting is not None:
                return Choice(profile=profile, reason=f"this machine's name {host!r} fits {fitting!r}")
    return None


def choose(
    profiles: Mapping[str, ClusterProfile],
    *,
    stated: str | None,
    environ: Mapping[str, str],
    hosts: HostNames,
    where: str = "launch.cluster",
) -> Choice:
    """The profile that `stated` names (by `where`), else PROCTOR_CLUSTER, else the one that fits this machine.

    Raises UnknownName, with the profiles there are, for a name that is none and for a machine that fits none.
    """
    for name, reason in ((stated, where), (environ.get(VARIABLE), f"the environment variable {VARIABLE}")):
        if not name:
            continue
        if name not in profiles:
            raise UnknownName.among("cluster", name, profiles, hint="`proctor clusters` lists them and where they are")
        return Choice(profile=profiles[name], reason=f"named by {reason}")
    found = detect(profiles, hosts)
    if found is not None:
        return found
    names = " and ".join(dict.fromkeys(repr(ask()) for ask in hosts))
    raise UnknownName(
        f"this machine is called {names}, which no cluster profile knows; there are: {', '.join(profiles)}",
        hint="add --set launch.cluster=NAME, or `cluster: generic` for Slurm's own defaults; "
        "`proctor clusters` shows where a profile of your own goes",
    )
