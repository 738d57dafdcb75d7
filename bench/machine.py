"""What the numbers were measured on: cores, processor, versions, date. Never a path or a host's name."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import psutil


def machine() -> dict[str, Any]:
    """Cores, processor, memory, system, Python, and what else kept the machine busy when this was called."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 2**30),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "load_before": [round(x, 2) for x in os.getloadavg()],
    }


def versions(*names: str, python: Path | None = None) -> dict[str, str]:
    """The installed versions of packages, of this interpreter or another; a package that is not there is left out."""
    if python is None:
        return {name: found for name in names if (found := _version(name)) is not None}
    code = (
        "import importlib.metadata as m, json, sys\n"
        "installed = {d.metadata['Name'].lower().replace('_', '-'): d.version for d in m.distributions()}\n"
        "print(json.dumps({n: installed[n] for n in sys.argv[1:] if n in installed}))"
    )
    done = subprocess.run([str(python), "-c", code, *names], check=True, capture_output=True, text=True)
    return cast("dict[str, str]", json.loads(done.stdout))


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def heading(what: dict[str, Any], packages: dict[str, str]) -> str:
    """Two lines to put above a table."""
    first = f"{what['date']} · {what['cores']} cores of {what['processor']} · {what['memory_gb']} GB · {what['system']}"
    listed = ", ".join(f"{name} {version}" for name, version in packages.items())
    load = ", ".join(map(str, what["load_before"]))
    return f"{first}\nPython {what['python']} · {listed}\nload before: {load}"


if __name__ == "__main__":
    print(heading(machine(), versions(*sys.argv[1:])))
