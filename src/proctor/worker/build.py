"""From a job to its server and its engine."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from proctor.config.engines import client_processes
from proctor.config.spec import EndpointServer, LlamaCppServer
from proctor.config.spec import LmEvalModelEngine as LmEvalSpec
from proctor.config.spec import OpenAIEngine as OpenAISpec
from proctor.errors import ConfigError, MissingTool
from proctor.infer.engine import Engine
from proctor.infer.fake import FakeEngine
from proctor.infer.lm_eval_model import LmEvalModelEngine
from proctor.infer.openai import OpenAIEngine
from proctor.infer.resolve import IF_OFFERED, SERVER, TokenizerSource
from proctor.infer.server import Backend, ServedModel, Server, ServerPaths
from proctor.infer.servers.build import build_server, recipe_for
from proctor.infer.servers.launched import LaunchedServer
from proctor.infer.servers.steps import StepTerms
from proctor.records import EngineInfo
from proctor.worker.clients import ClientProcesses
from proctor.worker.events import EventLog
from proctor.worker.job import Job
from proctor.worker.run_directory import RunDirectory


def server_for(job: Job, *, worker: str, steps: StepTerms | None = None, staged: str | None = None) -> Server | None:
    """The server that the job's engine asks, not started; None for engines that hold the model themselves.

    `steps`: the nodes that the job's servers share. `staged`: a copy of the model's files to serve instead.
    """
    spec = job.engine_spec
    if not isinstance(spec, OpenAISpec):
        return None
    if spec.server is None:
        raise ConfigError(f"the job of model {job.model!r} names no server")
    directory = RunDirectory(Path(job.run_directory))
    scratch = directory.logs / f"{worker}.scratch"
    scratch.mkdir(parents=True, exist_ok=True)
    model = _served(job, staged)
    paths = ServerPaths(logs=directory.logs / worker, scratch=scratch)
    paths.logs.mkdir(parents=True, exist_ok=True)
    devices = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return build_server(
        spec.server,
        model,
        paths=paths,
        gpus=_groups([d for d in devices.split(",") if d], spec),
        api_key=_api_key(job),
        urls=job.urls,
        container=job.container,
        steps=steps,
    )


def adopt(server: LaunchedServer, job: Job, *, worker: str) -> None:
    """Make a running server the job's own. It holds the job's weights already."""
    spec = job.engine_spec
    assert isinstance(spec, OpenAISpec) and spec.server is not None and not isinstance(spec.server, EndpointServer)
    model = _served(job, None)
    logs = RunDirectory(Path(job.run_directory)).logs / worker
    server.take_over(recipe_for(spec.server, model), model, logs=logs)


def _served(job: Job, staged: str | None) -> ServedModel:
    return ServedModel(
        path=staged or job.path,
        revision=job.revision,
        name=job.served_model,
        tokenizer=job.tokenizer,
        trust_remote_code=job.trust_remote_code,
    )


@dataclass(slots=True)
class ComingServer:
    """Stands for a server that is not up yet: what asks it can be made before."""

    server: Server | None = None
    """Set when it is up."""

    @property
    def backends(self) -> tuple[Backend, ...]:
        """None before it is up."""
        return () if self.server is None else self.server.backends

    @property
    def info(self) -> EngineInfo:
        """Valid once it is up."""
        if self.server is None:
            raise RuntimeError("the server is not up")
        return self.server.info


def watched(server: Server | None, engine: Engine, clients: ClientProcesses, events: EventLog) -> None:
    """Let others know what all clients have with each server: a server, to tell a stall from idleness; the events."""
    if isinstance(engine, OpenAIEngine):
        clients.engine = engine
        events.load = clients.load
        if isinstance(server, LaunchedServer):
            server.observe(clients.load)


def engine_for(job: Job, server: Server | ComingServer | None, *, worker: str, workers: int = 1) -> Engine:
    """The job's engine, not entered: for one of the processes that ask a server of the worker.

    `workers`: how many there are; they have the same servers in common if those run already. Raises ConfigError,
    ModelError.
    """
    spec = job.engine_spec
    if isinstance(spec, LmEvalSpec):
        directory = RunDirectory(Path(job.run_directory))
        return LmEvalModelEngine(
            spec,
            path=job.path,
            log=directory.logs / f"{worker}.host.log",
            revision=job.revision,
            tokenizer=job.tokenizer,
            trust_remote_code=job.trust_remote_code,
            container=job.container,
        )
    if isinstance(spec, OpenAISpec):
        if server is None:
            raise ConfigError(f"the engine of model {job.model!r} needs a server")
        return OpenAIEngine(
            spec,
            backends=lambda: server.backends,
            info=lambda: server.info,
            tokenizer=_tokenizer(job, spec),
            model_directory=job.path if Path(job.path).is_dir() else None,
            company=client_processes(spec) > 1 or (workers > 1 and isinstance(spec.server, EndpointServer)),
        )
    return FakeEngine(spec)


def _tokenizer(job: Job, spec: OpenAISpec) -> TokenizerSource:
    if job.tokenizer is not None:
        return Path(job.tokenizer)
    if Path(job.path).is_dir():
        return Path(job.path)
    # llama.cpp serves the tokenizer of the GGUF; a foreign endpoint may have one.
    return SERVER if isinstance(spec.server, LlamaCppServer) else IF_OFFERED


def _groups(devices: list[str], spec: OpenAISpec) -> list[list[str]]:
    server = spec.server
    if server is None or isinstance(server, EndpointServer) or not server.gpu_count:
        return []
    size = server.gpu_count
    return [devices[i * size : (i + 1) * size] for i in range(server.replicas)]


def _api_key(job: Job) -> str | None:
    if job.api_key_env is None:
        return None
    key = os.environ.get(job.api_key_env)
    if not key:
        raise MissingTool(
            f"the environment variable {job.api_key_env!r} that holds the key of {job.model!r} is not set",
            hint=f"export {job.api_key_env}=… and repeat the command",
        )
    return key
