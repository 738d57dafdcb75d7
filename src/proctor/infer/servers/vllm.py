"""vLLM's OpenAI server, on GPUs or a CPU."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Final

import psutil

from proctor.config.spec import VllmServer
from proctor.infer.server import ServedModel
from proctor.infer.servers.arguments import argument_list, describe_parallelism, find_argument
from proctor.infer.servers.health import Probe
from proctor.infer.servers.inside import server_command
from proctor.infer.servers.known_options import known_options
from proctor.infer.servers.launched import Facts, Place
from proctor.infer.servers.placement import FOLLOWER, LOOPBACK
from proctor.interpreters import Command
from proctor.processes.group import tail

_RESERVED: Final = frozenset(
    {"host", "port", "model", "served-model-name", "api-key", "generation-config"}
    | {"nnodes", "node-rank", "master-addr", "master-port", "headless"}
)
_CACHED_ECHO: Final = ("enable-scale-out", "enable-prompt-tokens-details")
"""What `infer.cached_echo` needs, for versions that have it."""
_KV_SHARE: Final = 8
"""On a CPU, the KV cache gets this part of the available memory, unless VLLM_CPU_KVCACHE_SPACE says how much."""
_KV_MOST_GIB: Final = 32


class VllmRecipe:
    """Starts the module of the API server: the `vllm` program needs a package of exactly that name.

    The key comes through VLLM_API_KEY. `--generation-config vllm` keeps a model's own generation_config.json
    from changing what we ask for.
    """

    engine = "vllm"
    health = "/health"
    keyed = True
    direct = True

    def __init__(self, spec: VllmServer, model: ServedModel) -> None:
        self._spec = spec
        self._model = model
        self._arguments = argument_list(spec.args, reserved=_RESERVED, engine="vllm")

    def command(self, place: Place) -> Command:
        model = self._model
        argv = ["--model", model.path, "--host", place.host, "--port", str(place.port)]
        argv += ["--served-model-name", model.name, "--generation-config", "vllm"]
        if model.revision is not None:
            argv += ["--revision", model.revision]
        if model.tokenizer is not None:
            argv += ["--tokenizer", model.tokenizer]
        if model.trust_remote_code and find_argument(self._spec.args, "trust-remote-code") is None:
            argv += ["--trust-remote-code"]
        if not place.inside:
            known = known_options(self._spec.python, "vllm", _CACHED_ECHO)
            argv += [f"--{option}" for option in known if find_argument(self._spec.args, option) is None]
        env = {"VLLM_API_KEY": place.api_key, "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
        if not place.devices and "VLLM_CPU_KVCACHE_SPACE" not in os.environ:
            env["VLLM_CPU_KVCACHE_SPACE"] = str(self._cache_gib())
        if self._spec.swap == "reload" and place.host == LOOPBACK and place.nodes == 1 and not place.inside:
            # No key guards these routes: they are for this machine alone.
            env["VLLM_SERVER_DEV_MODE"] = "1"
        module = "vllm.entrypoints.openai.api_server"
        if place.nodes > 1:
            # Only the `serve` command knows nodes without an API server of their own.
            module, argv = "vllm.entrypoints.cli.main", ["serve", model.path, *argv[2:], *self._across(place)]
        return server_command(self._spec.python, module, *argv, *self._arguments, inside=place.inside, env=env)

    def _across(self, place: Place) -> list[str]:
        """What vLLM's multiprocessing executor wants on each of several nodes."""
        words = ["--nnodes", str(place.nodes), "--node-rank", place.node_rank]
        words += ["--master-addr", place.host, "--master-port", str(place.master_port), f"{FOLLOWER}--headless"]
        if find_argument(self._spec.args, "distributed-executor-backend") is None:
            words += ["--distributed-executor-backend", "mp"]
        return words

    def _cache_gib(self) -> int:
        available = psutil.virtual_memory().available // (1 << 30)
        return max(1, min(_KV_MOST_GIB, available // (_KV_SHARE * self._spec.replicas)))

    async def describe(self, probe: Probe, log: Path) -> Facts:
        version = (await probe.learn("/version")).field("version")
        # What `--dtype auto` came to stands only in the engine's own configuration line.
        found = re.findall(r"\bdtype=(?:torch\.)?(\w+)", tail(log, lines=100_000, limit=4 << 20))
        chosen = found[-1] if found else str(find_argument(self._spec.args, "dtype") or "auto")
        return Facts(
            version=str(version or "unknown"),
            dtype=chosen,
            parallelism=describe_parallelism(self._spec.args),
        )
