"""What a worker says while it works: cumulative counters, one JSON line at a time, one file per worker."""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from io import TextIOWrapper
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from proctor.errors import ProctorError
from proctor.infer.server import Load
from proctor.records import Answer, Failure, Response

INTERVAL_S: Final = 0.5
"""Between two progress lines: often enough for a live view, seldom enough for a shared file system."""
CORE_S: Final = 5.0
"""Over so long it is measured how much of a core the asking takes: at a start it takes all of it for a moment."""
LONGEST_S: Final = 5.0
_SHARE: Final = 720
"""Between two lines of a worker that has worked for an hour, LONGEST_S; before that, a share of what it has worked. A
file then has some thousand lines, not a hundred thousand."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """The state of one worker at one moment; counters only grow."""

    worker: str
    model: str
    phase: str
    """starting, serving, asking, draining, waiting, done, failed."""
    time: float
    requests: int = 0
    aliases: int = 0
    """Owed requests that turned out to be the same physical request as an answered one."""
    failed: int = 0
    failures: dict[str, int] = field(default_factory=dict[str, int])
    prompt_tokens: int = 0
    completion_tokens: int = 0
    in_flight: int = 0
    limits: list[int] = field(default_factory=list[int])
    """How many requests each of the model's servers is given at a time; found, not configured."""
    why: list[str] = field(default_factory=list[str])
    """Where each of these numbers comes from."""
    core: float = 0.0
    """Share of a core that the asking took lately, of the busiest process: at 1 it cannot ask more."""
    message: str = ""
    error: str = ""
    """Phase failed: the name of the error's class."""
    hint: str | None = None
    reloaded: bool = False
    """Whether the model's weights were loaded into a server that ran already."""

    @property
    def begins(self) -> bool:
        """Whether a worker starts here, its counters at zero; what it says while it starts has a message."""
        return self.phase == "starting" and not self.message


class EventLog:
    """Appends events. Losing the last one costs nothing: answers are counted in the store."""

    def __init__(self, target: Path | Callable[[Event], None], *, worker: str, model: str) -> None:
        """`target`: a file, or who is told instead."""
        self._target = target
        self._worker = worker
        self._model = model
        self._phase = "starting"
        self._failures: Counter[str] = Counter()
        self._requests = self._aliases = self._prompt = self._completion = 0
        self._last = 0.0
        self._began = time.monotonic()
        self._core = 0.0
        self._measured = 0.0, 0.0
        self._file: TextIOWrapper | None = None
        self.load: Callable[[], Mapping[str, Load]] | None = None
        """What each server has now; set once there is a client that knows."""
        self.beside: Callable[[], Sequence[Event]] = tuple
        """The latest events of processes that work for the same worker: their counters are added."""
        self.reloaded = False
        """Set when no server was started for this model, but its weights loaded into one that ran."""

    def __enter__(self) -> Self:
        if isinstance(self._target, Path):
            self._target.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._target.open("a", encoding="utf-8")
        self.phase("starting")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()

    def phase(self, name: str, message: str = "") -> None:
        """Enter a phase and say so at once."""
        self._phase = name
        self._write(message)

    def failed(self, error: ProctorError) -> None:
        """Say why this worker ends."""
        self._phase = "failed"
        self._write(error.message, error=type(error).__name__, hint=error.hint)

    def answered(self, answers: Sequence[Answer], *, in_flight: int) -> None:
        """Count durable answers."""
        good = [answer for answer in answers if isinstance(answer, Response)]
        self._requests += len(good)
        self._prompt += sum([answer.prompt_tokens for answer in good])
        self._completion += sum([answer.completion_tokens for answer in good])
        if len(good) < len(answers):
            self._failures.update(answer.boundary.value for answer in answers if isinstance(answer, Failure))
        self.tick(in_flight)

    def aliased(self) -> None:
        """Count one owed request that needed no asking."""
        self._aliases += 1

    def say(self, message: str) -> None:
        """Something that somebody should know, in whatever phase."""
        self._write(message)

    def tick(self, in_flight: int = 0) -> None:
        """Say how far it is, if that was not said lately."""
        now = time.monotonic()
        self._measure(now)
        if now - self._last >= min(LONGEST_S, max(INTERVAL_S, (now - self._began) / _SHARE)):
            self._write("", in_flight)

    def _measure(self, now: float) -> None:
        """Of this thread, in which everything is asked."""
        then, before = self._measured
        if now - then >= CORE_S:
            used = time.thread_time()
            self._core = min(1.0, max(0.0, (used - before) / (now - then))) if then else 0.0
            self._measured = now, used

    def _write(self, message: str, in_flight: int = 0, *, error: str = "", hint: str | None = None) -> None:
        self._last = time.monotonic()
        loads = [] if self.load is None else list(self.load().values())
        beside = self.beside()
        failures = sum((Counter(one.failures) for one in beside), self._failures.copy())
        event = Event(
            worker=self._worker,
            model=self._model,
            phase=self._phase,
            time=time.time(),
            requests=self._requests + sum(one.requests for one in beside),
            aliases=self._aliases + sum(one.aliases for one in beside),
            failed=failures.total(),
            failures=dict(failures),
            prompt_tokens=self._prompt + sum(one.prompt_tokens for one in beside),
            completion_tokens=self._completion + sum(one.completion_tokens for one in beside),
            in_flight=sum(one.in_flight for one in loads) if loads else in_flight,
            limits=[one.limit for one in loads],
            why=[one.why for one in loads],
            core=round(max([self._core, *(one.core for one in beside)]), 3),
            message=message,
            error=error,
            hint=hint,
            reloaded=self.reloaded,
        )
        if self._file is not None:
            self._file.write(json.dumps(asdict(event)) + "\n")
            self._file.flush()
        elif not isinstance(self._target, Path):
            self._target(event)


