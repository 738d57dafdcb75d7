"""On a real GPU: vLLM serves, benchmarks run, and a checkpoint is only loaded into a running server if that is right.

PROCTOR_GPU_VLLM_PYTHON names an interpreter with vLLM for CUDA. Nothing of this has run on a GPU yet.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from bench.gpu import make_model
from bench.mock_server import ROOT

from ..integration import test_vllm_server as on_cpu

PYTHON = os.environ.get("PROCTOR_GPU_VLLM_PYTHON") or ""
MODELS = os.environ.get("PROCTOR_TEST_MODELS") or ""


def why_not() -> str | None:
    if shutil.which("nvidia-smi") is None:
        return "no NVIDIA GPU: nvidia-smi is not here"
    if not PYTHON or not MODELS:
        return "PROCTOR_GPU_VLLM_PYTHON and PROCTOR_TEST_MODELS are not set"
    return None


pytestmark = [pytest.mark.gpu, pytest.mark.slow, pytest.mark.skipif(why_not() is not None, reason=why_not() or "")]


@pytest.mark.timeout(3600)
def test_the_benchmark_runs_and_both_sides_do_the_same_work(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    command = [sys.executable, "-m", "bench.gpu", "--shape", "0.5b", "--documents", "500", "--items", "20"]
    command += ["--rounds", "1", "--python", PYTHON, "--tokenizer", f"{MODELS}/smollm2", "--json", str(out)]
    subprocess.run(command, check=True, cwd=ROOT)
    found = json.loads(out.read_text())
    (saturated,) = [one for name, one in found["generate"].items() if name.startswith("saturated")]
    ours, theirs = saturated["server"]["proctor"][0], saturated["server"]["lm_eval"][0]
    assert ours["requests"] == theirs["requests"] == 500
    assert ours["tokens"] == pytest.approx(theirs["tokens"], rel=0.01)


@pytest.mark.timeout(3600)
async def test_a_checkpoint_is_loaded_into_a_running_server_only_if_it_answers_as_a_fresh_one(tmp_path: Path) -> None:
    places = [
        make_model("0.5b", tokenizer=Path(MODELS) / "smollm2", python=PYTHON, place=tmp_path / str(seed), seed=seed)[0]
        for seed in range(3)
    ]
    args = {"dtype": "bfloat16", "max_model_len": 1024}
    await on_cpu.swap_among(places, directory=tmp_path / "run", python=PYTHON, args=args, gpus=1)
