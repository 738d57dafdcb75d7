"""Which devices there are: environment, nvidia-smi, and what the configuration asks for."""

from __future__ import annotations

from pathlib import Path

import pytest

from proctor.errors import LaunchError
from proctor.launch.slots import find_devices, parse_listing, visible_devices

WHOLE = "GPU 0: NVIDIA H200 (UUID: GPU-1a)\nGPU 1: NVIDIA H200 (UUID: GPU-1b)\n"
CUT = """GPU 0: NVIDIA H200 (UUID: GPU-1a)
  MIG 1g.18gb     Device  0: (UUID: MIG-7f)
  MIG 1g.18gb     Device  1: (UUID: MIG-80)
GPU 1: NVIDIA H200 (UUID: GPU-1b)
"""


@pytest.mark.parametrize(
    ("text", "devices"),
    [
        ("0,1,2", ["0", "1", "2"]),
        ("3, 1,3", ["1", "3"]),
        ("10,9", ["9", "10"]),
        ("0,-1,2", ["0", "2"]),
        ("-1", []),
        ("", []),
        ("NoDevFiles", []),
        ("GPU-8932f937-d72c-4106-c12f-20bd9faed9f6,2", ["2", "GPU-8932f937-d72c-4106-c12f-20bd9faed9f6"]),
        ("MIG-GPU-8932f937-d72c/1/2", ["MIG-GPU-8932f937-d72c/1/2"]),
    ],
)
def test_visible_devices(text: str, devices: list[str]) -> None:
    assert visible_devices(text) == devices


def test_listing_prefers_the_parts_of_a_cut_gpu() -> None:
    assert parse_listing(WHOLE) == ["0", "1"]
    assert parse_listing(CUT) == ["MIG-7f", "MIG-80", "1"]
    assert parse_listing("NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.") == []


@pytest.fixture
def smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\ncat <<'END'\n{WHOLE}END\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    return program


@pytest.mark.usefixtures("smi")
async def test_the_environment_stands_before_nvidia_smi() -> None:
    assert await find_devices(None, {}) == ["0", "1"]
    assert await find_devices(None, {"CUDA_VISIBLE_DEVICES": "7"}) == ["7"]
    assert await find_devices(None, {"CUDA_VISIBLE_DEVICES": ""}) == []


@pytest.mark.usefixtures("smi")
async def test_wanted_devices_must_be_there() -> None:
    assert await find_devices((1,), {}) == ["1"]
    assert await find_devices((3, 2, 2), {"CUDA_VISIBLE_DEVICES": "2,3"}) == ["2", "3"]
    with pytest.raises(LaunchError, match="no GPU 4; nvidia-smi lists 0, 1"):
        await find_devices((0, 4), {})
    with pytest.raises(LaunchError, match="no GPU 0; CUDA_VISIBLE_DEVICES='2,3' shows 2, 3"):
        await find_devices((0,), {"CUDA_VISIBLE_DEVICES": "2,3"})


async def test_no_driver_means_no_devices(smi: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smi.write_text("#!/bin/sh\necho 'no driver'; exit 9\n")
    assert await find_devices(None, {}) == []
    monkeypatch.setenv("PATH", "/nonexistent")
    assert await find_devices(None, {}) == []
    with pytest.raises(LaunchError, match="nvidia-smi lists none"):
        await find_devices((0,), {})
