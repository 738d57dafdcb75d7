"""How many requests one server gets at a time: found by trial, and by what the server says of itself.

Pure: the caller tells what happened and when, in seconds of any clock. `design/concurrency.md` has the reasons.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum
from typing import Final

START: Final = 16
LEAP: Final = 2.0
"""The factor of the first growth, while every step pays."""
STEP: Final = 1.4
"""The factor of a trial afterwards, in both directions."""
BOUND: Final = 4.0
"""That factor where it is plain that more is needed: throughput rose as the window did, or nothing waits."""
BOUND_GAIN: Final = 1.7
LEAP_GAIN: Final = 1.25
"""A leap pays if throughput rises by this; the next one is then worth trying."""
GAIN: Final = 1.04
"""A wider window must bring this much."""
LOSS: Final = 0.975
"""A narrower one may cost this much."""
BLOCK: Final = 16
"""Throughput is measured over whole windows of answers, and at least so many: a server answers in waves."""
BLOCK_S: Final = 0.1
"""And for so long: what else the machine does comes and goes in milliseconds."""
LEAP_BLOCK_S: Final = 0.02
"""That while the window leaps: growing too far by chance costs a queue, and what did not grow is looked at again."""
PATIENCE: Final = 8
"""Blocks after which a trial is decided by what it looks like."""
HOLD: Final = 6
HOLD_LONGEST: Final = 64
"""Blocks between two trials; twice as many after each that was in vain."""
MEMORY: Final = 0.8
"""What one block's throughput weighs against the next one's."""
SPREAD: Final = 0.6
"""Standard deviation of one answer's share in throughput, over its mean: 1 for answers that come at random."""
FULL: Final = 0.8
"""A measurement counts if the window was full for this share of the answers: an idle source is no slow server."""
CUT: Final = 0.7
CUT_PAUSE_S: Final = 1.0
CUT_PAUSE_LONGEST_S: Final = 64.0
"""One burst of refusals is one cut; cuts that do not help become rare."""
USELESS: Final = 0.75
"""A cut was useless if this share of the refusals remains."""
LOOKS: Final = 3
"""A queue that is there at so many looks in a row is one: new requests always wait for a moment."""
QUEUE: Final = "the server's queue"
REGROWTH: Final = 1.25
"""The factor of growth at each look at which a server that had a queue has none."""
FRESH_S: Final = 5.0
"""How long a server's word about itself holds."""
CACHE_NEAR: Final = 0.85
CACHE_FULL: Final = 0.97
"""Use of the key-value cache from which on nothing grows, and from which on the window shrinks."""
CACHE_CUT: Final = 0.9


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerWord:
    """What a server says of itself at one moment (see `infer.server_metrics`)."""

    running: float | None = None
    waiting: float = 0.0
    """Requests that it has taken and not begun."""
    cache: float | None = None
    """Share of the key-value cache in use, 0 to 1."""
    preemptions: float = 0.0
    """Ever: requests begun and put back for want of cache."""


class Phase(Enum):
    """What the window is doing."""

    LEAP = "growing"
    HOLD = "held"
    UP = "trying more"
    DOWN = "trying fewer"


@dataclass(slots=True)
class _Rate:
    """Answers over seconds."""

    answers: float = 0.0
    seconds: float = 0.0

    @property
    def value(self) -> float:
        return self.answers / max(self.seconds, 1e-9)

    def add(self, answers: int, seconds: float, *, memory: float = 1.0) -> None:
        self.answers = self.answers * memory + answers
        self.seconds = self.seconds * memory + seconds


