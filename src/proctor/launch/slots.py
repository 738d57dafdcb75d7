"""Which GPUs there are, and who has which."""

from __future__ import annotations

import asyncio
import re
import shutil
from collections.abc import Mapping, Sequence
from typing import Final

from proctor.errors import LaunchError

VISIBLE: Final = "CUDA_VISIBLE_DEVICES"
_NVIDIA_SMI_S: Final = 30.0
_ENTRY: Final = re.compile(r"\d+|(GPU|MIG)-[\w./-]+")


class GpuSlots:
    """Devices with some slots each. A job takes slots on different devices, the first free ones in order."""

    def __init__(self, devices: Sequence[str], per_device: int = 1) -> None:
        self._free = dict.fromkeys(devices, per_device)
        self._per_device = per_device

    @property
    def devices(self) -> int:
        return len(self._free)

    @property
    def total(self) -> int:
        return len(self._free) * self._per_device

    @property
    def free(self) -> int:
        return sum(self._free.values())

    def take(self, number: int) -> tuple[str, ...] | None:
        """`number` devices with a free slot, now taken; None if there are not so many."""
        chosen = [device for device, free in self._free.items() if free > 0][:number]
        if len(chosen) < number:
            return None
        for device in chosen:
            self._free[device] -= 1
        return tuple(chosen)

    def give_back(self, devices: Sequence[str]) -> None:
        """The inverse of `take`."""
        for device in devices:
            self._free[device] += 1


def visible_devices(text: str) -> list[str]:
    """The devices that a value of CUDA_VISIBLE_DEVICES names: ids ascending, then UUIDs and MIG names as given.

    Negative ids and words such as NoDevFiles name none.
    """
    entries = list(dict.fromkeys(part.strip() for part in text.split(",")))
    known = [entry for entry in entries if _ENTRY.fullmatch(entry)]
    numbers = sorted({int(entry) for entry in known if entry.isdigit()})
    return [str(number) for number in numbers] + [entry for entry in known if not entry.isdigit()]


async def find_devices(wanted: Sequence[int] | None, environ: Mapping[str, str]) -> list[str]:
    """The devices that may be used: `wanted`, else what CUDA_VISIBLE_DEVICES names, else all of nvidia-smi.

    Raises LaunchError if `wanted` names one that CUDA_VISIBLE_DEVICES hides, or that does not exist.
    """
    visible = visible_devices(environ[VISIBLE]) if VISIBLE in environ else None
    if wanted is None:
        return await list_devices() if visible is None else visible
    chosen = [str(number) for number in sorted(set(wanted))]
    source = "nvidia-smi lists" if visible is None else f"{VISIBLE}={environ[VISIBLE]!r} shows"
    present = await list_devices() if visible is None else visible
    missing = [device for device in chosen if device not in present]
    if missing:
        raise LaunchError(
            f"launch.gpus: no GPU {', '.join(missing)}; {source} {', '.join(present) or 'none'}",
            hint=f"list only those, or leave `gpus` out to use all, or change {VISIBLE}",
        )
    return chosen


async def list_devices() -> list[str]:
    """Every GPU of the machine by index, one that is cut into MIG devices by their UUIDs; none without nvidia-smi."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    process = await asyncio.create_subprocess_exec(
        *(program, "-L"),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        output, _ = await asyncio.wait_for(process.communicate(), _NVIDIA_SMI_S)
    except TimeoutError:
        process.kill()
        await process.communicate()
        raise LaunchError(
            f"nvidia-smi does not answer within {_NVIDIA_SMI_S:g} s",
            hint=f"the driver hangs; set {VISIBLE} (empty for none) to go on without asking it",
        ) from None
    text = output.decode(errors="replace")
    # Without a driver nvidia-smi fails: a machine without GPUs, not an error.
    return parse_listing(text) if process.returncode == 0 else []


def parse_listing(text: str) -> list[str]:
    """The devices in the output of `nvidia-smi -L`."""
    found: dict[str, list[str]] = {}
    last = ""
    for line in text.splitlines():
        whole = re.match(r"GPU (\d+):", line)
        part = re.match(r"\s+MIG .*\(UUID:\s*(MIG-[^)\s]+)\)", line)
        if whole:
            last = whole.group(1)
            found[last] = []
        elif part and last:
            found[last].append(part.group(1))
    return [device for index, parts in found.items() for device in (parts or [index])]
