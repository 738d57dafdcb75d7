"""Chooses the server that a configuration asks for."""

from __future__ import annotations

from collections.abc import Sequence

from proctor.config.spec import CommandServer, EndpointServer, LlamaCppServer, ServerSpec, SglangServer, VllmServer
from proctor.errors import ConfigError
from proctor.infer.server import ServedModel, Server, ServerPaths
from proctor.infer.servers.command import CommandRecipe
from proctor.infer.servers.endpoint import Endpoint
from proctor.infer.servers.launched import LaunchedServer, Recipe
from proctor.infer.servers.llamacpp import LlamaCppRecipe
from proctor.infer.servers.placement import OnThisMachine
from proctor.infer.servers.sglang import SglangRecipe
from proctor.infer.servers.steps import Steps, StepTerms
from proctor.infer.servers.vllm import VllmRecipe
from proctor.processes.container import Container

Launched = LlamaCppServer | VllmServer | SglangServer | CommandServer


def build_server(
    spec: ServerSpec,
    model: ServedModel,
    *,
    paths: ServerPaths,
    gpus: Sequence[Sequence[int | str]] = (),
    api_key: str | None = None,
    urls: Sequence[str] = (),
    container: Container | None = None,
    steps: StepTerms | None = None,
) -> Server:
    """A server that is not started yet: enter it to start it.

    `gpus` names the devices of each replica, as CUDA_VISIBLE_DEVICES would (empty: the environment's own).
    `api_key`: for an endpoint the key it wants; otherwise instead of a random one. `urls`: an endpoint's further
    base URLs. `container`: around each replica; llama.cpp, which is part of this environment, stays outside.
    `steps`: the nodes of the job that the servers are spread over; None: all run on this machine.
    Raises ConfigError if the configuration contradicts itself.
    """
    if isinstance(spec, EndpointServer):
        return Endpoint(spec, model, urls=urls, api_key=api_key)
    around = None if isinstance(spec, LlamaCppServer) else container
    if steps is not None:
        return _spread(spec, model, steps, paths=paths, api_key=api_key, container=around)
    devices = [tuple(str(gpu) for gpu in group) for group in gpus]
    if devices and len(devices) != spec.replicas:
        raise ConfigError(f"{spec.replicas} replicas need as many groups of GPUs, not {len(devices)}")
    short = [len(group) for group in devices if len(group) != spec.gpu_count]
    if spec.gpu_count and short:
        raise ConfigError(
            f"each replica needs {spec.gpu_count} GPUs, but one would get {short[0]}",
            hint="lower `gpus` or `replicas` of the server, or make more GPUs visible (CUDA_VISIBLE_DEVICES)",
        )
    recipe = recipe_for(spec, model)
    here = OnThisMachine(spec.replicas, devices=devices)
    return LaunchedServer(recipe, spec, model, paths=paths, api_key=api_key, container=around, placement=here)


def _spread(
    spec: Launched,
    model: ServedModel,
    steps: StepTerms,
    *,
    paths: ServerPaths,
    api_key: str | None,
    container: Container | None,
) -> Server:
    if isinstance(spec, LlamaCppServer) and steps.nodes_per_server > 1:
        raise ConfigError(
            f"llama.cpp runs on one node, not on {steps.nodes_per_server}",
            hint="set launch.nodes_per_server to 1; launch.servers says how many of them a job has",
        )
    placement = Steps(steps, replicas=spec.replicas, gpus=spec.gpu_count)
    return LaunchedServer(
        recipe_for(spec, model),
        spec,
        model,
        paths=paths,
        api_key=api_key,
        container=container,
        placement=placement,
    )


def recipe_for(spec: Launched, model: ServedModel) -> Recipe:
    """What is particular to servers of this kind. Raises ConfigError."""
    match spec:
        case LlamaCppServer():
            return LlamaCppRecipe(spec, model)
        case VllmServer():
            return VllmRecipe(spec, model)
        case SglangServer():
            return SglangRecipe(spec, model)
        case CommandServer():
            return CommandRecipe(spec, model)
