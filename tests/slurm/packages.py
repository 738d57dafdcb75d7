"""Slurm's programs on this machine: whether they can be there, and getting them."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from .layout import ClusterError

_PACKAGES: Final = {
    "slurmctld": "slurmctld",
    "slurmd": "slurmd",
    "sbatch": "slurm-client",
    "munged": "munge",
    "ip": "iproute2",
}
_PLUGINS: Final = ("slurm-wlm-basic-plugins",)
_ACCOUNTING_PACKAGES: Final = {"slurmdbd": "slurmdbd", "mariadbd": "mariadb-server"}
_ACCOUNTING_PLUGINS: Final = ("slurm-wlm-mysql-plugin",)
SEARCH: Final = os.pathsep.join(("/usr/sbin", "/usr/bin", "/sbin", "/bin", "/usr/local/sbin", "/usr/local/bin"))
_INSTALL_S: Final = 1200


def obstacle(*, accounting: bool = False) -> str | None:
    """Why there can be no cluster on this machine; None if there can."""
    if sys.platform != "linux":
        return f"a Slurm cluster needs Linux, not {sys.platform}"
    if os.geteuid() != 0:
        return "a Slurm cluster needs root (its daemons and network namespaces)"
    missing = _missing(accounting)
    if missing and shutil.which("apt-get") is None:
        return f"no {', '.join(missing)}, and no apt-get to install them"
    return None


def install(*, accounting: bool = False) -> None:
    """Get the missing packages. Raises ClusterError with apt's last words."""
    missing = _missing(accounting)
    if not missing:
        return
    packages = [*missing, *_PLUGINS, *(_ACCOUNTING_PLUGINS if accounting else ())]
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    with _no_services():
        for command in (
            ["apt-get", "update", "-qq"],
            ["apt-get", "install", "-y", "-qq", "--no-install-recommends", *packages],
        ):
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=_INSTALL_S)
            if done.returncode != 0 and "install" in command:
                raise ClusterError(f"{' '.join(command)} failed:\n{(done.stdout + done.stderr)[-2000:]}")


def _missing(accounting: bool) -> list[str]:
    wanted = _PACKAGES | (_ACCOUNTING_PACKAGES if accounting else {})
    missing = [package for program, package in wanted.items() if shutil.which(program, path=SEARCH) is None]
    if accounting and not any(Path("/usr/lib").glob("*/slurm-wlm/accounting_storage_mysql.so")) and not missing:
        # A hand-built Slurm keeps its plugins elsewhere; only the distribution's own is completed here.
        return list(_ACCOUNTING_PLUGINS) if Path("/etc/debian_version").exists() else []
    return missing


@contextlib.contextmanager
def _no_services() -> Iterator[None]:
    """Keep the packages' own daemons from being started while they are installed."""
    policy = Path("/usr/sbin/policy-rc.d")
    if policy.exists():
        yield
        return
    policy.write_text("#!/bin/sh\nexit 101\n")
    policy.chmod(0o755)
    try:
        yield
    finally:
        policy.unlink()
