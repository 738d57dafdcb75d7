"""Asking an engine, and looking at what a fake server was sent."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

from proctor.infer.engine import PhysicalRequest
from proctor.infer.openai import OpenAIEngine
from proctor.records import Answer, Request, Response


async def ask(engine: OpenAIEngine, requests: Sequence[Request]) -> list[Answer]:
    """The answers to those that can be asked, in the order of the requests."""
    resolved = [r for r in await engine.resolve(requests) if isinstance(r, PhysicalRequest)]

    async def feed() -> AsyncIterator[PhysicalRequest]:
        for one in resolved:
            yield one

    answers = {answer.key: answer async for answer in engine.run(feed())}
    return [answers[r.key] for r in resolved]


async def respond(engine: OpenAIEngine, requests: Sequence[Request]) -> list[Response]:
    """As `ask`, where none may fail."""
    answers = await ask(engine, requests)
    assert len(answers) == len(requests)
    assert all(isinstance(a, Response) for a in answers), answers
    return [a for a in answers if isinstance(a, Response)]


def bodies(path: Path) -> list[dict[str, Any]]:
    """What a fake server with this file for its `bodies` was sent."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
