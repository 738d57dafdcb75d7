"""The view of a run while it runs: one line for each model, or plain lines where there is no terminal."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Final, Protocol, Self, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from proctor.report.text import count, duration, encodable, shown
from proctor.report.views import ProgressEvent

LINE_INTERVAL_S: Final = 5.0
"""Between two plain lines of one model: logs stay readable."""
DRAW_INTERVAL_S: Final = 0.2
"""Between two frames on a terminal."""
RATE_WINDOW_S: Final = 30.0
"""Rates are those of the last half minute: start-up must not spoil the estimate for the whole run."""


_NUMBERS: Final = ("requests", "per s", "tokens/s", "left")


class Progress(Protocol):
    """Takes what workers tell."""

    def update(self, event: ProgressEvent) -> None: ...

    def tick(self) -> None: ...


class _Console(Console):
    """rich ends the whole program when a pipe breaks; here it is an error like any other."""

    def on_broken_pipe(self) -> None:
        raise OSError("the reader of the output has gone")


class LiveProgress:
    """Shows requests, tokens/s, time left, phases and failures by boundary of each model.

    A context manager. `owed` gives each model's number of requests; models may also first appear in an
    event. Whatever goes wrong with the output (closed pipe, odd encoding) ends the view, never the run.
    Not thread-safe: call it from the event loop, `tick` a few times a second so that the clock moves.
    """

    def __init__(
        self,
        stream: TextIO,
        *,
        owed: Mapping[str, int] | None = None,
        clock: Callable[[], float] = time.monotonic,
        width: int | None = None,
    ) -> None:
        self._stream = stream
        self._clock = clock
        self._models = {name: _Model(owed=n) for name, n in (owed or {}).items()}
        self._console = _Console(file=stream, highlight=False, markup=False, emoji=False, width=width)
        self._live: Live | None = None
        self._started = clock()
        self._drawn = -DRAW_INTERVAL_S
        self._broken = False

    def __enter__(self) -> Self:
        self._started = self._clock()
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            # No refresh thread: it would read the counters while they change.
            live = Live(console=self._console, auto_refresh=False, redirect_stdout=False, redirect_stderr=False)
            self._live = live
            self._attempt(live.start)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        live, self._live = self._live, None
        if live is not None:
            self._attempt(lambda: live.update(self._frame(), refresh=True))
            self._attempt(live.stop)
        else:
            for name, model in self._models.items():
                self._line(name, model, force=True)

    def expect(self, model: str, owed: int) -> None:
        """Say how many requests a model is owed, once that is known."""
        self._model(model).owed = owed

    def update(self, event: ProgressEvent) -> None:
        """Take in one worker's state."""
        model = self._model(event.model)
        news = model.take(event, self._clock())
        if self._live is not None:
            self._draw(force=news)
        else:
            self._line(event.model, model, force=news)

    def tick(self) -> None:
        """Let time pass."""
        if self._live is not None:
            self._draw(force=False)
            return
        for name, model in self._models.items():
            if model.working:
                self._line(name, model, force=False)

    def message(self, text: str) -> None:
        """Say something once, above the view."""
        if self._live is not None:
            self._attempt(lambda: self._console.print(Text(self._safe(text))))
        else:
            self._write(text)

    def _model(self, name: str) -> _Model:
        return self._models.setdefault(name, _Model())

    def _draw(self, *, force: bool) -> None:
        now = self._clock()
        live = self._live
        if live is not None and (force or now - self._drawn >= DRAW_INTERVAL_S):
            self._drawn = now
            self._attempt(lambda: live.update(self._frame(), refresh=True))

    def _frame(self) -> Group:
        now = self._clock()
        table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
        for name in ("model", "phase", "requests", "per s", "tokens/s", "left", ""):
            # Where the screen is narrow, names and troubles give way, never numbers.
            table.add_column(name, justify="right" if name in _NUMBERS else "left", no_wrap=name not in ("model", ""))
        # A screen holds only so many models: those at work come first.
        ranked = sorted(self._models.items(), key=lambda item: not item[1].working)
        room = max(1, self._console.height - 4)
        for name, model in ranked[:room]:
            cells = (name, model.phase, model.done_of, *model.rates(now), model.trouble)
            style = "red" if model.phase == "failed" else "yellow" if model.failed else ""
            table.add_row(*(Text(self._safe(c), style=style, no_wrap=True, overflow="ellipsis") for c in cells))
        rest = f"and {len(ranked) - room} more models; " if len(ranked) > room else ""
        return Group(table, Text(f"{rest}{duration(now - self._started)} so far", style="dim"))

    def _line(self, name: str, model: _Model, *, force: bool) -> None:
        now = self._clock()
        if not force and now - model.printed < LINE_INTERVAL_S:
            return
        per_s, tokens_per_s, left = model.rates(now)
        parts = [model.phase, model.done_of]
        parts += (
            [f"{per_s} requests/s", f"{tokens_per_s} tokens/s", *([f"{left} left"] if left else [])] if per_s else []
        )
        line = f"{name}: " + ", ".join(p for p in (*parts, model.trouble) if p)
        if line != model.line:
            model.printed, model.line = now, line
            self._write(line)

    def _write(self, text: str) -> None:
        def write() -> None:
            self._stream.write(self._safe(text) + "\n")
            self._stream.flush()

        self._attempt(write)

    def _safe(self, text: str) -> str:
        return encodable(shown(text), getattr(self._stream, "encoding", None))

    def _attempt(self, output: Callable[[], object]) -> None:
        """Write, unless writing has failed before. A run of hours must not die for its progress bar."""
        if self._broken:
            return
        try:
            output()
        except (OSError, ValueError, LookupError):
            self._broken = True


