"""A model's server for as long as it is needed: its nodes, its weights near them, and the server itself."""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncGenerator
from functools import partial

from proctor.config.spec import EndpointServer, OpenAIEngine
from proctor.infer.server import Server
from proctor.infer.servers.steps import StepTerms
from proctor.worker.assignment import SlurmTerms
from proctor.worker.build import server_for
from proctor.worker.events import EventLog
from proctor.worker.handover import Handover
from proctor.worker.job import Job
from proctor.worker.nodes import step_terms
from proctor.worker.staging import staged_weights


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
            if terms is not None and terms.staging is not None and serves_here(job, steps):
                say = partial(events.phase, "starting")
                staged = await stack.enter_async_context(staged_weights(terms.staging, job.path, say=say))
            server = server_for(job, worker=worker, steps=steps, staged=staged)
            if server is not None:
                await stack.enter_async_context(server)
        yield server
        if steps is None:  # other nodes could reach what a reload needs
            await handover.keep(job, server, stack)


def serves_here(job: Job, steps: StepTerms | None) -> bool:
    """Whether a server that we start reads the weights on this node, and on no other."""
    spec = job.engine_spec
    started = isinstance(spec, OpenAIEngine) and not isinstance(spec.server, EndpointServer)
    return started and steps is None
