"""Servers inside containers: what of the node they must see, and how their Python is named."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from proctor.infer.server import ServedModel
from proctor.interpreters import OFFLINE, Command, module_command
from proctor.processes.container import Bind, Container, contained


def server_command(
    python: str | None, module: str, *args: str, inside: bool, env: Mapping[str, str] | None = None
) -> Command:
    """The command that runs a server's module: with `python` of this machine, or of a container's image.

    Raises MissingTool if it is to run on this machine, which has no such interpreter.
    """
    if not inside:
        return module_command(python, module, *args, env=env)
    return Command(argv=(python or "python3", "-m", module, *args), env=dict(os.environ) | dict(env or {}))


def wrapped(container: Container, command: Command, model: ServedModel, *, scratch: Path) -> Command:
    """`command` inside `container`, which sees the model's files, `scratch`, and every variable that was set for it.

    Raises ConfigError for a path that the container cannot bind.
    """
    return contained(container, command, forward=forwarded(command), binds=model_binds(model, scratch))


def forwarded(command: Command) -> list[str]:
    """The variables that a container must see: what was set for the command, and that there is no hub, if so.

    Some kinds pass on none of the environment by themselves, and would then look for one.
    """
    env = command.env
    return sorted({n for n, value in env.items() if os.environ.get(n) != value} | {n for n in OFFLINE if n in env})


def model_binds(model: ServedModel, *others: Path) -> list[Bind]:
    """The directories of the model's files, and `others`, each at its own path."""
    places = [p for path in (model.path, model.tokenizer) if path is not None for p in _places(path)]
    return [Bind(source=str(p), target=str(p)) for p in dict.fromkeys((*places, *(o.absolute() for o in others)))]


def _places(path: str) -> list[Path]:
    """The directories that hold a model: files of a hub's cache are links into another one."""
    there = Path(path)
    if not there.is_absolute() or not there.exists():
        return []
    if not there.is_dir():
        return [there.parent, there.resolve().parent]
    return [there, *sorted({file.resolve().parent for file in there.iterdir() if file.is_symlink()})]
