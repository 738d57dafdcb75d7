"""Standard errors and confidence intervals. Pure: standard library only.

Everywhere n counts documents; an interval is (low, high); None stands for what n is too small to tell.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Sequence
from statistics import NormalDist
from typing import Final

CONFIDENCE: Final = 0.95
_LOG_SCALE: Final = frozenset({"word_perplexity", "byte_perplexity", "perplexity"})
"""Metrics that are exponentials of a mean: their interval is made before the exponential."""

Interval = tuple[float, float]


def mean_stderr(values: Sequence[float]) -> float | None:
    """s/√n with the sample standard deviation s (divisor n-1); None for fewer than two values.

    As lm-evaluation-harness's mean_stderr, which fails on one value.
    """
    n = len(values)
    if n < 2:
        return None
    mean = math.fsum(values) / n
    return math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1) / n)


def clustered_stderr(values: Sequence[float], clusters: Sequence[Hashable]) -> float | None:
    """Standard error of the mean where values of one cluster (say, questions on one passage) depend on each other.

    √(C/(C-1) · Σ_c (Σ_{i in c} (v_i - v̄))²) / n: Liang and Zeger 1986, with the usual correction for the number
    C of clusters; for evaluations see Miller 2024 (arXiv:2411.00640), §2.2. With clusters of one it is
    `mean_stderr`. None for fewer than two clusters. Raises ValueError for unequal lengths.
    """
    sums: defaultdict[Hashable, float] = defaultdict(float)
    mean = math.fsum(values) / len(values) if values else 0.0
    for value, cluster in zip(values, clusters, strict=True):
        sums[cluster] += value - mean
    count = len(sums)
    if count < 2:
        return None
    return math.sqrt(count / (count - 1) * math.fsum(s * s for s in sums.values())) / len(values)


def weighted_mean(values: Sequence[float], sizes: Sequence[float]) -> float:
    """Σ size·value / Σ size: the mean over all documents of a group, from its members' means.

    lm-evaluation-harness's aggregation with weight_by_size. Raises ValueError for unequal lengths or when
    the sizes add up to nothing.
    """
    total = math.fsum(sizes)
    if not values or total <= 0:
        raise ValueError("a mean over no documents")
    return math.fsum(v * s for v, s in zip(values, sizes, strict=True)) / total


def pooled_stderr(stderrs: Sequence[float], sizes: Sequence[int]) -> float | None:
    """Standard error of `weighted_mean` from the members' standard errors, by the pooled variance.

    √(Σ (n_i - 1)·n_i·se_i² / (Σn_i - k) / Σn_i), lm-evaluation-harness's pooled_sample_stderr. It leaves out
    how far the members' means lie apart. None where no member has two documents.
    """
    free = sum(sizes) - len(sizes)
    if free <= 0:
        return None
    pooled = math.fsum((n - 1) * se**2 * n for se, n in zip(stderrs, sizes, strict=True)) / free
    return math.sqrt(pooled / sum(sizes))


def unweighted_mean_stderr(stderrs: Sequence[float]) -> float | None:
    """Standard error of the plain mean of k independent members' means: √(Σ se_i²)/k. None for no members."""
    if not stderrs:
        return None
    return math.sqrt(math.fsum(se * se for se in stderrs)) / len(stderrs)


def wilson_interval(successes: float, n: int, *, confidence: float = CONFIDENCE) -> Interval | None:
    """Wilson's score interval of a proportion (Wilson 1927): right near 0 and 1, where mean ± z·se is not.

    (p + z²/2n ± z·√(p(1-p)/n + z²/4n²)) / (1 + z²/n). None for n = 0.
    """
    if n <= 0:
        return None
    z = _z(confidence)
    p = successes / n
    centre = p + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def normal_interval(value: float, stderr: float, *, confidence: float = CONFIDENCE) -> Interval:
    """value ± z·stderr."""
    half = _z(confidence) * stderr
    return value - half, value + half


