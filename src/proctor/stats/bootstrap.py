"""The bootstrap: standard error and percentile interval of any statistic of the documents."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, kw_only=True)
class Bootstrap:
    """What resampling says about one statistic."""

    stderr: float
    """Standard deviation of the statistic over the resamples (divisor: iterations - 1)."""
    low: float
    high: float


def bootstrap(
    statistic: Callable[[NDArray[np.float64]], float],
    documents: Sequence[float] | Sequence[Sequence[float]],
    *,
    iterations: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
) -> Bootstrap | None:
    """Resample the documents with replacement (Efron 1979) and take the statistic of each resample.

    `documents` has one row for each document, of one number or of several (then the statistic gets a
    two-dimensional array). The interval runs between percentiles. The same seed gives the same result.
    For a mean the standard error tends to √((n-1)/n) times `mean_stderr`. None for fewer than two
    documents; ValueError for fewer than two iterations.
    """
    if iterations < 2:
        raise ValueError(f"{iterations} iterations cannot show any spread")
    values = np.asarray(documents, dtype=np.float64)
    if len(values) < 2:
        return None
    generator = np.random.Generator(np.random.PCG64(seed))
    drawn = np.empty(iterations, dtype=np.float64)
    for i in range(iterations):
        drawn[i] = statistic(values[generator.integers(0, len(values), size=len(values))])
    tail = (1 - confidence) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail])
    return Bootstrap(stderr=float(np.std(drawn, ddof=1)), low=float(low), high=float(high))
