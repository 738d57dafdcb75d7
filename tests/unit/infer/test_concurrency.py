"""How the window of a server is found: against simulated servers, on a clock of their own."""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections.abc import Callable

import pytest

from proctor.infer.concurrency import START, Phase, ServerWord, Window

Service = Callable[[float, int, random.Random], float]
"""Seconds for a completion begun at a time, beside so many others."""


def noisy(mean_s: float, sigma: float) -> Service:
    return lambda _now, _running, rng: mean_s * math.exp(sigma * rng.gauss(0, 1) - sigma**2 / 2)


class Simulation:
    """One server, and a client that always has more to ask."""

    def __init__(
        self,
        service: Service,
        *,
        slots: int = 1_000_000,
        room: int = 1_000_000,
        refused: float = 0.0,
        says: Callable[[int, int], ServerWord] | None = None,
        maximum: int = 1024,
        seed: int = 0,
    ) -> None:
        self.window = Window(maximum)
        self.now = 0.0
        self.done = self.refusals = 0
        self.limits: list[int] = []
        """At every event."""
        self._service = service
        self._slots, self._room, self._refused, self._says = slots, room, refused, says
        self._rng = random.Random(seed)
        self._events: list[tuple[float, int, str]] = []
        self._count = self._running = self._queue = 0
        if says is not None:
            self._at(1.0, "poll")

    def run(self, until: float) -> Simulation:
        self._fill()
        while self._events[0][0] <= until:
            self.now, _, what = heapq.heappop(self._events)
            getattr(self, "_" + what)()
            self.limits.append(self.window.limit)
            self._fill()
        return self

    def rate(self, since: float, until: float) -> float:
        """Answers a second between two times; the simulation is at `since` or before."""
        self.run(since)
        before = self.done
        self.run(until)
        return (self.done - before) / (until - since)

    def _at(self, delay: float, what: str) -> None:
        self._count += 1
        heapq.heappush(self._events, (self.now + delay, self._count, what))

    def _fill(self) -> None:
        while self.window.in_flight < self.window.limit:
            self.window.in_flight += 1
            if self._running + self._queue >= self._room or self._rng.random() < self._refused:
                self._at(0.005, "refuse")
            elif self._running < self._slots:
                self._start()
            else:
                self._queue += 1

    def _start(self) -> None:
        self._running += 1
        self._at(self._service(self.now, self._running, self._rng), "answer")

    def _answer(self) -> None:
        self.done += 1
        self._running -= 1
        self.window.answered(self.now)
        self.window.in_flight -= 1
        if self._queue:
            self._queue -= 1
            self._start()

    def _refuse(self) -> None:
        self.refusals += 1
        self.window.refused(self.now, "HTTP 429")
        self.window.in_flight -= 1

    def _poll(self) -> None:
        assert self._says is not None
        self.window.told(self._says(self._running, self._queue), self.now)
        self._at(1.0, "poll")


class Prefilling(Simulation):
    """Prompts are read one after another, and then all answered at once: a burst of new requests is a queue."""

    def __init__(self, service: Service, *, prefill_s: float, slots: int) -> None:
        super().__init__(
            service, slots=slots, says=lambda running, waiting: queue(running - self._unread, waiting + self._unread)
        )
        self._prefill_s = prefill_s
        self._free = 0.0
        self._unread = 0

    def _start(self) -> None:
        self._running += 1
        self._unread += 1
        self._free = max(self._free, self.now) + self._prefill_s
        self._at(self._free - self.now - self._prefill_s, "read")

    def _read(self) -> None:
        self._unread -= 1
        self._at(self._prefill_s + self._service(self.now, self._running, self._rng), "answer")


def queue(running: int, waiting: int) -> ServerWord:
    return ServerWord(running=running, waiting=waiting)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("sigma", [0.0, 0.5, 1.2])
