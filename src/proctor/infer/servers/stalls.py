"""Whether a server that is alive still works: it has requests, finishes none, and does nothing."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from proctor.infer.server import Load

BUSY_CORES: Final = 0.05
"""CPU time a second that counts as work. Answering our own questions for its health takes less, a token more."""
BUSY_PERCENT: Final = 1.0
"""GPU utilisation that counts as work."""
IDLE_S: Final = 10.0
"""Without any request for so long, a server is idle: a retry's pause is shorter."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Activity:
    """What the processes of one replica are doing."""

    cpu_s: float | None = None
    """CPU time so far, of those that live."""
    gpu_percent: float | None = None
    """Highest utilisation of its GPUs; where it is known, CPU time says nothing: a host thread waits by spinning."""


class StallWatch:
    """One start of one replica. Tell it what is seen; it says for how long nothing has happened."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._since = clock()
        self._busy = float("-inf")
        self._answered = 0
        self._cpu: tuple[float, float] | None = None
        self._first: float | None = None
        self._latest = 0.0
        self._last: Activity | None = None

    @property
    def watched_s(self) -> float:
        """Between the first and the last sight of nothing being done: a moment in which a server rests is no stall."""
        return 0.0 if self._first is None else self._latest - self._first

    def waiting_s(self, load: Load) -> float:
        """Seconds in which requests waited and none was answered."""
        now = self._clock()
        if load.in_flight:
            self._busy = now
        if load.answered != self._answered or now - self._busy > IDLE_S:
            self._since, self._cpu, self._first = now, None, None
        self._answered = load.answered
        return now - self._since

    def sees(self, activity: Activity | None) -> None:
        """Take in a sign of work, or its absence. The first sight of CPU time is only where counting starts.

        The same object again is no new sight: looking at other nodes takes time, and is not done each second.
        """
        now = self._clock()
        again, self._last = activity is self._last, activity
        if not again:
            self._first, self._latest = now if self._first is None else self._first, now
        if activity is None or (activity.gpu_percent or 0.0) >= BUSY_PERCENT:
            # Whoever cannot be seen is not accused.
            self._since, self._first = now, None
        elif not again and activity.gpu_percent is None and activity.cpu_s is not None:
            before, self._cpu = self._cpu, (now, activity.cpu_s)
            if before is not None and abs(activity.cpu_s - before[1]) > BUSY_CORES * (now - before[0]):
                self._since, self._first = now, None
