"""Runs on the fake engine, planned and marked in this process; nothing is started."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from proctor.api.context import RunContext
from proctor.api.planning import make_plan
from proctor.api.recording import Recorded, record
from proctor.api.scoring import Scores, score_run
from proctor.api.targets import Target, resolve_targets
from proctor.plan import Plan
from proctor.records import Answer, EngineInfo, Instance, Response
from proctor.store import Owner, Store

ENGINE = EngineInfo(engine="fake", version="1", dtype="float32")
Reply = Callable[[Instance], Answer | None]


@dataclass
class Desk:
    """One configuration, opened."""

    context: RunContext
    store: Store
    targets: list[Target]
    recorded: Recorded

    @classmethod
    def open(cls, config: Path, overrides: Sequence[str] = ()) -> Desk:
        context = RunContext.open(config, overrides)
        store = context.store(create=True)
        return cls(
            context=context, store=store, targets=resolve_targets(context, store), recorded=record(context, store)
        )

    def plan(self, *, retry_failed: bool = False) -> Plan:
        return make_plan(self.context, self.store, self.targets, self.recorded.suites, retry_failed=retry_failed)

    def score(self) -> Scores:
        return score_run(self.context, self.store, self.targets, self.recorded)

    def answer(self, reply: Reply, *, target: int = 0) -> None:
        """Store what `reply` says to each request, each once."""

        async def work() -> None:
            one = self.targets[target]
            async with self.store.writer(one.weights, one.resolution, owner=Owner.here()) as writer:
                await writer.engine(ENGINE)
                seen: set[str] = set()
                for recording in self.recorded.recordings.values():
                    for instance in recording.instances:
                        found = None if instance.key in seen else reply(instance)
                        seen.add(instance.key)
                        if found is not None:
                            await writer.append(found)

        asyncio.run(work())


def says(text: str) -> Reply:
    """The same text to everything."""

    def reply(instance: Instance) -> Response:
        return Response(
            key=instance.key,
            physical_key=instance.key,
            text=text,
            logprob=-1.0 - instance.index,
            is_greedy=False,
            finish_reason="stop",
            engine_id=ENGINE.id,
        )

    return reply


@dataclass
class Room:
    """Where configurations are written."""

    root: Path

    def task(self, name: str, words: Sequence[str], **more: Any) -> str:
        (self.root / f"{name}.jsonl").write_text("".join(json.dumps({"word": w}) + "\n" for w in words))
        task = {
            "task": name,
            "version": 1,
            "dataset": {"path": f"{name}.jsonl"},
            "output": "generate",
            "prompt": "Say {{word}}:",
            "target": "yes",
            "metrics": ["exact_match"],
        }
        (self.root / f"{name}.yaml").write_text(yaml.safe_dump(task | more))
        return f"{name}.yaml"

    def run(self, tasks: list[Any], **more: Any) -> Path:
        model = self.root / "model"
        if not model.exists():
            model.mkdir()
            (model / "config.json").write_text("{}")
            (model / "pytorch_model.bin").write_bytes(b"weights")
        run = {"name": "r", "models": {"m": {"path": "model"}}, "tasks": tasks, "engine": {"type": "fake"}}
        path = self.root / "run.yaml"
        path.write_text(yaml.safe_dump(run | more))
        return path


@pytest.fixture
def room(tmp_path: Path) -> Room:
    return Room(tmp_path)
