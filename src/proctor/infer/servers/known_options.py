"""Which options a server's version has, read from its package's files: importing it would take as long as a start."""

from __future__ import annotations

import contextlib
import functools
import subprocess
from typing import Final

from proctor.errors import MissingTool
from proctor.interpreters import module_command

_TIMEOUT_S: Final = 30.0
_MODULE: Final = "proctor.infer.servers.known_options_main"


@functools.cache
def known_options(python: str | None, package: str, options: tuple[str, ...]) -> tuple[str, ...]:
    """Those of `options` (with dashes) that `package`, as `python` has it, declares; none where it cannot be told."""
    with contextlib.suppress(OSError, MissingTool, subprocess.TimeoutExpired):
        command = module_command(python, _MODULE, package, *options)
        done = subprocess.run(
            command.argv, env=command.env, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
        )
        if done.returncode == 0:
            return tuple(option for option in options if option in done.stdout.split())
    return ()
