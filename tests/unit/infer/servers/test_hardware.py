"""What hardware is called."""

from __future__ import annotations

from pathlib import Path

import pytest

from proctor.infer.servers.hardware import describe_hardware, gpu_memory, usable_cores

SMI = "#!/bin/sh\necho '0, GPU-aa, NVIDIA H200'\necho '1, GPU-bb, NVIDIA H200'\necho '2, GPU-cc, NVIDIA L4'\n"


@pytest.fixture
def smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    program = tmp_path / "nvidia-smi"
    program.write_text(SMI)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    return program


@pytest.mark.usefixtures("smi")
@pytest.mark.parametrize(
    ("devices", "shown"),
    [
        (["0", "1"], "2 x NVIDIA H200"),
        (["GPU-bb", "2"], "NVIDIA H200, NVIDIA L4"),
        (["MIG-77"], "GPU MIG-77"),
    ],
)
async def test_gpus_by_index_and_uuid(devices: list[str], shown: str) -> None:
    assert await describe_hardware(devices) == shown


async def test_without_devices_the_processor(smi: Path) -> None:
    assert (await describe_hardware()).endswith(f", {usable_cores()} cores")


async def test_without_nvidia_smi_the_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    assert await describe_hardware(["3", "4"]) == "GPU 3, GPU 4"


@pytest.mark.parametrize(("devices", "mebibytes"), [(["0", "GPU-bb"], 143771), ([], 23034), (["MIG-77"], None)])
async def test_memory_is_that_of_the_smallest(smi: Path, devices: list[str], mebibytes: int | None) -> None:
    smi.write_text("#!/bin/sh\necho '0, GPU-aa, 143771'\necho '1, GPU-bb, 143771'\necho '2, GPU-cc, 23034'\n")
    assert await gpu_memory(devices) == (None if mebibytes is None else mebibytes << 20)


async def test_memory_that_the_driver_does_not_tell(smi: Path) -> None:
    smi.write_text("#!/bin/sh\necho '0, GPU-aa, [N/A]'\n")
    assert await gpu_memory() is None
