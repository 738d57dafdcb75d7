"""Run one of our modules in another Python environment, where only our own source is added.

lm-eval, lighteval and vLLM pin versions that exclude each other, so a configuration may name another
interpreter for each. That interpreter must see `proctor` and nothing else of our environment: it gets a
directory on PYTHONPATH that holds a single link to our package.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from platformdirs import user_cache_path

from proctor.errors import MissingTool

PACKAGE: Final = Path(__file__).resolve().parent
OFFLINE: Final = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE", "TRANSFORMERS_OFFLINE")
"""Variables that, set to 1, tell the hub's libraries that there is no hub: they fail at once, or read their cache."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """An argument list and the whole environment to start it with."""

    argv: tuple[str, ...]
    env: Mapping[str, str]


def cache_directory() -> Path:
    """Where Proctor keeps what can be made again; PROCTOR_CACHE overrides the platform's place."""
    chosen = os.environ.get("PROCTOR_CACHE")
    return Path(chosen) if chosen else user_cache_path("proctor", appauthor=False)


def module_command(python: str | None, module: str, *args: str, env: Mapping[str, str] | None = None) -> Command:
    """The command that runs `module` with `python` (None: this interpreter).

    Raises MissingTool if `python` is no executable file and not found on PATH.
    """
    full = dict(os.environ) | dict(env or {})
    if python is None or _same_environment(python):
        return Command(argv=(sys.executable, "-m", module, *args), env=full)
    found = shutil.which(os.path.expanduser(python))
    if found is None:
        raise MissingTool(
            f"no Python interpreter at {python!r}",
            hint="name the python inside the harness's environment, e.g. /envs/lm-eval/bin/python",
        )
    full["PYTHONPATH"] = str(_import_directory())
    full.pop("PYTHONHOME", None)
    full.pop("VIRTUAL_ENV", None)
    return Command(argv=(found, "-m", module, *args), env=full)


def image_command(python: str | None, module: str, *args: str) -> tuple[Command, tuple[Path, ...]]:
    """The command that runs `module` with the Python of a container's image, and the directories it must see there.

    `python`: a program of the image (None: python3), whose own packages are those of the module's harness.
    """
    directory = _import_directory()
    env = dict(os.environ) | {"PYTHONPATH": str(directory)}
    env.pop("PYTHONHOME", None)
    env.pop("VIRTUAL_ENV", None)
    return Command(argv=(python or "python3", "-m", module, *args), env=env), (directory, PACKAGE)


def _same_environment(python: str) -> bool:
    # A virtual environment's python is a link to the base one: compare the unresolved paths.
    return os.path.abspath(os.path.expanduser(python)) == os.path.abspath(sys.executable)


def _import_directory() -> Path:
    directory = cache_directory() / "import" / hashlib.sha256(str(PACKAGE).encode()).hexdigest()[:16]
    directory.mkdir(parents=True, exist_ok=True)
    link = directory / PACKAGE.name
    if not link.is_symlink() or link.resolve() != PACKAGE:
        fresh = directory / f".{os.getpid()}"
        fresh.unlink(missing_ok=True)
        fresh.symlink_to(PACKAGE, target_is_directory=True)
        fresh.replace(link)
    return directory
