"""SGLang's OpenAI server."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from proctor.config.spec import SglangServer
from proctor.infer.server import ServedModel
from proctor.infer.servers.arguments import argument_list, describe_parallelism, find_argument
from proctor.infer.servers.health import Probe
from proctor.infer.servers.inside import server_command
from proctor.infer.servers.launched import Facts, Place
from proctor.interpreters import Command

_RESERVED: Final = frozenset(
    {"host", "port", "model-path", "model", "served-model-name", "api-key", "config"}
    | {"nnodes", "node-rank", "dist-init-addr"}
)


class SglangRecipe:
    """Starts `sglang.launch_server` without a key; on loopback, unless its job spans nodes.

    SGLang takes a key on the command line or in a file, and prints all its arguments, the key among them, to
    its log. A key that others can read is worth nothing, so it gets none.
    """

    engine = "sglang"
    health = "/health"
    keyed = False
    direct = True

    def __init__(self, spec: SglangServer, model: ServedModel) -> None:
        self._spec = spec
        self._model = model
        self._arguments = argument_list(spec.args, reserved=_RESERVED, engine="sglang")

    def command(self, place: Place) -> Command:
        model = self._model
        argv = ["--model-path", model.path, "--host", place.host, "--port", str(place.port)]
        argv += ["--served-model-name", model.name]
        if model.revision is not None:
            argv += ["--revision", model.revision]
        if model.tokenizer is not None:
            argv += ["--tokenizer-path", model.tokenizer]
        if model.trust_remote_code and find_argument(self._spec.args, "trust-remote-code") is None:
            argv += ["--trust-remote-code"]
        # The model's own generation_config.json would change what we ask for.
        if find_argument(self._spec.args, "sampling-defaults") is None:
            argv += ["--sampling-defaults", "openai"]
        # Without it the server does not say how many requests wait.
        if find_argument(self._spec.args, "enable-metrics") is None:
            argv += ["--enable-metrics"]
        if place.nodes > 1:
            argv += ["--nnodes", str(place.nodes), "--node-rank", place.node_rank]
            argv += ["--dist-init-addr", f"{place.host}:{place.master_port}"]
        words = (*argv, *self._arguments)
        return server_command(self._spec.python, "sglang.launch_server", *words, inside=place.inside)

    async def describe(self, probe: Probe, log: Path) -> Facts:
        said = await probe.learn("/get_server_info")
        return Facts(
            version=str(said.field("version") or "unknown"),
            dtype=str(find_argument(self._spec.args, "dtype") or said.field("dtype") or "unknown"),
            parallelism=describe_parallelism(self._spec.args),
        )
