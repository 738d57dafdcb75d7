"""Our command over HTTP against lm-eval's own local-completions, on the same vLLM server: every printed digit.

A tiny model with a window of 256 answers everything, with a plain tokenizer and with one that adds BOS; a real one
answers a few documents of every task (PROCTOR_PARITY_FULL=1: all of them).
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

PYTHON = os.environ.get("PROCTOR_VLLM_PYTHON") or None
FULL = bool(os.environ.get("PROCTOR_PARITY_FULL"))

pytestmark = [
    pytest.mark.parity,
    pytest.mark.slow,
    pytest.mark.skipif(PYTHON is None, reason="PROCTOR_VLLM_PYTHON, an interpreter that has vLLM, is not set"),
    pytest.mark.timeout(14400 if FULL else 3600),
    pytest.mark.xdist_group("parity over vLLM"),
]

PLAIN = (
    *("e2e_shuffled", "e2e_hellaswag", "e2e_hellaswag_5", "e2e_gsm8k", "e2e_rolling", "e2e_group", "e2e_repeats"),
    *("e2e_long", "e2e_long_text"),
)
CHAT = ("e2e_talk", "e2e_talk_choice")
SYSTEM = "Be brief."
CHAT_KEYS = {"apply_chat_template": True, "system_instruction": SYSTEM}
CHAT_FLAGS = ("--apply_chat_template", "--system_instruction", SYSTEM)
SERVER_ARGS = {"dtype": "float32", "enforce-eager": True, "max-num-seqs": 1, "no-enable-prefix-caching": True}
"""A request that shares its batch, or finds its prefix computed, differs in the last bits of float32; a perplexity of
a million shows them. So the server takes one request at a time; our client still sends several."""
START_S = 900.0


@dataclass(frozen=True, kw_only=True)
class Served:
    """A server that answers, and the window of its model."""

    url: str
    window: int


def free_port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return held.getsockname()[1]


def healthy(url: str) -> bool:
    # Whatever proxies the environment names are not for this machine itself.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"{url}/health", timeout=60) as response:
            return response.status == 200
    except OSError:
        return False


def options() -> list[str]:
    words = [[f"--{key}"] if value is True else [f"--{key}", str(value)] for key, value in SERVER_ARGS.items()]
    return [word for pair in words for word in pair]


@contextmanager
def vllm(model: Path, log: Path) -> Iterator[Served]:
    """vLLM serving `model` under that directory's name; stopped with every process it started."""
    window = 256 if model.name.startswith("tiny") else 2048
    url = f"http://127.0.0.1:{free_port()}"
    argv = [str(PYTHON), "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    argv += ["--served-model-name", model.name, "--host", "127.0.0.1", "--port", url.rpartition(":")[2]]
    argv += ["--generation-config", "vllm", "--max-model-len", str(window), *options()]
    env = os.environ | {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    with log.open("wb") as out:
        server = subprocess.Popen(argv, stdout=out, stderr=out, env=env, start_new_session=True)
    try:
        deadline = time.monotonic() + START_S
        while not healthy(url):
            assert server.poll() is None, f"vLLM ended\n{log.read_text(errors='replace')[-4000:]}"
            assert time.monotonic() < deadline, f"vLLM did not start\n{log.read_text(errors='replace')[-4000:]}"
            time.sleep(1)
        yield Served(url=url, window=window)
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        try:
            server.wait(60)
        except subprocess.TimeoutExpired:
            pass
        try:
            os.killpg(server.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        server.wait(60)


Serve = Callable[[str], Served]


@pytest.fixture(scope="module")
def serve(commands, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serve]:
    """The server of a model, started when first asked for. Both tiny models have the same weights and vocabulary."""
    running: dict[str, Served] = {}
    with ExitStack() as stack:

        def start(model: str) -> Served:
            base = model.removesuffix("-bos")
            if base not in running:
                log = tmp_path_factory.mktemp("vllm") / "server.log"
                running[base] = stack.enter_context(vllm(commands.models / base, log))
            return running[base]

        yield start


@dataclass(frozen=True, kw_only=True)
class Both:
    """The same tasks by both commands, on one server."""

    commands: Any
    served: Served
    model: str
    limit: int | None
    add_bos: bool

    def ours(self, root: Path, *, path: str | None = None, **engine: Any) -> dict[str, Any]:
        """What `proctor run` printed: the endpoint, or with `path` a server that it starts itself."""
        directory = self.commands.models / self.model
        entry: dict[str, Any] = {"path": self.served.url, "served_model": self.model.removesuffix("-bos")}
        entry |= {"revision": "parity", "tokenizer": str(directory)}
        limit = {} if self.limit is None else {"limit": self.limit}
        chosen = {"type": "openai", "profile": "local-completions", "max_length": self.served.window}
        chosen["truncation"] = "truncate_left"
        chosen |= {"max_in_flight": 8, **({"add_bos_token": True} if self.add_bos else {})}
        config = self.commands.write_run(
            root,
            models={"m": entry if path is None else {"path": path}},
            tasks=[{"lm_eval": list(PLAIN), **limit}, {"lm_eval": list(CHAT), **CHAT_KEYS, **limit}],
            engine=chosen | engine,
        )
        return self.commands.proctor(config, NO_PROXY="127.0.0.1")

    def theirs(self, root: Path, *, chat: bool) -> Any:
        """The metrics of `python -m lm_eval --model local-completions`."""
        args = {
            "model": self.model.removesuffix("-bos"),
            "base_url": f"{self.served.url}/v1/completions",
            "tokenizer_backend": "huggingface",
            "tokenizer": str(self.commands.models / self.model),
            "max_length": self.served.window,
            "add_bos_token": self.add_bos,
        }
        flags = ["--model", "local-completions", *(CHAT_FLAGS if chat else ())]
        flags += [] if self.limit is None else ["--limit", str(self.limit)]
        names = CHAT if chat else PLAIN
        return self.commands.lm_eval(root, names, args, *flags, NO_PROXY="127.0.0.1")


CASES = [
    pytest.param("tiny", None, False, id="tiny"),
    pytest.param("tiny-bos", 8, True, id="tiny that adds BOS"),
    pytest.param("smollm2", None if FULL else 2, False, id="smollm2"),
]


@pytest.mark.parametrize(("model", "limit", "add_bos"), CASES)
def test_local_completions(
    commands, parity, serve: Serve, model: str, limit: int | None, add_bos: bool, tmp_path: Path
) -> None:
    """HellaSwag with 0 and 5 shots, GSM8K, rolling, a group, repeats, choices shuffled at load time, documents longer
    than the window (of the tiny model), chats."""
    both = Both(commands=commands, served=serve(model), model=model, limit=limit, add_bos=add_bos)
    ours = both.ours(tmp_path)
    for chat in (False, True):
        theirs = both.theirs(tmp_path / f"lm-eval-{chat}", chat=chat)
        parity.check(parity.metrics(ours, "m", chat=chat), theirs, exact=False)


def test_a_server_of_our_own(commands, parity, serve: Serve, tmp_path: Path) -> None:
    """Started and stopped by our command, with the options of the server that lm-eval asks."""
    both = Both(commands=commands, served=serve("tiny"), model="tiny", limit=2, add_bos=False)
    args = SERVER_ARGS | {"max-model-len": both.served.window}
    server = {"type": "vllm", "python": PYTHON, "args": args, "start_timeout_s": START_S}
    ours = both.ours(tmp_path, path=str(commands.models / "tiny"), server=server)
    for chat in (False, True):
        theirs = both.theirs(tmp_path / f"lm-eval-{chat}", chat=chat)
        parity.check(parity.metrics(ours, "m", chat=chat), theirs, exact=False)
