"""What a server runs on, in words."""

from __future__ import annotations

import asyncio
import os
import platform
import shutil
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

_NVIDIA_SMI_S: Final = 20.0
"""nvidia-smi can hang for long on a sick driver; hardware is only a remark."""


async def describe_hardware(devices: Sequence[str] = ()) -> str:
    """The GPUs of these ids or UUIDs ("2 x NVIDIA H200"), or without any the processor and its usable cores."""
    if not devices:
        return f"{_processor()}, {usable_cores()} cores"
    names = await _gpu_names()
    counted = Counter(names.get(device, f"GPU {device}") for device in devices)
    return ", ".join(name if n == 1 else f"{n} x {name}" for name, n in counted.items())


def usable_cores() -> int:
    """The cores that this process may use."""
    with suppress(AttributeError):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


async def gpu_utilisation(devices: Sequence[str] = ()) -> float | None:
    """The highest utilisation, in percent, of the GPUs of these ids or UUIDs (none: of all); None if nobody tells."""
    used: list[float] = []
    for index, uuid, percent in await _ask_nvidia("index,uuid,utilization.gpu", "--format=csv,noheader,nounits"):
        if not devices or index in devices or uuid in devices:
            with suppress(ValueError):
                used.append(float(percent))
    return max(used, default=None)


async def gpu_memory(devices: Sequence[str] = ()) -> int | None:
    """Bytes of memory of the smallest GPU of these ids or UUIDs (none: of all); None if nobody tells."""
    found: list[int] = []
    for index, uuid, mebibytes in await _ask_nvidia("index,uuid,memory.total", "--format=csv,noheader,nounits"):
        if not devices or index in devices or uuid in devices:
            with suppress(ValueError):
                found.append(int(mebibytes) << 20)
    return min(found, default=None)


async def _gpu_names() -> dict[str, str]:
    names: dict[str, str] = {}
    for index, uuid, name in await _ask_nvidia("index,uuid,name", "--format=csv,noheader"):
        names[index] = names[uuid] = name
    return names


async def _ask_nvidia(fields: str, form: str) -> list[tuple[str, str, str]]:
    """Three fields of each GPU; none where the program is missing or does not answer."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    process = await asyncio.create_subprocess_exec(
        *(program, f"--query-gpu={fields}", form),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        output, _ = await asyncio.wait_for(process.communicate(), _NVIDIA_SMI_S)
    except TimeoutError:
        process.kill()
        await process.wait()
        return []
    rows = (line.split(",", 2) for line in output.decode(errors="replace").splitlines())
    return [(a.strip(), b.strip(), c.strip()) for a, b, c in (row for row in rows if len(row) == 3)]
