"""A model's server for as long as it is needed: its nodes, its weights near them, and the server itself."""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncGenerator
from functools import partial
from pathlib import Path

from proctor.config.spec import EndpointServer, OpenAIEngine
from proctor.infer.server import Server
from proctor.infer.servers.steps import StepTerms
from proctor.worker.assignment import SlurmTerms
from proctor.worker.build import server_for
from proctor.worker.events import EventLog
from proctor.worker.handover import Handover
from proctor.worker.job import Job
from proctor.worker.nodes import step_terms
from proctor.worker.run_directory import RunDirectory
from proctor.worker.staging import staged_weights
from proctor.worker.staging_steps import staged_on_nodes


@contextlib.asynccontextmanager
async def serving(
    job: Job, terms: SlurmTerms | None, *, worker: str, events: EventLog, handover: Handover
) -> AsyncGenerator[Server | None]:
    """The job's server, up; None for engines that hold the model themselves. `terms`: those of the Slurm job, if any.

    It is the one that `handover` kept, if that could be made this job's; and is kept there at the end if another job
    may use it.

    Raises LaunchError for a job with the wrong number of nodes, ServerError, ConfigError.
    """
    async with contextlib.AsyncExitStack() as stack:
        steps: StepTerms | None = None
        kept = await handover.take(job, worker=worker, events=events)
        if kept is not None:
            await stack.enter_async_context(handover.owned(kept))
            server: Server | None = kept
        else:
            steps = None if terms is None else await step_terms(terms, os.environ)
            staged = None
            if terms is not None and terms.staging is not None and starts_a_server(job):
                say = partial(events.phase, "starting")
                if steps is None:
                    copy = staged_weights(terms.staging, job.path, say=say)
                else:
                    log = RunDirectory(Path(job.run_directory)).logs / f"{worker}.staging.log"
                    copy = staged_on_nodes(terms.staging, job.path, steps, log=log, say=say)
                staged = await stack.enter_async_context(copy)
            server = server_for(job, worker=worker, steps=steps, staged=staged)
            if server is not None:
                await stack.enter_async_context(server)
        yield server
        if steps is None:  # other nodes could reach what a reload needs
            await handover.keep(job, server, stack)


def starts_a_server(job: Job) -> bool:
    """Whether the weights are read by a server that we start."""
    spec = job.engine_spec
    return isinstance(spec, OpenAIEngine) and not isinstance(spec.server, EndpointServer)
