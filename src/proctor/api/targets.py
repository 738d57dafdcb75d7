"""Models to targets: which weights, under which resolution, by which engine."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from proctor.api.context import RunContext
from proctor.api.gpus import GpuFinder
from proctor.catalog.models import ModelEntry, ModelKind, expand_models
from proctor.catalog.weights import Weights, identify
from proctor.config.engines import Engine, Launch, engine_for, engine_kind, launch_for
from proctor.config.numerics import numerics
from proctor.config.spec import (
    EndpointServer,
    LlamaCppServer,
    LmEvalModelEngine,
    OpenAIEngine,
    RunSpec,
)
from proctor.errors import ConfigError
from proctor.infer import lm_eval_resolution
from proctor.infer.profiles import DEFAULT_LENGTH, resolution_digest, window_length
from proctor.infer.tokenizer_directory import read_config, read_json
from proctor.records import digest
from proctor.store import Store
from proctor.worker.job import Job


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One set of weights, and everything that decides what its answers are stored under."""

    id: str
    """Unique within the run: the entry's name, with the checkpoint's label where there are several."""
    entry: ModelEntry
    engine: Engine
    launch: Launch
    weights: str
    identity: str
    resolution: str
    profile: str
    gpus_reason: str = ""
    """Why so many GPUs, where `auto` has decided."""

    @property
    def gpus(self) -> int:
        """GPUs that one worker needs."""
        if isinstance(self.engine, LmEvalModelEngine):
            return self.engine.gpus
        server = self.engine.server if isinstance(self.engine, OpenAIEngine) else None
        if server is None or isinstance(server, EndpointServer):
            return 0
        return server.gpu_count * server.replicas

    def job(self, context: RunContext) -> Job:
        """What this target's workers are told."""
        entry = self.entry
        return Job(
            run=context.spec.name,
            run_directory=str(context.directory.root),
            store=context.spec.store,
            model=self.id,
            display_name=entry.shown,
            weights=self.weights,
            resolution=self.resolution,
            engine=self.engine.model_dump(mode="json"),
            path=entry.path,
            served_model=entry.served_model or "default",
            revision=entry.revision,
            urls=entry.urls,
            api_key_env=entry.api_key_env,
            tokenizer=entry.tokenizer,
            trust_remote_code=entry.trust_remote_code,
            gpus=self.gpus,
        )


def resolve_targets(context: RunContext, store: Store | None) -> list[Target]:
    """Every model and checkpoint of the run, identified; with a store, the identities are kept there.

    Reads weight files whose digests are not known yet. Raises ModelError, ConfigError, StoreError.
    """
    entries = expand_models(context.spec)
    several = Counter(e.name for e in entries)
    gpus = GpuFinder(context)
    targets = [_target(context.spec, e, gpus, several=several[e.name] > 1 or e.label != "main") for e in entries]
    if store is not None:
        for target in targets:
            store.write_identity(target.weights, {"fingerprint": target.weights, "identity": target.identity})
    return targets


def _target(spec: RunSpec, entry: ModelEntry, gpus: GpuFinder, *, several: bool) -> Target:
    engine = engine_for(spec, entry.name, entry.path)
    _check(entry, engine)
    weights = identify(entry, numerics=numerics(engine))
    engine, gpus_reason = gpus.decide(entry, engine)
    if isinstance(engine, OpenAIEngine):
        engine = engine.model_copy(update={"max_length": _window(entry, engine, weights)})
    return Target(
        id=f"{entry.name}@{entry.label}" if several else entry.name,
        entry=replace(entry, display_name=entry.display_name or entry.name),
        engine=engine,
        launch=launch_for(spec, entry.name),
        weights=weights.fingerprint,
        identity=weights.identity,
        resolution=_resolution(entry, engine, weights),
        profile=engine.profile if isinstance(engine, OpenAIEngine) else engine_kind(engine),
        gpus_reason=gpus_reason,
    )


def _check(entry: ModelEntry, engine: Engine) -> None:
    if isinstance(engine, LmEvalModelEngine) and entry.kind is ModelKind.ENDPOINT:
        raise ConfigError(
            f"models.{entry.name}: an lm-eval model class loads weights itself, but {entry.path!r} is a server",
            hint="use `engine: {type: openai}` for it, or give the weights as the model's path",
        )


def _window(entry: ModelEntry, engine: OpenAIEngine, weights: Weights) -> int:
    """The engine's window in tokens: what the profile says, but never more than the model or its server has."""
    directory = Path(entry.path)
    config = read_json(directory / "config.json") if directory.is_dir() else {}
    tokenizer = Path(entry.tokenizer) if entry.tokenizer else directory
    wanted = window_length(engine, config, read_config(tokenizer) if tokenizer.is_dir() else {})
    if engine.max_length is not None:
        return wanted
    limits = [wanted if directory.is_dir() else DEFAULT_LENGTH]
    if weights.max_length is not None:
        limits.append(weights.max_length)
    if isinstance(engine.server, LlamaCppServer):
        limits.append(engine.server.context)
    return min(limits)


def _generation_config(entry: ModelEntry) -> dict[str, Any]:
    directory = Path(entry.path)
    return read_json(directory / "generation_config.json") if directory.is_dir() else {}


def _resolution(entry: ModelEntry, engine: Engine, weights: Weights) -> str:
    tokenizer = weights.tokenizer_digest or f"of {weights.fingerprint}"
    template = weights.template_digest or "none"
    if isinstance(engine, LmEvalModelEngine):
        return lm_eval_resolution.resolution_digest(
            engine, tokenizer=tokenizer, template=template, generation_config=_generation_config(entry)
        )[:16]
    if isinstance(engine, OpenAIEngine):
        return resolution_digest(
            engine,
            tokenizer=tokenizer,
            template=template,
            max_length=engine.max_length or DEFAULT_LENGTH,
            generation_config=_generation_config(entry),
        )[:16]
    return digest("fake")[:16]
