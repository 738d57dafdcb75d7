"""What a run costs beside asking: from a healthy server to the first request, and whole commands beside lm-eval's.

`--only first`: a native task of --requests documents and a server that takes --slow seconds to come up; the time from
the server's first healthy moment to the first request of the task that reaches it, with the task recorded before and
with the task to be recorded meanwhile (this server takes --slow-recording seconds).

`--only commands`: 100 documents of HellaSwag, `proctor run` on the fake engine against `lm_eval --model dummy`, over
local data, --repeat times in turn; PROCTOR_LM_EVAL_PYTHON names lm-eval's interpreter. Seconds of wall time and of CPU,
children included; Proctor's without the time that its worker spent asking. A first run has an empty store; a repeated
one finds everything recorded, answered and marked.

Prints a table; --json FILE writes the numbers, and keeps those of the other part if they are there.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import yaml
from aiohttp import web

from bench.machine import heading, machine, versions
from proctor.testing.answers import prompts_of
from proctor.testing.openai_server import COMPLETIONS, FakeServer
from proctor.testing.options import ServerOptions
from proctor.testing.tokenizer import write_byte_tokenizer
from proctor.worker.events import read_events

MARK: Final = "Document number "
"""How every prompt of the task begins; those of probes do not."""
DATA: Final = Path(__file__).resolve().parents[1] / "tests" / "parity" / "data" / "hellaswag.jsonl"
PATIENCE_S: Final = 600.0


class Watched(FakeServer):
    """Writes down when it was ready and when the first request of the task came, in seconds of the machine's clock."""

    def __init__(self, options: ServerOptions, *, port: int, times: Path) -> None:
        super().__init__(options, port=port)
        self._times = times
        self._begun = time.monotonic()
        self._seen = False

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        if not self._seen and request.path in COMPLETIONS:
            body = json.loads(await request.read())
            if any(bytes(i for i in ids if i < 256).decode("latin-1").startswith(MARK) for ids in prompts_of(body)):
                self._seen = True
                ready = self._begun + self.options.slow_start_s
                fresh = self._times.with_suffix(".new")
                fresh.write_text(json.dumps({"ready": ready, "first": time.monotonic()}))
                fresh.replace(self._times)
        return await super()._handle(request)


async def serve(port: int, slow_s: float, times: Path) -> None:
    """The watched server, until SIGTERM."""
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    async with Watched(ServerOptions(slow_start_s=slow_s), port=port, times=times):
        await stop.wait()


# --- first request ---


def write_task(root: Path, requests: int) -> None:
    """A model, and a task with so many documents of one request each."""
    model = root / "model"
    model.mkdir()
    write_byte_tokenizer(model)
    (model / "config.json").write_text(json.dumps({"model_type": "llama", "max_position_embeddings": 4096}))
    (model / "pytorch_model.bin").write_bytes(b"weights")
    with (root / "data.jsonl").open("w") as file:
        for n in range(requests):
            file.write(json.dumps({"n": n, "text": f"{n * 7919 % 1000003} " * 40}) + "\n")
    task = {
        "task": "many",
        "version": 1,
        "dataset": {"path": "data.jsonl"},
        "output": "generate",
        "prompt": MARK + "{{n}}: {{text}}\nAnswer:",
        "target": "yes",
        "generation": {"until": ["\n"], "max_gen_toks": 8},
        "metrics": ["exact_match"],
    }
    (root / "many.yaml").write_text(yaml.safe_dump(task))


def first_request(root: Path, slow_s: float, *, fresh: bool) -> dict[str, float]:
    """Start a run, wait for its first request, stop it. Seconds after the server was ready, and of the command."""
    times = root / "times.json"
    times.unlink(missing_ok=True)
    argv = [sys.executable, "-m", "bench.startup", "--serve", "{port}", "--slow", str(slow_s), "--times", str(times)]
    run = {
        "name": "startup",
        "store": str(root / "store"),
        "runs": str(root / "runs"),
        "models": {"m": {"path": str(root / "model")}},
        "tasks": [{"native": [str(root / "many.yaml")]}],
        "engine": {"type": "openai", "server": {"type": "command", "argv": argv}},
    }
    (root / "run.yaml").write_text(yaml.safe_dump(run))
    if fresh:
        for name in ("store", "runs"):
            shutil.rmtree(root / name, ignore_errors=True)
    began = time.monotonic()
    with (root / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "proctor", "run", str(root / "run.yaml"), "--quiet"], stdout=log, stderr=log
        )
        try:
            while not times.exists():
                if process.poll() is not None or time.monotonic() > began + PATIENCE_S:
                    raise RuntimeError(f"no request came:\n{(root / 'log').read_text()[-3000:]}")
                time.sleep(0.02)
        finally:
            for _ in range(2):
                process.send_signal(signal.SIGINT)
                time.sleep(0.2)
            process.wait(PATIENCE_S)
    said = json.loads(times.read_text())
    return {"after_healthy_s": said["first"] - said["ready"], "server_s": slow_s, "command_s": said["first"] - began}


def measure_first(told: argparse.Namespace) -> dict[str, Any]:
    """Both cases, with a server that takes long enough to hide what comes before."""
    found: dict[str, Any] = {"requests": told.requests, "cases": {}}
    with tempfile.TemporaryDirectory(prefix="proctor-startup-") as name:
        root = Path(name)
        write_task(root, told.requests)
        cases = {"to be recorded": (told.slow_recording, True), "recorded before": (told.slow, False)}
        for case, (slow_s, fresh) in cases.items():
            runs = [first_request(root, slow_s, fresh=fresh) for _ in range(told.repeat)]
            found["cases"][case] = {
                "runs": runs,
                "after_healthy_s": statistics.median(r["after_healthy_s"] for r in runs),
                "worst_s": max(r["after_healthy_s"] for r in runs),
            }
            print(f"{case}: first request {found['cases'][case]['after_healthy_s']:.2f} s after the server is healthy")
    return found