class Window:
    """The window of one server: how many requests may be in flight, between 1 and `maximum`.

    The caller keeps `in_flight`, and reports each answer. `why` says in a few words what the limit comes from.
    """

    __slots__ = (
        "_base",
        "_base_limit",
        "_blocks",
        "_count",
        "_cut_at",
        "_cut_pause",
        "_down_next",
        "_dry",
        "_full",
        "_good",
        "_hold",
        "_paying",
        "_queued",
        "_refused",
        "_settling",
        "_share",
        "_since",
        "_trial",
        "_word",
        "_word_at",
        "in_flight",
        "limit",
        "maximum",
        "phase",
        "why",
    )

    def __init__(self, maximum: int, now: float = 0.0) -> None:
        self.maximum = maximum
        self.limit = min(START, maximum)
        self.in_flight = 0
        self.phase = Phase.LEAP
        self.why = "start"
        self._base = _Rate()
        self._base_limit = 0  # 0: nothing to compare with yet
        self._trial = _Rate()
        self._blocks = 0
        self._hold = HOLD
        self._down_next = False
        self._paying = True
        # The block at hand.
        self._since = now
        self._count = self._full = self._settling = 0
        self._dry = False
        # Refusals.
        self._good = self._refused = 0
        self._share = 0.0
        self._cut_at = -math.inf
        self._cut_pause = CUT_PAUSE_S
        self._word: ServerWord | None = None
        self._word_at = -math.inf
        self._queued: list[float] = []

    @property
    def waiting(self) -> float | None:
        """Requests that wait inside the server, as it last said; None if it says nothing."""
        return None if self._word is None else self._word.waiting

    def allow(self, maximum: int) -> None:
        """Another `maximum`."""
        self.maximum = maximum
        self.limit = min(self.limit, maximum)

    def answered(self, now: float) -> None:
        """An answer came, while `in_flight` still counted it."""
        in_flight, limit = self.in_flight, self.limit
        if 2 * in_flight < limit:
            # The source ran dry: what comes next says nothing about the time until then.
            self._dry = True
        elif self._dry:
            self._dry = False
            self._restart(now)
        self._count += 1
        if in_flight >= limit:
            self._full += 1
        if self._settling:
            self._settling -= 1
            if not self._settling:
                self._restart(now)
        elif self._count >= BLOCK and self._count % limit == 0:
            if now - self._since >= (LEAP_BLOCK_S if self.phase is Phase.LEAP else BLOCK_S):
                self._block(now)

    def refused(self, now: float, reason: str) -> None:
        """The server said that it is too much, or did not answer in time."""
        self._refused += 1
        if now - self._cut_at < self._cut_pause:
            return
        answers = self._good + self._count
        share = self._refused / (self._refused + answers)
        useless = self._share > 0 and share >= USELESS * self._share
        self._cut_pause = min(self._cut_pause * 2, CUT_PAUSE_LONGEST_S) if useless else CUT_PAUSE_S
        self._share, self._refused, self._good, self._cut_at = share, 0, -self._count, now
        # A trial that is refused has failed: what was before stands.
        trial = self.phase is Phase.UP and self._base_limit
        self._force(self._base_limit if trial else max(1, int(self.limit * CUT)), f"cut: {reason}", now)
        self._paying = False

    def told(self, word: ServerWord, now: float) -> None:
        """The server said how it is."""
        before = self._word if now - self._word_at <= FRESH_S else None
        self._word, self._word_at = word, now
        self._queued = [*(self._queued if before is not None else ()), word.waiting][-LOOKS:]
        if self._crowded(word, before):
            # Those under way take their time to leave: until the last cut has shown, there is no other.
            if self.in_flight <= self.limit:
                self._force(max(1, int(max(self.in_flight, 1) * CACHE_CUT)), "key-value cache full", now)
                self._paying = False
            return
        margin = self._margin(word)
        queued = min(self._queued) if len(self._queued) == LOOKS else 0.0
        if queued > 2 * margin:
            wanted = max(1, self.in_flight - math.floor(queued - margin))
            if wanted < self.limit:
                self._force(wanted, QUEUE, now)
                self._paying = True
        elif self._roomy(word):
            if self.phase is Phase.LEAP:
                self._bound(word, now)
            elif self.why == QUEUE and max(self._queued[-2:]) <= 0:
                # It was shrunk by the server's word, and not by a comparison: the word is enough to grow again. Twice,
                # for between two waves of answers there is no queue for a moment.
                self._force(self._up(REGROWTH), QUEUE, now)
            elif self.phase is Phase.HOLD and self._paying and self.why != QUEUE and self._base.answers:
                self._try_more(now)

    def glimpsed(self, word: ServerWord, now: float) -> bool:
        """The server said how it is, sooner than its metrics are sure to be news: a reason to grow at most.

        Whether it has grown: at first, by the word of a server that knows of what it was asked and has no queue.
        """
        if self.phase is not Phase.LEAP or 2 * ((word.running or 0.0) + word.waiting) < self.in_flight:
            return False
        if not self._roomy(word):
            return False
        self._bound(word, now)
        return True

    def _roomy(self, word: ServerWord) -> bool:
        """Whether the window is full, and the server has room for more."""
        full = self.in_flight >= self.limit
        return full and self.limit < self.maximum and word.waiting <= 0 and (word.cache or 0.0) < CACHE_NEAR

    def _bound(self, word: ServerWord, now: float) -> None:
        """Much more at once: as much as the cache has room for."""
        self._base_limit, self._base = 0, _Rate()
        # More requests need as much more of the cache.
        room = CACHE_NEAR / word.cache if word.cache else math.inf
        self._settle(self._up(min(BOUND, room)), "grown: the server has no queue", now)

    # --- measuring ---

    def _block(self, now: float) -> None:
        count, seconds, full = self._count, now - self._since, self._full >= FULL * self._count
        self._restart(now)
        if not full or seconds <= 0:
            return
        if self.phase is Phase.LEAP:
            self._leap(count, seconds, now)
        elif self.phase is Phase.HOLD:
            self._base.add(count, seconds, memory=MEMORY)
            self._blocks += 1
            if self._blocks >= self._hold:
                self._try_next(now)
        else:
            self._trial.add(count, seconds)
            self._blocks += 1
            self._judge(now)

    def _leap(self, count: int, seconds: float, now: float) -> None:
        self._trial.add(count, seconds)
        self._blocks += 1
        gain = self._trial.value / self._base.value if self._base_limit else math.inf
        if gain < LEAP_GAIN:
            if self._blocks < PATIENCE // 2:
                return
            # Between two leaps there may still be a gain: the trials find it.
            back = gain < GAIN
            level = self._base_limit if back else self.limit
            self._base = self._base if back else self._trial
            self._base_limit, self.phase, self._down_next = level, Phase.HOLD, False
            self._settle(level, "no faster with more" if back else "grown", now)
        elif self._closed(now):
            self._trial, self._blocks = _Rate(), 0
        elif self.limit < self.maximum:
            self._base, self._base_limit = self._trial, self.limit
            self._settle(self._up(BOUND if BOUND_GAIN <= gain < math.inf else LEAP), "grown", now)
        else:
            self._base, self._base_limit, self.phase, self._blocks = self._trial, self.limit, Phase.HOLD, 0
            self._trial = _Rate()
            self._down_next, self.why = True, "the maximum"

    def _try_next(self, now: float) -> None:
        down = self._down_next or self.limit >= self.maximum or self._closed(now)
        if not down:
            self._try_more(now)
        elif self.limit > 1:
            self._try(Phase.DOWN, max(1, min(self.limit - 1, int(self.limit / STEP))), now)
        else:
            self._blocks, self._down_next = 0, False

    def _try_more(self, now: float) -> None:
        self._try(Phase.UP, self._up(STEP), now)

    def _try(self, phase: Phase, level: int, now: float) -> None:
        self._base_limit, self.phase = self.limit, phase
        self._settle(level, self.why, now)

    def _judge(self, now: float) -> None:
        threshold = GAIN if self.phase is Phase.UP else LOSS
        gain = self._trial.value / max(self._base.value, 1e-9)
        doubt = gain * SPREAD * math.sqrt(1 / self._trial.answers + 1 / max(self._base.answers, 1.0))
        if abs(gain - threshold) < doubt and self._blocks < PATIENCE:
            return
        up = self.phase is Phase.UP
        if gain >= threshold:
            # The new level is the one to beat, at once, in the same direction.
            self._base, self._trial, self._blocks = self._trial, _Rate(), 0
            self._base_limit, self.phase, self._hold, self._down_next = self.limit, Phase.HOLD, 0, not up
            self._paying = up
            self.why = "grown" if up else "as fast with fewer"
            if self.limit >= self.maximum:
                self.why, self._hold = "the maximum", HOLD
        else:
            if up:
                self.why, self._paying = "no faster with more", False
            level = self._base_limit
            self._down_next = up
            self._settle(level, self.why, now)
            self.phase = Phase.HOLD
            self._hold = min(max(self._hold * 2, HOLD), HOLD_LONGEST)

    # --- changing ---

    def _settle(self, limit: int, why: str, now: float) -> None:
        """Another limit; what was under way before it says nothing about it."""
        self.limit, self.why = min(max(limit, 1), self.maximum), why
        self._trial, self._blocks = _Rate(), 0
        self._restart(now)
        self._settling = self.in_flight

    def _force(self, limit: int, why: str, now: float) -> None:
        """Begin measuring anew at another limit; more is tried only after a while."""
        self._settle(limit, why, now)
        self.phase, self._base, self._base_limit = Phase.HOLD, _Rate(), self.limit
        self._hold, self._down_next = HOLD, False

    def _restart(self, now: float) -> None:
        self._good += self._count
        self._since, self._count, self._full = now, 0, 0

    def _up(self, factor: float) -> int:
        return min(self.maximum, max(self.limit + 1, math.ceil(self.limit * factor)))

    @staticmethod
    def _margin(word: ServerWord) -> float:
        """Requests that wait inside the server so that it never waits for us."""
        return max(2.0, 0.1 * (word.running or 0.0))

    @staticmethod
    def _crowded(word: ServerWord, before: ServerWord | None) -> bool:
        preempted = before is not None and word.preemptions > before.preemptions
        return preempted or (word.cache or 0.0) >= CACHE_FULL

    def _closed(self, now: float) -> bool:
        """Whether the server's own word forbids growth."""
        word = self._word
        if word is None or now - self._word_at > FRESH_S:
            return False
        return word.waiting > self._margin(word) or (word.cache or 0.0) >= CACHE_NEAR
