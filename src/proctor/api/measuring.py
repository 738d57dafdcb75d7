"""What earlier work of a run says about rates and start-up, and what a class of models is."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Final

from proctor.api.targets import Target
from proctor.config.engines import engine_kind
from proctor.config.spec import EndpointServer, OpenAIEngine
from proctor.plan import CostModel, Spent
from proctor.worker.events import Event

STARTUP_S: Final[Mapping[str, float]] = {
    "vllm": 120.0,
    "sglang": 120.0,
    "llama.cpp": 10.0,
    "lm_eval": 30.0,
    "fake": 1.0,
}
"""Until it is measured; by server or engine."""
OTHER_STARTUP_S: Final = 60.0
_AT_WORK: Final = frozenset({"asking", "draining"})
_READY: Final = frozenset({"serving", "asking"})
_WEIGHTS: Final = (".safetensors", ".bin", ".gguf", ".pt")


@dataclass(slots=True)
class Measured:
    """What the workers of one model were seen to do."""

    busy: list[Spent] = field(default_factory=list[Spent])
    startups_s: list[float] = field(default_factory=list[float])
    """Of the starts after which the server could be asked."""
    starts: int = 0
    """How often a worker started a server, or an engine of its own, for this model."""
    starting_s: float = 0.0
    """What all of them took until then, or until a worker that did not come so far was last heard of."""
    reloads: int = 0
    """How often a worker loaded this model's weights into a server that ran already, instead of starting one."""
    reloading_s: float = 0.0

    @property
    def spent(self) -> Spent:
        """All of it, to be held against the plan."""
        return sum(self.busy, Spent())


def measured(events: Iterable[Event]) -> dict[str, Measured]:
    """By model. Events of one worker are in order of time; one that `begins` is a new life with counters at zero.

    Busy seconds are those between two events of which the first says asking or draining. They count a server that waits
    for nothing but its own last requests, so they err on the slow side for very small runs.
    """
    found: dict[str, Measured] = {}
    lives: dict[str, list[Event]] = {}
    for event in events:
        if event.begins and event.worker in lives:
            _add(found, lives.pop(event.worker))
        lives.setdefault(event.worker, []).append(event)
    for life in lives.values():
        _add(found, life)
    return found


def _add(found: dict[str, Measured], life: list[Event]) -> None:
    into = found.setdefault(life[0].model, Measured())
    # A worker that is ready may still wait for its plan; one that does not say so is ready when it asks.
    ready = next((e for e in life if e.phase in _READY), None)
    if life[0].phase == "starting":
        took = max(0.0, (ready or life[-1]).time - life[0].time)
        if any(e.reloaded for e in life):
            into.reloads += 1
            into.reloading_s += took
        else:
            into.starts += 1
            into.starting_s += took
            if ready is not None:
                into.startups_s.append(took)
    if not any(e.phase == "asking" for e in life):
        return
    seconds = sum(max(0.0, b.time - a.time) for a, b in pairwise(life) if a.phase in _AT_WORK)
    last = life[-1]
    into.busy.append(
        Spent(
            seconds=seconds,
            requests=last.requests,
            prompt_tokens=last.prompt_tokens,
            completion_tokens=last.completion_tokens,
        )
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelClass:
    """Models that are taken to be equally fast: the same engine, and weights of about the same size."""

    engine: str
    size: int
    """Base-2 logarithm of the bytes of the weights, rounded; 0 where they are not on this machine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """What is known of a class."""

    cost: CostModel
    startup_s: float
    startup_source: str
    """prior, or measured on so many starts."""
    source: str
    """Of `cost`: prior, or measured on so many workers."""


def model_class(target: Target) -> ModelClass:
    """The class of a target."""
    size = weight_bytes(Path(target.entry.path))
    return ModelClass(engine=_engine(target), size=round(math.log2(size)) if size else 0)


def class_rates(found: Mapping[str, Measured], targets: Iterable[Target]) -> dict[ModelClass, Rates]:
    """Rates of every class among the targets, from the events of its own models; else the prior."""
    members: dict[ModelClass, list[Measured]] = {}
    for target in targets:
        known = members.setdefault(model_class(target), [])
        if target.id in found:
            known.append(found[target.id])
    return {kind: _rates(kind, known) for kind, known in members.items()}


def _rates(kind: ModelClass, known: list[Measured]) -> Rates:
    busy = [b for m in known for b in m.busy]
    startups = [s for m in known for s in m.startups_s]
    prior = CostModel()
    cost = prior.calibrated(busy)
    return Rates(
        cost=cost,
        startup_s=median(startups) if startups else STARTUP_S.get(kind.engine, OTHER_STARTUP_S),
        startup_source=f"measured on {len(startups)} start(s)" if startups else "prior",
        source="prior" if cost == prior else f"measured on {len(busy)} worker(s)",
    )


def _engine(target: Target) -> str:
    engine = target.engine
    if isinstance(engine, OpenAIEngine) and engine.server is not None:
        return "fake" if isinstance(engine.server, EndpointServer) else engine.server.type
    return engine_kind(engine)


def weight_bytes(path: Path) -> int:
    """Bytes of the weight files at `path`; 0 where there are none here."""
    try:
        if path.is_file():
            return path.stat().st_size
        return sum(p.stat().st_size for p in path.iterdir() if p.suffix in _WEIGHTS)
    except OSError:
        return 0
