"""Sees what a node sends to places outside the cluster: a way out that leads nowhere, and a program that listens there.

Where there is no way out, an attempt fails before a packet is made, and nothing could be seen. What is watched is the
kernel's network: it does not matter which program, thread or library sends, and in which language.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from . import packets
from .network import ip
from .packets import READY

DEVICE: Final = "watched"


@dataclass(frozen=True, slots=True, kw_only=True)
class Watched:
    """One node's watcher."""

    namespace: str
    log: Path

    def sent(self) -> list[str]:
        """`protocol address port` of every packet that left for outside, or asked for a name."""
        return [line for line in self.log.read_text().splitlines() if line != READY]


@contextlib.contextmanager
def watching(namespace: str, cluster: str, log: Path) -> Iterator[Watched]:
    """Watch the network namespace, whose own network is `cluster` (such as 10.77.3.0/24)."""
    # A cable back to the node itself, without ARP, so that packets are sent although nobody is there.
    ip("-n", namespace, "link", "add", DEVICE, "type", "veth", "peer", "name", f"{DEVICE}-end")
    try:
        ip("-n", namespace, "link", "set", f"{DEVICE}-end", "up")
        ip("-n", namespace, "link", "set", DEVICE, "arp", "off")
        ip("-n", namespace, "addr", "add", "192.0.2.1/24", "dev", DEVICE)
        ip("-n", namespace, "link", "set", DEVICE, "up")
        ip("-n", namespace, "route", "add", "default", "dev", DEVICE)
        with contextlib.suppress(Exception):  # a kernel without IPv6
            ip("-n", namespace, "addr", "add", "2001:db8::1/64", "dev", DEVICE, "nodad")
            ip("-n", namespace, "-6", "route", "add", "default", "dev", DEVICE)
        argv = ["nsenter", f"--net=/run/netns/{namespace}", sys.executable, packets.__file__, cluster]
        with log.open("wb") as output, subprocess.Popen(argv, stdout=output) as process:
            try:
                until = time.monotonic() + 60
                while READY not in log.read_text():
                    assert process.poll() is None and time.monotonic() < until, "the watcher does not start"
                    time.sleep(0.05)
                yield Watched(namespace=namespace, log=log)
            finally:
                process.kill()
    finally:
        ip("-n", namespace, "link", "del", DEVICE)
