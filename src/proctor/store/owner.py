"""Who writes a file or holds a claim, and whether that process is still alive."""

from __future__ import annotations

import os
import pwd
import socket
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final, Self

import psutil

from proctor.records import Json

_START_TOLERANCE_S: Final = 2.0
"""psutil derives start times from the boot time, which the kernel adjusts by fractions of a second."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Owner:
    """One attempt of one process. A requeued job keeps its id, so the restart count tells attempts apart."""

    host: str
    machine: str = ""
    """machine-id, where there is one: tells hosts of the same name apart."""
    boot: str = ""
    """Boot id of the kernel."""
    namespace: str = ""
    """PID namespace: a pid says nothing to another container on the same kernel."""
    pid: int
    started: float
    """Unix time at which the process started."""
    run: str = ""
    cluster: str = ""
    job: str = ""
    array_task: str = ""
    restart: int = 0
    user: str = ""
    """Whose process it is; empty in what earlier versions wrote. A scheduler may hide the jobs of others."""

    @classmethod
    def here(cls, *, run: str = "", cluster: str = "", job: str = "", array_task: str = "", restart: int = 0) -> Self:
        """This process."""
        return cls(
            host=socket.gethostname(),
            machine=_read("/etc/machine-id"),
            boot=_read("/proc/sys/kernel/random/boot_id"),
            namespace=_namespace(),
            pid=os.getpid(),
            started=psutil.Process().create_time(),
            run=run,
            cluster=cluster,
            job=job,
            array_task=array_task,
            restart=restart,
            user=user_name(),
        )

    def to_json(self) -> dict[str, Json]:
        """A JSON object."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Json]) -> Self:
        """The inverse of `to_json`; fields of a later version are ignored. Raises KeyError, TypeError."""
        known = {name: value[name] for name in cls.__dataclass_fields__ if name in value}
        return cls(**known)

    @property
    def attempt(self) -> str:
        """A short name that no other attempt of this cluster or host has: 4711_3.1 (restart 1), or host:pid."""
        if not self.job:
            return f"{self.host}:{self.pid}"
        task = f"_{self.array_task}" if self.array_task else ""
        return f"{self.job}{task}.{self.restart}"

    def __str__(self) -> str:
        job = f" job {self.job}" if self.job else ""
        return f"process {self.pid} on {self.host}{job}" + (f" (run {self.run})" if self.run else "")


def user_name() -> str:
    """Of this process, by its effective id: the environment may say anything."""
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return str(os.geteuid())


Alive = Callable[[Owner], bool | None]
"""True: running. False: proven dead. None: cannot tell from here, which counts as alive."""


def alive(owner: Owner) -> bool | None:
    """What this machine knows of `owner`; None for owners of other machines and other containers."""
    if not owner.boot or owner.boot != _read("/proc/sys/kernel/random/boot_id"):
        same_machine = owner.host == socket.gethostname() and owner.machine == _read("/etc/machine-id")
        # The same machine under another boot id has been restarted since.
        return False if same_machine and owner.boot and owner.machine else None
    if owner.namespace != _namespace():
        return None
    try:
        process = psutil.Process(owner.pid)
        started = process.create_time()
        zombie = process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return None
    return not zombie and abs(started - owner.started) <= _START_TOLERANCE_S


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return ""


def _namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""
