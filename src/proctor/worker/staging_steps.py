"""Weights on the disks of all nodes whose servers are job steps: one step holds a copy on each node."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import signal
import sys
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any, Final

from proctor.config.clusters.settings import Staging
from proctor.errors import ProctorError
from proctor.infer.servers.steps import StepTerms, srun_words, step_environment
from proctor.processes.group import ProcessGroup
from proctor.worker.hold_weights import SAYS
from proctor.worker.staging import Say

MODULE: Final = "proctor.worker.hold_weights"
_POLL_S: Final = 0.2
_RELEASE_S: Final = 90.0
"""What the nodes get to remove their copies; what is left then, the next job there uses or removes."""


@contextlib.asynccontextmanager
async def staged_on_nodes(
    staging: Staging, path: str, steps: StepTerms, *, log: Path, say: Say
) -> AsyncGenerator[str | None]:
    """The path of a copy of `path` that is the same on each node of the job, for as long as it is needed.

    None where one of the nodes has none: then no server reads copies, and `say` is told which node and why. Never an
    error.
    """
    name = f"staging-{secrets.token_hex(6)}"
    argv = (*srun_words(steps.job, name, steps.hosts), sys.executable, "-m", MODULE, json.dumps(_orders(staging, path)))
    group = await ProcessGroup.start(argv, env=step_environment(os.environ), log=log)
    try:
        found = await _wait(group, log, len(steps.hosts))
        copy = _agreed(found, group, steps)
        say(f"the weights are read from {copy} on {len(steps.hosts)} nodes")
    except OSError as error:
        say(f"the weights are read from {path}: {error}")
        await _end(group, steps, name, say)
        yield None
        return
    except BaseException:
        await _end(group, steps, name, say)
        raise
    try:
        yield copy
    finally:
        await _end(group, steps, name, say)


def _orders(staging: Staging, path: str) -> dict[str, Any]:
    return {"directory": staging.directory, "check_space": staging.check_space, "path": path}


async def _wait(group: ProcessGroup, log: Path, nodes: int) -> list[dict[str, str]]:
    """What the nodes have said, once all have, one has failed, or the step has ended."""
    while True:
        ended = group.returncode is not None
        text = await asyncio.to_thread(log.read_text, encoding="utf-8", errors="replace")
        found = [json.loads(line.removeprefix(SAYS)) for line in text.split("\n")[:-1] if line.startswith(SAYS)]
        if ended or len(found) >= nodes or any("error" in one for one in found):
            return found
        await asyncio.sleep(_POLL_S)


def _agreed(found: list[dict[str, str]], group: ProcessGroup, steps: StepTerms) -> str:
    """Raises OSError, saying why, unless all nodes have a copy at the same path."""
    for one in found:
        if "error" in one:
            raise OSError(f"{one['node']}: {one['error']}")
    if len(found) < len(steps.hosts) or group.returncode is not None:
        raise OSError(f"the step that copies ended with status {group.returncode}; its log: {group.log}")
    paths = sorted({one["path"] for one in found})
    if len(paths) > 1:
        raise OSError(f"the nodes' copies lie at different places: {', '.join(paths[:3])}")
    return paths[0]


async def _end(group: ProcessGroup, steps: StepTerms, name: str, say: Say) -> None:
    """Have the nodes release their copies, and see that the step is gone."""
    # srun passes this one on; at SIGTERM it would have the tasks killed.
    group.signal(signal.SIGUSR1)
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(group.wait(), _RELEASE_S)
    await group.stop()
    try:
        await steps.end(name)
    except ProctorError as error:
        say(f"the step {name} that holds copies of the weights may still run: {error.message}")