@dataclass(slots=True)
class _Worker:
    """The last state of one worker, and what it had counted before it began again from zero."""

    last: ProgressEvent | None = None
    before: Counter[str] = field(default_factory=Counter[str])
    counts: Counter[str] = field(default_factory=Counter[str])
    failures: Counter[str] = field(default_factory=Counter[str])
    failures_before: Counter[str] = field(default_factory=Counter[str])


@dataclass(slots=True)
class _Model:
    """The sum of a model's workers."""

    owed: int | None = None
    workers: dict[str, _Worker] = field(default_factory=dict[str, _Worker])
    totals: Counter[str] = field(default_factory=Counter[str])
    history: deque[tuple[float, int, int]] = field(default_factory=deque[tuple[float, int, int]])
    """(time, requests dealt with, tokens)."""
    printed: float = float("-inf")
    line: str = ""
    """The last plain line, and when it was printed."""
    note: str = ""

    def take(self, event: ProgressEvent, now: float) -> bool:
        """Take in a state; whether it is news that should be shown at once."""
        worker = self.workers.setdefault(event.worker, _Worker())
        old_phase = self.phase
        if worker.last is not None and event.requests < worker.last.requests:
            worker.before, worker.failures_before = worker.counts, worker.failures
        worker.last = event
        own = Counter(
            requests=event.requests,
            aliases=event.aliases,
            failed=event.failed,
            prompt=event.prompt_tokens,
            completion=event.completion_tokens,
        )
        old = worker.counts
        worker.counts = worker.before + own
        worker.failures = worker.failures_before + Counter(dict(event.failures))
        for name in own:
            self.totals[name] += worker.counts[name] - old[name]
        if event.message:
            # The rest, such as the end of a server's log, is in the error that ends the run.
            self.note = event.message.partition("\n")[0]
        self.history.append((now, self.dealt_with, self.tokens))
        while len(self.history) > 2 and now - self.history[0][0] > RATE_WINDOW_S:
            self.history.popleft()
        return self.phase != old_phase or bool(event.message)

    @property
    def phase(self) -> str:
        """What most of its workers that are not finished do; how many, if several."""
        phases = Counter(w.last.phase for w in self.workers.values() if w.last is not None)
        if not phases:
            return "waiting"
        active = Counter({p: n for p, n in phases.items() if p not in ("done", "failed")})
        name, n = (active or phases).most_common(1)[0]
        return name if len(self.workers) == 1 else f"{name} ({n} of {len(self.workers)} workers)"

    @property
    def working(self) -> bool:
        """Some worker is not finished."""
        return any(w.last is not None and w.last.phase not in ("done", "failed") for w in self.workers.values())

    @property
    def failed(self) -> int:
        """Requests without an answer."""
        return self.totals["failed"]

    @property
    def dealt_with(self) -> int:
        """Answered, failed, or found not to need asking."""
        return self.totals["requests"] + self.totals["failed"] + self.totals["aliases"]

    @property
    def tokens(self) -> int:
        """Prompt and completion."""
        return self.totals["prompt"] + self.totals["completion"]

    @property
    def done_of(self) -> str:
        """120 of 500 (24 %)."""
        if self.owed is None:
            return f"{count(self.dealt_with)} requests" if self.dealt_with else ""
        share = f" ({100 * self.dealt_with // self.owed} %)" if self.owed else ""
        return f"{count(self.dealt_with)} of {count(self.owed)}{share}"

    def rates(self, now: float) -> tuple[str, str, str]:
        """Requests/s, tokens/s and time left; all empty while they are not known."""
        if not self.working or len(self.history) < 2:
            return "", "", ""
        then, dealt_with, tokens = self.history[0]
        seconds = now - then
        rate = (self.dealt_with - dealt_with) / seconds if seconds > 0 else 0.0
        if rate <= 0:
            return "", "", ""
        remaining = (self.owed or 0) - self.dealt_with
        left = duration(remaining / rate) if remaining > 0 else ""
        per_s = f"{rate:.1f}" if rate < 100 else count(round(rate))
        return per_s, count(round((self.tokens - tokens) / seconds)), left

    @property
    def trouble(self) -> str:
        """Failures by boundary, and the last message."""
        kinds: Counter[str] = Counter()
        for worker in self.workers.values():
            kinds += worker.failures
        parts: list[str] = []
        if self.failed:
            named = ", ".join(f"{name} {count(n)}" for name, n in sorted(kinds.items()))
            parts.append(f"{count(self.failed)} failed" + (f" ({named})" if named else ""))
        if self.note:
            parts.append(self.note)
        return "; ".join(parts)
