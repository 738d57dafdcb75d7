"""A network of a bridge, and a network namespace for each node."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

from .layout import ClusterError, Place


def make_network(place: Place, nodes: Sequence[str]) -> None:
    """A bridge with one cable to each node; nodes reach each other and this machine, nothing else."""
    if not Path("/sys/class/net", place.bridge).exists():
        ip("link", "add", place.bridge, "type", "bridge")
        ip("addr", "add", f"{place.controller}/24", "dev", place.bridge)
        ip("link", "set", place.bridge, "up")
    for node in nodes:
        namespace = place.namespace(node)
        if Path("/run/netns", namespace).exists():
            continue
        cable = f"{place.bridge}.{node[1:]}"
        subprocess.run(["ip", "link", "del", cable], capture_output=True, check=False)
        ip("netns", "add", namespace)
        ip("link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", namespace)
        ip("link", "set", cable, "master", place.bridge, "up")
        ip("-n", namespace, "addr", "add", f"{place.address(node)}/24", "dev", "eth0")
        ip("-n", namespace, "link", "set", "eth0", "up")
        ip("-n", namespace, "link", "set", "lo", "up")


def remove_network(place: Place, nodes: Sequence[str]) -> None:
    for node in nodes:
        if Path("/run/netns", place.namespace(node)).exists():
            ip("netns", "del", place.namespace(node))
        # A namespace that a dying process still holds gives its end of the cable back late.
        subprocess.run(["ip", "link", "del", f"{place.bridge}.{node[1:]}"], capture_output=True, check=False)
    if Path("/sys/class/net", place.bridge).exists():
        ip("link", "del", place.bridge)


def ip(*words: str) -> None:
    call("ip", *words)


def call(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    if done.returncode != 0:
        raise ClusterError(f"{' '.join(command)}: {(done.stderr or done.stdout).strip()[-2000:]}")