def t_interval(value: float, stderr: float, n: int, *, confidence: float = CONFIDENCE) -> Interval | None:
    """value ± t·stderr with Student's t at n-1 degrees of freedom; None for fewer than two documents."""
    if n < 2:
        return None
    half = t_quantile((1 + confidence) / 2, n - 1) * stderr
    return value - half, value + half


def is_proportion(value: float, stderr: float, n: int) -> bool:
    """Whether `n` values with this mean and standard error are all 0 or 1.

    For values in [0, 1], Σv² ≤ Σv, with equality only if each is 0 or 1; so a standard error equal to
    √(p(1-p)/(n-1)) proves it. A value outside [0, 1] is none.
    """
    if n < 2 or not 0.0 <= value <= 1.0:
        return False
    hits = value * n
    if abs(hits - round(hits)) > 1e-6 * max(1.0, hits):
        return False
    return math.isclose(stderr, math.sqrt(value * (1 - value) / (n - 1)), rel_tol=1e-6, abs_tol=1e-12)


def interval(value: float | None, stderr: float | None, n: int, metric: str = "") -> Interval | None:
    """The 95 % interval that fits: Wilson's for a proportion, else Student's t around the standard error.

    Perplexities are exponentials, so theirs is value·exp(±t·stderr/value) and stays above zero. None
    where there is no standard error.
    """
    if value is None or stderr is None or not (math.isfinite(value) and math.isfinite(stderr)):
        return None
    if metric.split(",")[0] in _LOG_SCALE and value > 0:
        around = t_interval(math.log(value), stderr / value, n)
        return None if around is None else (_exp(around[0]), _exp(around[1]))
    if is_proportion(value, stderr, n):
        return wilson_interval(value * n, n)
    return t_interval(value, stderr, n)


def t_quantile(p: float, df: float) -> float:
    """The p-quantile of Student's t with `df` degrees of freedom, to about 1e-10.

    By bisection of its distribution function. Raises ValueError unless 0 < p < 1 and df > 0.
    """
    if not 0 < p < 1 or df <= 0:
        raise ValueError(f"no quantile {p} of Student's t with {df} degrees of freedom")
    if p < 0.5:
        return -t_quantile(1 - p, df)
    low, high = 0.0, 1.0
    while t_distribution(high, df) < p:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        if high - low <= 1e-12 * max(1.0, high):
            break
        if t_distribution(middle, df) < p:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def t_distribution(t: float, df: float) -> float:
    """P(T ≤ t) for Student's t: 1 - I_x(df/2, 1/2)/2 at x = df/(df+t²), t ≥ 0 (Abramowitz and Stegun 26.7.1)."""
    if t < 0:
        return 1 - t_distribution(-t, df)
    return 1 - _incomplete_beta(df / 2, 0.5, df / (df + t * t)) / 2


def _incomplete_beta(a: float, b: float, x: float) -> float:
    """Regularised incomplete beta function I_x(a, b), by its continued fraction (A&S 26.5.8)."""
    if x <= 0 or x >= 1:
        return 0.0 if x <= 0 else 1.0
    if x > (a + 1) / (a + b + 2):
        return 1 - _incomplete_beta(b, a, 1 - x)
    log_front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    return math.exp(log_front) * _beta_fraction(a, b, x) / a


def _beta_fraction(a: float, b: float, x: float) -> float:
    """Modified Lentz evaluation; converges in O(√max(a, b)) steps for x below the mean."""
    tiny = 1e-300
    c, d = 1.0, 1 - (a + b) * x / (a + 1)
    d = 1 / (d if abs(d) > tiny else tiny)
    value = d
    for m in range(1, 100_000):
        for numerator in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d = 1 + numerator * d
            d = 1 / (d if abs(d) > tiny else tiny)
            c = 1 + numerator / c
            c = c if abs(c) > tiny else tiny
            value *= c * d
        if abs(c * d - 1) < 1e-15:
            break
    return value


def _z(confidence: float) -> float:
    return NormalDist().inv_cdf((1 + confidence) / 2)


def _exp(x: float) -> float:
    try:
        return math.exp(x)
    except OverflowError:
        return math.inf
