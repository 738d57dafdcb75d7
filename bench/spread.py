"""Medians with their spread, and ratios of what was measured side by side. Pure."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Final

RESAMPLES: Final = 10_000
CONFIDENCE: Final = 0.95


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """Of several runs."""

    median: float
    low: float
    high: float
    runs: int

    def __str__(self) -> str:
        return f"{shown(self.median)} ({shown(self.low)} to {shown(self.high)})"

    def as_json(self) -> dict[str, float]:
        """Rounded to five digits: more are noise."""
        return {name: float(f"{value:.5g}") for name, value in asdict(self).items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratio:
    """The median of paired ratios, their smallest and largest, and an interval for the median."""

    median: float
    low: float
    high: float
    lower: float
    """Ends of the interval of 95 %, by the bootstrap."""
    upper: float
    runs: int

    def __str__(self) -> str:
        ends = f"{shown(self.lower)} to {shown(self.upper)}"
        return f"{shown(self.median)} (95 % {ends}; all {shown(self.low)} to {shown(self.high)})"

    def as_json(self) -> dict[str, float]:
        """Rounded to five digits: more are noise."""
        return {name: float(f"{value:.5g}") for name, value in asdict(self).items()}


def spread(values: Sequence[float]) -> Spread:
    """Raises ValueError for no values."""
    if not values:
        raise ValueError("no runs")
    return Spread(median=statistics.median(values), low=min(values), high=max(values), runs=len(values))


def ratio(numerators: Sequence[float], denominators: Sequence[float], *, seed: int = 0) -> Ratio:
    """Of runs paired by position: what slows the machine for a while slows both of a pair.

    The interval: percentile bootstrap of the median over the pairs (Efron & Tibshirani 1993, chapter 13).
    With few pairs it comes near the extremes, which are given as well. Raises ValueError for unequal or no runs.
    """
    if len(numerators) != len(denominators):
        raise ValueError(f"{len(numerators)} runs cannot be paired with {len(denominators)}")
    pairs = [a / b for a, b in zip(numerators, denominators, strict=True)]
    middle = spread(pairs)
    lower, upper = bootstrap(pairs, statistics.median, seed=seed)
    return Ratio(median=middle.median, low=middle.low, high=middle.high, lower=lower, upper=upper, runs=len(pairs))


def bootstrap(
    values: Sequence[float], statistic: Callable[[Sequence[float]], float], *, seed: int = 0
) -> tuple[float, float]:
    """Ends of the percentile interval of `statistic`; the same for the same seed."""
    draw = random.Random(seed)
    found = sorted(statistic(draw.choices(values, k=len(values))) for _ in range(RESAMPLES))
    outside = int(RESAMPLES * (1 - CONFIDENCE) / 2)
    return found[outside], found[-1 - outside]


def shown(value: float) -> str:
    """Three digits or more, with thousands set apart."""
    size = abs(value)
    return f"{value:,.0f}" if size >= 100 else f"{value:.1f}" if size >= 10 else f"{value:.3f}"
