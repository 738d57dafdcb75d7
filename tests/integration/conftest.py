"""A whole run against the fake server, as child processes: what the integration tests share."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import struct
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Generator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from proctor.records import Response
from proctor.store import Store
from proctor.testing import prompt_digest, write_byte_tokenizer


def write_model(
    directory: Path, *, weights: bytes = b"\0" * 16, generation_config: dict[str, Any] | None = None
) -> Path:
    """A directory that looks like a model: a byte tokenizer, a config and one small tensor."""
    write_byte_tokenizer(directory)
    (directory / "config.json").write_text(json.dumps({"model_type": "llama", "max_position_embeddings": 4096}))
    header = json.dumps({"t": {"dtype": "F32", "shape": [len(weights) // 4], "data_offsets": [0, len(weights)]}})
    (directory / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header.encode() + weights)
    if generation_config is not None:
        (directory / "generation_config.json").write_text(json.dumps(generation_config))
    return directory


@dataclass
class Lab:
    """One directory with a model, tasks and a run.yaml over the fake server."""

    root: Path
    latency_s: float = 0.01
    in_flight: int = 4
    server_flags: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def journal(self) -> Path:
        """What the fake server was asked, over all of its lives."""
        return self.root / "asked.jsonl"

    def write_task(self, name: str, items: list[str], *, output: str = "generate") -> Path:
        """A native task over one word a document."""
        data = self.root / f"{name}.jsonl"
        data.write_text("".join(json.dumps({"word": w, "answer": "a"}) + "\n" for w in items))
        task: dict[str, Any] = {
            "task": name,
            "version": 1,
            "dataset": {"path": data.name},
            "output": output,
            "prompt": "Say {{word}}:",
            "target": "{{answer}}",
            "metrics": ["exact_match", "contains"] if output == "generate" else ["accuracy"],
        }
        if output == "generate":
            task["generation"] = {"until": ["\n"], "max_gen_toks": 8}
        else:
            task["choices"] = ["a", "b"]
            task["target"] = "a"
        path = self.root / f"{name}.yaml"
        path.write_text(yaml.safe_dump(task))
        return path

    def server(self) -> dict[str, Any]:
        """The fake server as the configuration names it."""
        argv = [sys.executable, "-W", "ignore", "-m", "proctor.testing.server", "--port", "{port}"]
        argv += ["--journal", str(self.journal), "--fixed-s", str(self.latency_s), *self.server_flags]
        return {"type": "command", "argv": argv, "restarts": 3}

    def write_run(
        self, *, tasks: list[Path], name: str = "run", models: dict[str, Any] | None = None, **more: Any
    ) -> Path:
        """run.yaml for these tasks; `more` goes to its top level."""
        model = self.root / "model"
        if not model.exists():
            write_model(model)
        run: dict[str, Any] = {
            "name": name,
            "store": str(self.root / "store"),
            "runs": str(self.root / "runs"),
            "models": models or {"m": {"path": str(model)}},
            "tasks": [{"native": [str(t) for t in tasks]}],
            "engine": {"type": "openai", "server": self.server(), "max_in_flight": self.in_flight},
        } | more
        path = self.root / f"{name}.yaml"
        path.write_text(yaml.safe_dump(run))
        return path

    def command(self, *arguments: str) -> list[str]:
        """A command line of ours."""
        return [sys.executable, "-m", "proctor", *arguments]

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """Start a verb; its own session, so that it can be killed with everything below it."""
        return subprocess.Popen(
            self.command(*arguments),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | self.environment,
            start_new_session=True,
        )

    def run(self, *arguments: str, timeout: float = 400, expect: int | None = 0) -> subprocess.CompletedProcess[str]:
        """Run a verb to its end."""
        done = subprocess.run(
            self.command(*arguments),
            capture_output=True,
            text=True,
            timeout=timeout,
            env=os.environ | self.environment,
            check=False,
        )
        if expect is not None:
            assert done.returncode == expect, done.stdout + done.stderr
        return done

    def scores(self, config: Path) -> list[tuple[str, str, float | None, int]]:
        """(task, metric, value, n) of every row."""
        rows = json.loads(self.run("score", str(config), "--json", expect=None).stdout)["rows"]
        return [(r["task"], r["metric"], r["value"], r["n"]) for r in rows]

    def asked(self) -> Counter[str]:
        """How often each prompt was sent, by its digest."""
        if not self.journal.exists():
            return Counter()
        return Counter(line.split()[0] for line in self.journal.read_text().splitlines() if line)

    def digest(self, word: str) -> str:
        """The digest of the prompt that asks for `word`."""
        return prompt_digest(list(f"Say {word}:".encode()))

    def answered_words(self, words: list[str]) -> set[str]:
        """The words whose answer lies readable in the store now."""
        if not (self.root / "store" / "store.json").exists():
            return set()
        store = Store.open(self.root / "store", create=False)
        found: set[str] = set()
        for weights in store.weights():
            jobs = list((self.root / "runs").glob("*/jobs/*.json"))
            for resolution in {json.loads(j.read_text())["resolution"] for j in jobs}:
                answers = store.answers(weights, resolution)
                for fingerprint in [p.stem for p in (self.root / "store" / "requests").glob("*.parquet")]:
                    recording = store.read_recording(fingerprint)
                    prompts = {i.key: i.request.text for i in recording.instances}
                    texts = {prompts[k] for k, a in answers.read(list(prompts)).items() if isinstance(a, Response)}
                    found |= {w for w in words if f"Say {w}:" in texts}
        return found


@pytest.fixture
def lab(tmp_path: Path, own_cache: Path) -> Lab:
    """An empty lab."""
    return Lab(root=tmp_path)


@contextlib.contextmanager
def start_server(lab: Lab) -> Generator[str]:
    """A fake server that nobody manages, for runs against an endpoint; its base URL."""
    port = lab.root / "server.port"
    port.unlink(missing_ok=True)
    argv = [part for part in lab.server()["argv"] if part not in ("--port", "{port}")]
    process = subprocess.Popen([*argv, "--port-file", str(port)], stdout=subprocess.DEVNULL)
    try:
        wait_for(port.exists)
        yield f"http://127.0.0.1:{port.read_text()}"
    finally:
        process.kill()
        process.wait()


def kill_tree(pid: int) -> None:
    """SIGKILL a process and everything below it."""
    try:
        root = psutil.Process(pid)
    except psutil.NoSuchProcess:
        return
    for process in [*root.children(recursive=True), root]:
        try:
            process.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue


def wait_for(condition: Any, timeout_s: float = 300.0) -> None:
    """Poll until `condition()` holds."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.005)
