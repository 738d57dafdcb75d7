"""vLLM on this machine's processor, as both sides of a comparison ask it: float32, no key, its prefix cache emptied."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bench import server_clock
from bench.mock_server import ROOT

INTERPRETER: Final = ROOT / ".venvs" / "vllm" / "interpreter"
"""Names the interpreter that has vLLM, where one could be installed."""
MODELS: Final = ROOT / ".venvs" / "lm-eval" / "models"
FLAGS: Final = ("--dtype", "float32", "--generation-config", "vllm", "--max-num-seqs", "256", "--enforce-eager")
CLOCK: Final = ("--middleware", "bench.server_clock.ServerClock")
"""Options with which the server says how long it was at work."""
RESET_S: Final = 60.0
START_S: Final = 600.0
END_S: Final = 60.0
_DIRECT: Final = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""Whatever proxies the environment names are not for this machine itself."""


def flags(window: int, extra: Sequence[str] = ()) -> list[str]:
    """The server's options, for the table as well."""
    return [*FLAGS, "--max-model-len", str(window), *extra]


@contextlib.contextmanager
def serving(model: Path, *, window: int, log: Path, extra: Sequence[str] = ()) -> Generator[str]:
    """Serve `model` under its directory's name; yields the base URL. Ends every process that it started."""
    if not INTERPRETER.exists():
        raise SystemExit(f"no vLLM here: `make {INTERPRETER.relative_to(ROOT)}` installs it where it can")
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    argv = [INTERPRETER.read_text(encoding="utf-8").strip(), "-m", "vllm.entrypoints.openai.api_server"]
    argv += ["--model", str(model), "--served-model-name", model.name, "--host", "127.0.0.1", "--port", str(port)]
    env = os.environ | {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_NO_USAGE_STATS": "1"}
    # The reset of the prefix cache is one of the routes for developers.
    env |= {"VLLM_SERVER_DEV_MODE": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
    with log.open("wb") as out:
        server = subprocess.Popen(
            [*argv, *flags(window, extra)], stdout=out, stderr=out, env=env, cwd=ROOT, start_new_session=True
        )
    # Somebody who ends the benchmark ends the server with it.
    before = signal.signal(signal.SIGTERM, _ended)
    try:
        _wait(server, url, log)
        yield url
    finally:
        signal.signal(signal.SIGTERM, before)
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.wait(END_S)


def _ended(number: int, frame: object) -> None:
    del frame
    raise SystemExit(128 + number)


def _wait(server: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + START_S
    while True:
        with contextlib.suppress(OSError), _DIRECT.open(f"{url}/health", timeout=5) as answer:
            if answer.status == 200:
                return
        if server.poll() is not None or time.monotonic() > deadline:
            raise SystemExit(f"vLLM did not start:\n{log.read_text(errors='replace')[-3000:]}")
        time.sleep(0.5)


def reset_prefix_cache(url: str) -> None:
    """Forget every computed prefix: the server says that it did. Raises OSError where it cannot."""
    deadline = time.monotonic() + RESET_S
    while True:
        request = urllib.request.Request(f"{url}/reset_prefix_cache", method="POST")
        with _DIRECT.open(request, timeout=60) as answer:
            # It cannot while requests are at work, such as those that a client gave up.
            if json.loads(answer.read() or b"{}").get("success"):
                return
        if time.monotonic() > deadline:
            raise OSError(f"the prefix cache was not emptied within {RESET_S:g} s: requests are still at work")
        time.sleep(0.5)


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What the server did since the last look, by its own clock and counters."""

    seconds: float
    """From the first request to the last answer."""
    requests: int
    tokens: int
    """Generated."""


class Watch:
    """Looks at a server that runs with `CLOCK`."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._tokens = 0
        self.look()

    def look(self) -> Work:
        """Since the last look, or since the start."""
        with _DIRECT.open(f"{self._url}{server_clock.PATH}", timeout=60) as answer:
            found = json.load(answer)
        with _DIRECT.open(f"{self._url}/metrics", timeout=60) as answer:
            lines = answer.read().decode().splitlines()
        tokens = sum(int(float(v.split()[-1])) for v in lines if v.startswith("vllm:generation_tokens_total"))
        before, self._tokens = self._tokens, tokens
        return Work(seconds=found["seconds"], requests=found["requests"], tokens=tokens - before)
