"""What a run says while it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from proctor.plan import Plan
from proctor.worker.events import Event, read_events, read_turns


class Progress(Protocol):
    """Told what happens; must not raise. Implementations: Silent, and the command line's live view."""

    def phase(self, name: str) -> None:
        """A step of the run begins."""
        ...

    def planned(self, plan: Plan) -> None:
        """What is owed before anything is asked."""
        ...

    def events(self, events: list[Event]) -> None:
        """News of workers; counters are each worker's own and only grow."""
        ...


class Silent:
    """Says nothing."""

    def phase(self, name: str) -> None:
        return None

    def planned(self, plan: Plan) -> None:
        return None

    def events(self, events: list[Event]) -> None:
        return None


def history(directory: Path) -> list[Event]:
    """What all workers of a run have said, file by file, as far as phases and final counters need it."""
    return [event for path in sorted(directory.glob("*.jsonl")) for event in read_turns(path)]


class WorkerEvents:
    """Reads all event files of a run, each from where the last look ended."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._offsets: dict[Path, int] = {}
        self._last: dict[str, Event] = {}

    def skip(self) -> None:
        """Pass over what earlier attempts said."""
        self.read()
        self._last.clear()

    def read(self) -> list[Event]:
        """What is new, file by file."""
        found: list[Event] = []
        for path in sorted(self._directory.glob("*.jsonl")):
            events, self._offsets[path] = read_events(path, self._offsets.get(path, 0))
            found += events
        self._last.update((e.worker, e) for e in found)
        return found

    def last(self, worker: str) -> Event | None:
        """The last thing that a worker said."""
        return self._last.get(worker)
