"""Any server that a command starts."""

from __future__ import annotations

import os
import string
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from proctor.config.spec import CommandServer
from proctor.errors import ConfigError
from proctor.infer.server import ServedModel
from proctor.infer.servers.health import Probe
from proctor.infer.servers.launched import Facts, Place
from proctor.interpreters import Command

PLACEHOLDERS: Final[tuple[str, ...]] = (
    *("port", "host", "model", "name", "api_key_file", "python", "server_id"),
    *("nodes", "node_rank", "master_port"),
)
_EVAL_HIVE: Final = {"EH_PORT": "port", "EH_MODEL_PATH": "model", "EH_SERVER_ID": "server_id"}
"""Variables that commands written for eval-hive read."""


class CommandRecipe:
    """An argument list with placeholders, or under `shell:` a line for /bin/sh.

    Both find the values in the environment too, as PROCTOR_PORT, PROCTOR_HOST, PROCTOR_MODEL, PROCTOR_NAME,
    PROCTOR_API_KEY_FILE and so on, and under eval-hive's names; a shell line gets them only there, so that no name
    is ever taken for shell syntax. Across nodes every node runs the command: {node_rank} is 0 on the one that is
    asked, at {host}:{port}.
    """

    engine = "command"
    keyed = True
    direct = False

    def __init__(self, spec: CommandServer, model: ServedModel) -> None:
        if (spec.argv is None) == (spec.shell is None):
            raise ConfigError(
                "engine.server: a command server needs one of `argv` and `shell`",
                hint="argv: [my-server, --model, '{model}', --port, '{port}']",
            )
        if spec.args:
            raise ConfigError(
                "engine.server.args: a command server has none", hint="write the options into `argv` or `shell`"
            )
        if spec.argv is not None and not spec.argv:
            raise ConfigError("engine.server.argv is empty")
        self._spec = spec
        self._model = model
        self.health = spec.health if spec.health.startswith("/") else f"/{spec.health}"
        sample: dict[str, str] = dict.fromkeys(PLACEHOLDERS, "")
        for word in spec.argv or ():
            fill(word, sample)

    def command(self, place: Place) -> Command:
        values = {
            "port": str(place.port),
            "host": place.host,
            "model": self._model.path,
            "name": self._model.name,
            "api_key_file": str(place.api_key_file),
            "python": self._spec.python or "python3",
            "server_id": str(place.replica),
            "nodes": str(place.nodes),
            "node_rank": place.node_rank,
            "master_port": str(place.master_port),
        }
        env = dict(os.environ) | {f"PROCTOR_{name.upper()}": value for name, value in values.items()}
        env |= {variable: values[name] for variable, name in _EVAL_HIVE.items()}
        if self._spec.argv is not None:
            return Command(argv=tuple(fill(word, values) for word in self._spec.argv), env=env)
        return Command(argv=("/bin/sh", "-c", self._spec.shell or ""), env=env)

    async def describe(self, probe: Probe, log: Path) -> Facts:
        version = (await probe.learn("/version")).field("version")
        shown = list(self._spec.argv) if self._spec.argv is not None else self._spec.shell
        return Facts(version=str(version or "unknown"), details={"command": shown})


def fill(word: str, values: Mapping[str, str]) -> str:
    """Put the values in place of {placeholders}; {{ and }} stand for braces.

    Raises ConfigError for an unknown placeholder or a brace without its partner.
    """
    out: list[str] = []
    try:
        for literal, name, form, conversion in string.Formatter().parse(word):
            out.append(literal)
            if name is None:
                continue
            if name not in values or form or conversion:
                shown = name + (f"!{conversion}" if conversion else "") + (f":{form}" if form else "")
                valid = ", ".join("{" + known + "}" for known in values)
                raise ConfigError(
                    f"engine.server.argv: unknown placeholder {{{shown}}} in {word!r}; valid: {valid}",
                    hint="write {{ and }} for braces themselves",
                )
            out.append(values[name])
    except ValueError as error:
        raise ConfigError(
            f"engine.server.argv: {word!r}: {error}", hint="write {{ and }} for braces themselves"
        ) from None
    return "".join(out)