# --- whole commands ---


def timed(argv: Sequence[str], env: dict[str, str]) -> dict[str, float]:
    """Run a command to its end."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    began = time.monotonic()
    done = subprocess.run(argv, env=env, capture_output=True, text=True, check=False)
    wall = time.monotonic() - began
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode != 0:
        raise RuntimeError(f"{argv} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"wall_s": wall, "cpu_s": cpu}


def asking_s(runs: Path) -> float:
    """Seconds from a worker's first question to its last, as its events say."""
    total = 0.0
    for file in runs.glob("*/events/*.jsonl"):
        events, _ = read_events(file, 0)
        asking = [e.time for e in events if e.phase in ("asking", "done")]
        total += max(asking) - min(asking) if asking else 0.0
    return total


def write_hellaswag(root: Path, python: str) -> Path:
    """The task over local data, and a run of it; the run's file."""
    (root / "tasks").mkdir()
    task = {
        "task": "bench_hellaswag",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"validation": str(DATA)}},
        "validation_split": "validation",
        "output_type": "multiple_choice",
        "doc_to_text": "{{ctx_a}} {{ctx_b}}",
        "doc_to_choice": "endings",
        "doc_to_target": "{{label}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        "metadata": {"version": 1.0},
    }
    (root / "tasks" / "bench_hellaswag.yaml").write_text(yaml.safe_dump(task))
    model = root / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "pytorch_model.bin").write_bytes(b"weights")
    run = {
        "name": "startup",
        "store": str(root / "store"),
        "runs": str(root / "runs"),
        "models": {"m": {"path": str(model)}},
        "tasks": [{"lm_eval": ["bench_hellaswag"], "include_path": [str(root / "tasks")], "python": python}],
        "engine": {"type": "fake"},
    }
    (root / "run.yaml").write_text(yaml.safe_dump(run))
    return root / "run.yaml"


def measure_commands(told: argparse.Namespace, python: str) -> dict[str, Any]:
    """Each side in turn, so that what else the machine does hits all alike; one round before counts for nothing."""
    found: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory(prefix="proctor-startup-") as name:
        root = Path(name)
        config = write_hellaswag(root, python)
        env = dict(os.environ) | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(root / "hf")}
        env |= {"PROCTOR_CACHE": str(root / "cache"), "PYTHONPYCACHEPREFIX": str(root / "bytecode")}
        # Installed packages have their bytecode; here both get the same place for what has none.
        env.pop("PYTHONDONTWRITEBYTECODE", None)
        ours = [sys.executable, "-m", "proctor", "run", str(config), "--quiet"]
        theirs = [python, "-m", "lm_eval", "--model", "dummy", "--tasks", "bench_hellaswag"]
        theirs += ["--include_path", str(root / "tasks")]

        def first() -> dict[str, float]:
            for place in ("store", "runs"):
                shutil.rmtree(root / place, ignore_errors=True)
            one = timed(ours, env)
            return one | {"fixed_s": one["wall_s"] - asking_s(root / "runs")}

        sides: dict[str, Callable[[], dict[str, float]]] = {
            "proctor run, first": first,
            "proctor run, repeated": lambda: timed(ours, env),
            "lm_eval --model dummy": lambda: timed(theirs, env),
        }
        for n in range(told.repeat + 1):
            for side, run in sides.items():
                one = run()
                print(f"{'warm-up' if n == 0 else n}: {side}: " + ", ".join(f"{k} {v:.2f}" for k, v in one.items()))
                if n:
                    found.setdefault(side, []).append(one)
    return {
        side: {"runs": runs} | {k: statistics.median(r[k] for r in runs) for k in runs[0]}
        for side, runs in found.items()
    }


def show(found: dict[str, Any]) -> None:
    """The tables."""
    for case, one in found.get("first_request", {}).get("cases", {}).items():
        print(f"{case:<24} first request {one['after_healthy_s']:.2f} s after healthy, worst {one['worst_s']:.2f} s")
    for side, one in found.get("commands", {}).get("sides", {}).items():
        fixed = f", without asking {one['fixed_s']:.2f} s" if "fixed_s" in one else ""
        print(f"{side:<24} wall {one['wall_s']:6.2f} s, CPU {one['cpu_s']:6.2f} s{fixed}")


def main() -> None:
    """The program."""
    parser = argparse.ArgumentParser(prog="python -m bench.startup", description=__doc__)
    parser.add_argument("--only", choices=("first", "commands"))
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--slow", type=float, default=10.0)
    parser.add_argument("--slow-recording", type=float, default=60.0)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--serve", type=int, help="be the server, on this port")
    parser.add_argument("--times", type=Path)
    told = parser.parse_args()
    if told.serve is not None:
        asyncio.run(serve(told.serve, told.slow, told.times))
        return
    python = os.environ.get("PROCTOR_LM_EVAL_PYTHON")
    kept = told.json.read_text() if told.json is not None and told.json.exists() else "{}"
    found: dict[str, Any] = json.loads(kept)
    if told.only != "commands":
        what, packages = machine(), versions("proctor-evals", "aiohttp")
        found["first_request"] = {"machine": what, "packages": packages} | measure_first(told)
        print(heading(what, packages))
    if told.only != "first" and python:
        what = machine()
        packages = versions("proctor-evals") | versions("lm-eval", "datasets", python=Path(python))
        found["commands"] = {"machine": what, "packages": packages, "sides": measure_commands(told, python)}
        print(heading(what, packages))
    show(found)
    if told.json is not None:
        told.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