@pytest.mark.parametrize("slots", [33, 100, 256])
def test_a_server_with_slots_is_kept_full_however_noisy(slots: int, sigma: float, seed: int) -> None:
    sim = Simulation(noisy(0.5, sigma), slots=slots, seed=seed)
    assert sim.rate(30, 150) >= 0.9 * slots / 0.5
    assert 0.6 * slots <= sim.window.limit <= 3 * slots


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("slots", [4, 33, 256])
def test_a_server_that_tells_its_queue_gets_a_little_more_than_it_can_do(slots: int, seed: int) -> None:
    sim = Simulation(noisy(0.5, 0.5), slots=slots, says=queue, seed=seed)
    assert sim.rate(20, 120) >= 0.95 * slots / 0.5
    # At most times: at the end a trial of fewer may be under way.
    assert slots <= sorted(sim.limits)[len(sim.limits) // 2] <= 1.6 * slots + 4


def test_growth_follows_the_servers_word_where_answers_are_slow() -> None:
    """Six doublings, each measured over two answers of 30 s, would take six minutes."""
    sim = Simulation(noisy(30.0, 0.2), slots=512, says=queue).run(12)
    assert sim.window.limit >= 512


def test_a_server_that_computes_all_at_once_gets_more_while_that_pays() -> None:
    """Throughput n / (0.4 + 0.004 n): three quarters of the most at 300."""
    sim = Simulation(lambda _now, running, rng: (0.4 + 0.004 * running) * rng.uniform(0.7, 1.3))
    assert sim.rate(60, 180) >= 0.75 * 250
    assert sim.window.limit >= 250


def test_the_window_does_not_run_away_where_more_brings_nothing() -> None:
    sim = Simulation(noisy(0.02, 0.3), slots=4).run(120)
    assert sim.window.limit < 64
    assert sorted(sim.limits)[len(sim.limits) // 2] <= 2 * START


@pytest.mark.parametrize("sigma", [0.0, 0.5])
def test_it_settles(sigma: float) -> None:
    sim = Simulation(noisy(0.1, sigma), slots=50).run(120)
    later = sim.limits[len(sim.limits) // 2 :]
    assert max(later) <= 4 * min(later)
    changes = sum(a != b for a, b in itertools.pairwise(later))
    assert changes <= 60, "in a minute of six hundred windows"


@pytest.mark.parametrize("seed", range(3))
def test_a_server_that_refuses_more_than_it_can_take(seed: int) -> None:
    sim = Simulation(noisy(0.5, 0.5), room=40, seed=seed)
    assert sim.rate(10, 120) >= 0.8 * 80
    assert 20 <= sim.window.limit <= 80


def test_refusals_that_have_nothing_to_do_with_load_do_not_end_at_one_at_a_time() -> None:
    sim = Simulation(noisy(0.05, 0.5), slots=50, refused=0.5)
    assert sim.rate(30, 60) >= 0.7 * 1000


def test_one_burst_of_refusals_is_one_cut() -> None:
    window = Window(1024)
    window.in_flight = START
    for _ in range(START):
        window.refused(10.0, "HTTP 503")
    assert window.limit == int(START * 0.7)
    assert window.why == "cut: HTTP 503"
    window.refused(11.5, "HTTP 503")
    assert window.limit == int(int(START * 0.7) * 0.7)


def test_a_server_that_becomes_slow_and_fast_again_stays_full() -> None:
    def service(now: float, _running: int, rng: random.Random) -> float:
        return (1.0 if 40 <= now < 80 else 0.2) * rng.uniform(0.5, 1.5)

    sim = Simulation(service, slots=32)
    assert sim.rate(20, 40) >= 0.95 * 160
    assert sim.rate(45, 80) >= 0.95 * 32
    assert sim.rate(85, 120) >= 0.95 * 160


def test_a_burst_of_long_prompts_is_no_lasting_queue() -> None:
    """12.8 answers a second with all slots in use; twenty prompts a second can be read."""
    sim = Prefilling(noisy(20.0, 0.3), prefill_s=0.05, slots=256)
    assert sim.rate(60, 180) >= 0.85 * 12.8
    assert sim.window.limit >= 200


def test_a_full_cache_is_cut_once_until_the_cut_shows() -> None:
    """Thirty looks while the first answer is still to come."""
    window = Window(1024)
    window.limit = window.in_flight = 100
    for second in range(30):
        window.told(ServerWord(running=100, cache=0.99), float(second))
    assert window.limit == 90


def test_preemptions_and_a_full_cache_shrink_it() -> None:
    def says(running: int, _waiting: int) -> ServerWord:
        return ServerWord(running=running, cache=min(1.0, running / 100))

    sim = Simulation(noisy(0.5, 0.5), says=says).run(60)
    assert 60 <= sim.window.limit <= 100
    window = Window(64)
    window.in_flight = START
    window.told(ServerWord(preemptions=3), 1.0)
    assert window.limit == 64, "what happened before we came says nothing"
    window.in_flight = 64
    window.told(ServerWord(preemptions=4), 2.0)
    assert (window.limit, window.why) == (57, "key-value cache full")


@pytest.mark.parametrize(("cache", "limit"), [(None, 64), (0.0, 64), (0.1, 64), (0.4, 34), (0.8, 17), (0.9, 16)])
def test_a_server_without_a_queue_gets_four_times_as_much_if_its_cache_has_room(
    cache: float | None, limit: int
) -> None:
    window = Window(1024)
    window.in_flight = START
    window.told(ServerWord(running=START, cache=cache), 1.0)
    assert window.limit == limit


@pytest.mark.parametrize(
    ("word", "limit"),
    [
        (queue(START, 0), 4 * START),
        (queue(START // 2, 0), 4 * START),
        (queue(START // 4, 0), START),  # it does not know yet of what it was asked
        (queue(START // 2, START // 2), START),
        (ServerWord(), START),
        (ServerWord(running=START, cache=0.9), START),
    ],
)
def test_a_glimpse_is_a_reason_to_grow_at_most(word: ServerWord, limit: int) -> None:
    window = Window(1024)
    window.in_flight = START
    assert window.glimpsed(word, 0.1) is (limit > START)
    assert window.limit == limit


def test_a_glimpse_of_a_window_that_is_not_full_says_nothing() -> None:
    window = Window(1024)
    window.in_flight = START - 1
    assert not window.glimpsed(queue(START - 1, 0), 0.1)


def test_a_batching_server_is_full_within_a_few_seconds() -> None:
    """A step of 22 ms takes 1.9 ms more for each of 32-token answers: what a small model does on a processor. 1,000
    answers, against a client that has 256 in flight from the first moment."""

    def seconds(window: Window | None) -> float:
        left, done, now, look = 1000, 0, 0.0, 1.0
        at_work: list[int] = []
        while done < 1000:
            room = (256 if window is None else window.limit) - len(at_work)
            at_work += [32] * min(left, room)
            left -= max(0, min(left, room))
            now += 0.022 + 0.0019 * len(at_work)
            at_work = [n - 1 for n in at_work]
            for _ in range(at_work.count(0)):
                if window is not None:
                    window.in_flight = len(at_work)
                    window.answered(now)
                at_work.remove(0)
                done += 1
                if left:  # the next one comes with the answer
                    at_work.append(33)
                    left -= 1
            at_work = [min(n, 32) for n in at_work]
            if window is not None and now >= look:
                window.in_flight = len(at_work)
                window.told(ServerWord(running=len(at_work)), now)
                look = now + 1.0
        return now

    assert seconds(Window(256)) <= 1.012 * seconds(None)


def test_a_quick_server_is_given_hundreds_before_anybody_notices() -> None:
    """It says nothing of itself and answers after 20 ms, however many there are."""
    assert Simulation(noisy(0.02, 0.0)).run(0.3).window.limit >= 256


def test_a_pause_of_the_source_is_no_slow_server() -> None:
    window = Window(1024)
    window.in_flight = START
    now = 0.0
    for number in range(4 * START):
        now += 0.1
        if number == START + START // 2:
            window.in_flight = 1
            window.answered(now)
            window.in_flight = window.limit
            now += 1000
        window.in_flight = window.limit
        window.answered(now)
    assert window.phase is Phase.LEAP
    assert window.limit > START


def test_an_idle_source_is_no_slow_server() -> None:
    window = Window(1024)
    window.in_flight = 1
    for number in range(1, 2000):
        window.answered(number * 0.1)
    assert (window.limit, window.phase) == (START, Phase.LEAP)


@pytest.mark.parametrize("maximum", [1, 3, 24])
def test_never_more_than_the_maximum(maximum: int) -> None:
    sim = Simulation(noisy(0.1, 0.5), says=queue, maximum=maximum).run(60)
    assert max(sim.limits) == maximum
    assert min(sim.limits[200:]) >= max(1, maximum // 3)
