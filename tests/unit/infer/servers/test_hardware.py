"""What hardware is called."""

from __future__ import annotations

from pathlib import Path

import pytest

from proctor.infer.servers.hardware import describe_hardware, usable_cores

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
