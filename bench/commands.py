"""Whole commands over the same documents against one endpoint: start to printed score, wall and CPU seconds, checked.

Each is given what makes it fast: lm-eval sends text (no tokenizer to load) in as many calls at a time as asked, Inspect
writes its log at the end only and draws no screen. Both keep what they keep by default; Proctor keeps its journal.
"""

from __future__ import annotations

import os
import re
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bench.documents import expected_score
from bench.mock_server import CHAT, COMPLETIONS, MODEL, PEERS, ROOT

LM_EVAL: Final = ROOT / ".venvs" / "lm-eval" / "bin" / "python"
OFFLINE: Final = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

_RUN: Final = """\
name: bench
store: store
runs: runs
models:
  mock: {{path: "{url}", served_model: "{model}"}}
tasks:
  - native: ["{task}"]
    apply_chat_template: {chat}
engine: {{max_in_flight: {in_flight}, client_processes: {processes}, max_length: 32768}}
launch: {{workers: {workers}}}
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One command, from its start to its end."""

    seconds: float
    cpu_s: float
    """Of all its processes."""
    samples: int

    @property
    def samples_per_s(self) -> float:
        return self.samples / self.seconds

    @property
    def cpu_ms(self) -> float:
        """A sample."""
        return 1000 * self.cpu_s / self.samples


def write_run(
    directory: Path,
    tasks: Path,
    url: str,
    *,
    chat: bool,
    in_flight: int = 1024,
    workers: int = 1,
    processes: int = 1,
) -> Path:
    """A run.yaml for the generated task; the workers, or the processes of one, share the requests in flight."""
    text = _RUN.format(
        url=url,
        model=MODEL,
        task=tasks / "bench-native.yaml",
        chat=str(chat).lower(),
        in_flight=in_flight // workers,
        workers=workers,
        processes=processes,
    )
    path = directory / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def proctor(
    tasks: Path, url: str, *, samples: int, chat: bool, in_flight: int = 1024, workers: int = 1, processes: int = 1
) -> Run:
    """`proctor run`, with a new store; see `write_run`."""
    directory = tasks / "proctor"
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    write_run(directory, tasks, url, chat=chat, in_flight=in_flight, workers=workers, processes=processes)
    command = [sys.executable, "-m", "proctor", "run", "run.yaml"]
    found, printed = timed(command, samples=samples, cwd=directory)
    _check(r"exact_match\s*↑?\s+(\d\.\d+)", printed, samples)
    return found


def lm_eval(tasks: Path, url: str, *, samples: int, chat: bool, in_flight: int) -> Run:
    """`lm_eval --model local-completions` or `local-chat-completions`."""
    path = CHAT if chat else COMPLETIONS
    arguments = f"model={MODEL},base_url={url}{path},num_concurrent={in_flight},tokenizer_backend=None"
    arguments += ",tokenized_requests=False,max_length=32768,timeout=600"
    command = [str(LM_EVAL), "-m", "lm_eval", "--model", "local-chat-completions" if chat else "local-completions"]
    command += ["--model_args", arguments, "--tasks", "bench", "--include_path", str(tasks / "lm-eval")]
    command += ["--apply_chat_template"] if chat else []
    found, printed = timed(command, samples=samples, cwd=tasks, env=OFFLINE | {"OPENAI_API_KEY": "none"})
    _check(r"\|exact_match\|↑\s*\|\s*(\d(?:\.\d+)?)\|", printed, samples)
    return found


def inspect(documents: Path, url: str, *, samples: int, in_flight: int) -> Run:
    """`inspect eval` with the provider openai-api, which asks the chat route."""
    logs = documents.parent / "inspect-logs"
    command = [str(PEERS.with_name("inspect")), "eval", "bench/inspect_task.py", "-T", f"documents={documents}"]
    command += ["--model", f"openai-api/mock/{MODEL}", "--max-connections", str(in_flight)]
    command += ["--max-samples", str(in_flight), "--no-log-realtime", "--display", "plain", "--log-dir", str(logs)]
    env = {"MOCK_BASE_URL": f"{url}/v1", "MOCK_API_KEY": "none"}
    found, printed = timed(command, samples=samples, cwd=ROOT, env=env)
    _check(r"\nmean\s+(\d\.\d+)", printed, samples)
    return found


def timed(command: Sequence[str], *, samples: int, cwd: Path, env: Mapping[str, str] | None = None) -> tuple[Run, str]:
    """Run to the end; raises SystemExit with the last lines if it fails."""
    whole = os.environ | dict(env or {})
    # An installed program has its bytecode; without this, one side might compile all that it imports in every run.
    whole.pop("PYTHONDONTWRITEBYTECODE", None)
    before, start = _children_s(), time.perf_counter()
    done = subprocess.run(command, check=False, cwd=cwd, env=whole, capture_output=True, text=True)
    took = time.perf_counter() - start
    if done.returncode:
        raise SystemExit(
            f"{' '.join(command[:6])} … ended with {done.returncode}:\n{(done.stdout + done.stderr)[-2000:]}"
        )
    return Run(seconds=took, cpu_s=_children_s() - before, samples=samples), done.stdout + done.stderr


def _children_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _check(pattern: str, printed: str, samples: int) -> None:
    """A command that scored wrongly was not the same work."""
    found = re.search(pattern, printed)
    if found is None or abs(float(found[1]) - expected_score(samples)) > 0.0015:
        shown = found[1] if found else "nothing"
        raise SystemExit(f"the score is {shown} where {expected_score(samples):.4f} is right:\n{printed[-1500:]}")
