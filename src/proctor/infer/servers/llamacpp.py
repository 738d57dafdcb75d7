"""llama.cpp through the xllamacpp package: a GGUF file, no compiler, no torch."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Final

from proctor.config.spec import LlamaCppServer
from proctor.infer.server import ServedModel
from proctor.infer.servers.hardware import usable_cores
from proctor.infer.servers.health import Probe
from proctor.infer.servers.launched import Facts, Place
from proctor.interpreters import Command, module_command
from proctor.processes.group import tail

KEY_VARIABLE: Final = "PROCTOR_LLAMACPP_KEY"


class LlamaCppRecipe:
    """Runs `llamacpp_main`. `args:` are fields of xllamacpp's CommonParams (dots reach into parts)."""

    engine = "llama.cpp"
    health = "/health"
    keyed = True
    direct = True

    def __init__(self, spec: LlamaCppServer, model: ServedModel) -> None:
        self._spec = spec
        self._model = model
        self._threads = spec.threads or max(1, usable_cores() // spec.replicas)

    def command(self, place: Place) -> Command:
        options = {
            "model": self._model.path,
            "name": self._model.name,
            "host": place.host,
            "port": place.port,
            "slots": self._spec.slots,
            "context": self._spec.context,
            "threads": self._threads,
            "args": self._spec.args,
        }
        return module_command(
            self._spec.python,
            "proctor.infer.servers.llamacpp_main",
            json.dumps(options),
            env={KEY_VARIABLE: place.api_key},
        )

    async def describe(self, probe: Probe, log: Path) -> Facts:
        version = re.search(r"^xllamacpp (\S+)", tail(log, lines=10_000), re.MULTILINE)
        dtype = (await probe.get("/props")).field("model_ftype")
        return Facts(
            version=version.group(1) if version else "unknown",
            dtype=str(dtype or "unknown"),
            details={"slots": self._spec.slots, "context": self._spec.context, "threads": self._threads},
        )
