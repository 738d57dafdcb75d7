"""Joins a run's news to the live view."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import TextIO

from proctor.api.progress import Progress, Silent
from proctor.plan import Plan
from proctor.report.live import LiveProgress
from proctor.report.views import ProgressEvent
from proctor.worker.events import Event


class Watching:
    """Implements `api.progress.Progress` over a LiveProgress."""

    def __init__(self, view: LiveProgress) -> None:
        self._view = view

    def phase(self, name: str) -> None:
        self._view.message(name)

    def planned(self, plan: Plan) -> None:
        for model in plan.models:
            if model.owed:
                self._view.expect(model.model, model.owed)
            if model.damaged:
                self._view.message(f"{model.model}: {model.damaged} damaged rows in the store; what they held is owed")
        answered = sum(t.answered for m in plan.models for t in m.tasks)
        self._view.message(f"{plan.owed} requests to ask, {answered} answered already")

    def events(self, events: list[Event]) -> None:
        for event in events:
            self._view.update(
                ProgressEvent(
                    model=event.model,
                    worker=event.worker,
                    phase=event.phase,
                    requests=event.requests,
                    aliases=event.aliases,
                    failed=event.failed,
                    failures=event.failures,
                    prompt_tokens=event.prompt_tokens,
                    completion_tokens=event.completion_tokens,
                    in_flight=event.in_flight,
                    message=event.message,
                )
            )
        self._view.tick()


@contextmanager
def watching(stream: TextIO, *, quiet: bool) -> Generator[Progress]:
    """Show progress on `stream`, or nothing."""
    if quiet:
        yield Silent()
        return
    with LiveProgress(stream) as view:
        yield Watching(view)
