"""`gpus: auto`: how many GPUs a model's server gets, where it will run."""

from __future__ import annotations

import asyncio
import math
import os
from collections.abc import Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from proctor.api.cluster_profiles import settings_by_model
from proctor.api.context import RunContext
from proctor.catalog.models import ModelEntry
from proctor.catalog.parallelism import GpuChoice, gpus_for_model, gpus_over_nodes, model_facts
from proctor.config.engines import Engine, launch_for
from proctor.config.spec import LocalLaunch, OpenAIEngine, ServerBase, SglangServer, VllmServer
from proctor.errors import ConfigError, LaunchError, UnknownName
from proctor.infer.servers.arguments import find_argument
from proctor.infer.servers.hardware import gpu_memory
from proctor.launch.slots import find_devices

_Found = TypeVar("_Found")

_TENSOR_PARALLEL: Final = ("tensor-parallel-size", "tp-size", "tp")
_PARALLEL: Final = (
    _TENSOR_PARALLEL,
    ("pipeline-parallel-size", "pp-size", "pp"),
    ("data-parallel-size", "dp-size", "dp"),
)
"""Options of vLLM and SGLang, of which the first of each line is known to both."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Node:
    """One node where a server runs; None: not known."""

    gpus: int | None = None
    gpu_bytes: int | None = None
    nodes: int = 1
    """That one server is spread over."""


class GpuFinder:
    """Decides `gpus: auto` for the models of one run; looks at this machine, or into the cluster's profile, once."""

    def __init__(self, context: RunContext, environ: Mapping[str, str] | None = None) -> None:
        self._context = context
        self._environ = os.environ if environ is None else environ
        self._nodes: dict[str, _Node] = {}

    def decide(self, entry: ModelEntry, engine: Engine) -> tuple[Engine, str]:
        """The engine with `auto` replaced by a number, and why that one; an engine that states one, as it is.

        vLLM and SGLang also get the tensor parallelism that uses them; what `args:` say of parallelism goes first.
        Raises ModelError for weights that are damaged, ConfigError if no number suits the model and its nodes.
        """
        if not isinstance(engine, OpenAIEngine) or not isinstance(engine.server, ServerBase):
            return engine, ""
        server = engine.server
        if server.gpus != "auto":
            return engine, ""
        args = dict(server.args)
        stated = _stated(args)
        if stated is not None:
            choice = GpuChoice(gpus=stated, reason="as many as `args:` spread the model over")
        else:
            choice = self._by_model(entry, server.replicas)
            if choice.gpus > 1 and isinstance(server, VllmServer | SglangServer):
                args[_TENSOR_PARALLEL[0]] = choice.gpus
        decided = server.model_copy(update={"gpus": choice.gpus, "args": args})
        return engine.model_copy(update={"server": decided}), choice.reason

    def _by_model(self, entry: ModelEntry, replicas: int) -> GpuChoice:
        if entry.name not in self._nodes:
            self._nodes[entry.name] = self._look(entry.name)
        node = self._nodes[entry.name]
        # Replicas of one worker share its nodes; with fewer GPUs than replicas, one each is asked for and refused.
        each = node.gpus and max(1, node.gpus // replicas)
        facts = model_facts(entry)
        if node.nodes > 1:
            return gpus_over_nodes(facts, node.nodes, available=each)
        return gpus_for_model(facts, name=entry.source, available=each, gpu_bytes=node.gpu_bytes)

    def _look(self, model: str) -> _Node:
        """Nothing is known where there is no cluster or driver to ask: marking, for one, needs neither."""
        launch = launch_for(self._context.spec, model)
        try:
            if isinstance(launch, LocalLaunch):
                stated = launch.gpus
                devices = _wait(find_devices(None, self._environ)) if stated is None else [str(gpu) for gpu in stated]
                memory = _wait(gpu_memory(devices)) if devices else None
                return _Node(gpus=len(devices), gpu_bytes=memory)
            settings = settings_by_model(self._context, self._environ, only=(model,))[model]
            return _Node(gpus=settings.gpus_per_node, nodes=settings.nodes_per_server)
        except (ConfigError, LaunchError, UnknownName):
            return _Node()


def _stated(args: Mapping[str, Any]) -> int | None:
    """The GPUs over which a server's own options spread a model; None if they say nothing of it."""
    sizes = [size for names in _PARALLEL if (size := find_argument(args, *names)) is not None]
    for size in sizes:
        if not str(size).isdecimal():
            raise ConfigError(f"engine.server.args: {size!r} is no number of GPUs, so `gpus: auto` cannot be decided")
    return math.prod(int(size) for size in sizes) if sizes else None


def _wait(work: Coroutine[Any, Any, _Found]) -> _Found:
    """The result, also where this thread has an event loop that runs."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, work).result()