def read_events(path: Path, offset: int = 0) -> tuple[list[Event], int]:
    """Whole lines from `offset` on, and where to go on next time. A missing file has none."""
    try:
        with path.open("rb") as file:
            file.seek(offset)
            data = file.read()
    except FileNotFoundError:
        return [], offset
    end = data.rfind(b"\n") + 1
    return list(_parse(data[:end])), offset + end


def read_turns(path: Path) -> list[Event]:
    """The first and the last event of each stretch in which a worker did the same, and all others: what came between
    says nothing about phases, times and counters that these do not say. A missing file has none.

    A worker of a long run has said a hundred thousand things; they are passed over without being parsed.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return []
    data = data[: data.rfind(b"\n") + 1]
    found: list[Event] = []
    start = 0
    while start < len(data):
        end = data.find(b"\n", start) + 1
        found += _parse(data[start:end])
        phase = _PHASE.search(data, start, end)
        if phase is not None and phase[1] in _LONG:
            after = _LONG[phase[1]].search(data, end)
            stop = len(data) if after is None else data.rfind(b"\n", start, after.start()) + 1
            found += _last(data, end, stop)
            end = stop
        start = end
    return found


def _last(data: bytes, start: int, stop: int) -> list[Event]:
    """The last whole event of a stretch of lines, if there is one."""
    while start < stop:
        line = data.rfind(b"\n", start, stop - 1) + 1 or start
        if event := list(_parse(data[line:stop])):
            return event
        stop = line
    return []


_PHASE: Final = re.compile(rb'"phase": "(\w+)"')
_LONG: Final = {p: re.compile(rb'"phase": "(?!' + p + rb'")') for p in (b"asking", b"draining", b"waiting")}
"""Phases in which a worker says again and again how far it is → where the next other one is."""


def _parse(data: bytes) -> Iterator[Event]:
    for line in data.splitlines():
        try:
            yield Event(**json.loads(line))
        except (ValueError, TypeError):
            continue  # half a line of a killed worker: the next one says more
