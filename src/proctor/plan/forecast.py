"""How long, how much, and how many workers: pure formulas over work in server seconds.

A worker costs its start-up (loading weights, compiling, warming up) before it does any work, and the last shard of
each ends up to one shard floor after the others. So with W workers

    makespan(W)       = start-up + max(longest request, work / W) + floor · (1 - 1/W)
    worker seconds(W) = work + W · (start-up + floor · (1 - 1/W) / 2)
    efficiency(W)     = work / worker seconds(W)

More workers stop paying where the efficiency falls below `EFFICIENCY`, or where the longest request alone sets the
makespan. Efficiency is also what a further worker brings: the relative gain in time over the relative cost in workers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, floor
from typing import Final

from proctor.errors import ConfigError
from proctor.plan.cost import Spent

EFFICIENCY: Final = 0.75
"""Of four GPU-hours at most one starts servers or idles. Published static shards: 10.1 GPU-hours on 1, 13.9 on 32
(73 %), 32.5 on 128 (31 %)."""
SAFETY: Final = 1.5
"""Limits are asked for with this factor over the forecast."""
ROUND_S: Final = 600
"""Limits are whole tens of minutes, for whoever reads the queue."""
LEAST_LIMIT_S: Final = 1800
MAX_WORKERS: Final = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Scaling:
    """What a number of workers comes to, in seconds."""

    workers: int
    makespan_s: float
    worker_s: float
    efficiency: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Recommendation:
    """The number of workers at which more stop paying, and why."""

    workers: int
    reason: str
    counts: tuple[Scaling, ...]
    """1, 2, 4, ... and the recommended number, ascending."""


def scaling(work_s: float, workers: int, *, startup_s: float, floor_s: float, longest_s: float = 0.0) -> Scaling:
    """The formulas above for one number of workers."""
    tail = floor_s * (1 - 1 / workers)
    spent = work_s + workers * (startup_s + tail / 2)
    return Scaling(
        workers=workers,
        makespan_s=startup_s + max(longest_s, work_s / workers) + tail,
        worker_s=spent,
        efficiency=work_s / spent if spent else 1.0,
    )


def recommended_workers(
    work_s: float,
    *,
    startup_s: float,
    floor_s: float,
    longest_s: float = 0.0,
    efficiency: float = EFFICIENCY,
    most: int = MAX_WORKERS,
) -> Recommendation:
    """The largest number of workers whose efficiency is at least `efficiency`.

    W · (start-up + floor/2) ≤ work · (1/efficiency - 1), and W ≤ ⌈work / longest request⌉, W ≤ work / floor,
    W ≤ `most`; at least 1. ValueError for an efficiency outside (0, 1).
    """
    if not 0 < efficiency < 1:
        raise ValueError(f"efficiency {efficiency} is not between 0 and 1")
    limits = [(most, f"{most} is the most that may run")]
    each = startup_s + floor_s / 2
    if each > 0:
        paying = floor(min(work_s * (1 / efficiency - 1) / each, most))
        limits.append(
            (paying, f"beyond it more than {1 - efficiency:.0%} of the worker time would be start-up and idling")
        )
    if longest_s > 0:
        limits.append((ceil(min(work_s / longest_s, most)), f"the longest request alone takes {longest_s:.0f} s"))
    if floor_s > 0:
        limits.append((floor(min(work_s / floor_s, most)), f"a shard is at least {floor_s:.0f} s of work"))
    workers, reason = min(limits, key=lambda limit: limit[0])
    if workers < 1:
        workers, reason = 1, "one worker does it before a second one would have started"
    counts = {2**i for i in range(11) if 2**i <= most} | {workers}
    rows = tuple(scaling(work_s, n, startup_s=startup_s, floor_s=floor_s, longest_s=longest_s) for n in sorted(counts))
    return Recommendation(workers=workers, reason=reason, counts=rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class TimeLimit:
    """What to ask of the scheduler for each job."""

    seconds: int
    attempts: int
    """Jobs in a row that a worker's share is expected to need: more than 1 where the most that may be asked for is less
    than the share takes."""
    max_shard_s: float
    """What one shard may be predicted to take so that it fits an attempt."""


def time_limit(
    work_s: float,
    workers: int,
    *,
    startup_s: float,
    longest_s: float = 0.0,
    most_s: float | None = None,
    safety: float = SAFETY,
    drain_s: float = 120.0,
    measured: bool = True,
) -> TimeLimit:
    """A limit from the forecast: start-up + safety · max(work / workers, longest request) + drain, rounded up.

    Where this is above `most_s`, the limit is `most_s` and the share takes several attempts, each with its own
    start-up; shards must then be cut to `max_shard_s`. Raises ConfigError, with the numbers, where not even the
    longest request fits into `most_s`: nothing is capped silently. Not where the seconds are guesses (`measured`
    False): then it is for the caller to warn.
    """
    wanted = startup_s * safety + safety * max(longest_s, work_s / max(1, workers)) + drain_s
    seconds = max(LEAST_LIMIT_S, ceil(wanted / ROUND_S) * ROUND_S)
    attempts = 1
    if most_s is not None and seconds > most_s:
        # Whole minutes: Slurm rounds up, and a minute too much is refused.
        seconds = int(most_s // 60 * 60)
        room = seconds - startup_s * safety - drain_s
        if measured and room < max(1.0, longest_s * safety):
            raise ConfigError(
                f"a time limit of {most_s:.0f} s does not fit the work: starting takes {startup_s:.0f} s, the longest "
                f"request {longest_s:.0f} s, draining {drain_s:.0f} s, with a safety factor of {safety:g}",
                hint="choose a partition with a longer limit, more GPUs a server, or a smaller max_gen_toks",
            )
        attempts = ceil(safety * work_s / max(1, workers) / max(room, 1.0))
    room = seconds - startup_s * safety - drain_s
    return TimeLimit(seconds=seconds, attempts=max(1, attempts), max_shard_s=max(1.0, room / safety))


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanAgainstActual:
    """One model's plan beside what it took so far."""

    model: str
    planned: Spent
    used: Spent

    @property
    def done(self) -> float:
        """Share of the planned requests that are answered, at most 1."""
        return min(1.0, self.used.requests / self.planned.requests) if self.planned.requests else 1.0

    @property
    def expected_s(self) -> float | None:
        """Seconds for the whole, had the rest the pace of what is done; None before there is any."""
        return self.used.seconds / self.done if self.done and self.used.requests else None

    @property
    def seconds_ratio(self) -> float | None:
        """Expected over planned seconds: above 1, the plan was too hopeful."""
        expected = self.expected_s
        return None if expected is None or not self.planned.seconds else expected / self.planned.seconds

    @property
    def tokens_ratio(self) -> float | None:
        """Generated tokens a request, measured over planned; None where none were planned or measured."""
        if not (self.used.requests and self.planned.requests and self.planned.completion_tokens):
            return None
        planned = self.planned.completion_tokens / self.planned.requests
        return self.used.completion_tokens / self.used.requests / planned


def plan_against_actual(
    planned: Sequence[tuple[str, Spent]], used: Sequence[tuple[str, Spent]]
) -> list[PlanAgainstActual]:
    """Plan and measurement of each planned model, in the plan's order; several measurements of one are added."""
    measured: dict[str, Spent] = {}
    for model, spent in used:
        measured[model] = measured.get(model, Spent()) + spent
    return [
        PlanAgainstActual(model=model, planned=spent, used=measured.get(model, Spent())) for model, spent in planned
    ]
