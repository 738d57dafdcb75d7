"""What a request costs, in seconds of one model server: tokens at rates, and what has been measured of both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

CHARS_PER_TOKEN: Final = 4.0
"""English text under a 32k-128k byte-pair vocabulary; a measured ratio replaces it."""
PRIOR_WEIGHT: Final = 16.0
"""A task's measured lengths count like so many observations less: few answers move the prior a little."""
LEAST_BUSY_S: Final = 1.0
"""A worker that was busy for less says nothing about rates."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """What answers to one task's requests were measured to be; sums over `answers`. May be added."""

    answers: int = 0
    characters: int = 0
    """Of the requests, as JSON text."""
    caps: int = 0
    """Tokens that might have been generated."""
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def __add__(self, other: Lengths) -> Lengths:
        return Lengths(
            answers=self.answers + other.answers,
            characters=self.characters + other.characters,
            caps=self.caps + other.caps,
            prompt_tokens=self.prompt_tokens + other.prompt_tokens,
            completion_tokens=self.completion_tokens + other.completion_tokens,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Spent:
    """Seconds of server time and tokens, planned or measured."""

    requests: int = 0
    seconds: float = 0.0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def __add__(self, other: Spent) -> Spent:
        return Spent(
            requests=self.requests + other.requests,
            seconds=self.seconds + other.seconds,
            prompt_tokens=self.prompt_tokens + other.prompt_tokens,
            completion_tokens=self.completion_tokens + other.completion_tokens,
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Tokens:
    """Expected tokens of requests, arrays of one length."""

    prompt: NDArray[np.float64]
    completion: NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class CostModel:
    """Token rates of one model class on one engine, and a prior for how much of its cap an answer uses.

    seconds = prompt tokens / prefill rate + completion tokens / decode rate + a fixed cost. Rates are those of a
    whole server that answers many requests at a time, not of one stream.
    """

    prefill_tokens_s: float = 5_000.0
    decode_tokens_s: float = 500.0
    request_s: float = 0.002
    """Fixed cost of one request."""
    decode_share: float = 0.35
    """Expected output length as a share of the cap, until the store has seen this task."""

    def tokens(self, characters: NDArray[np.int64], caps: NDArray[np.int64], measured: Lengths | None = None) -> Tokens:
        """Expected tokens of each request of one task.

        Prompt: characters over the measured characters a token. Completion: the mean of what was measured and of
        the prior, cap × `decode_share`, weighted by answers and `PRIOR_WEIGHT`, and never above the cap.
        """
        ratio = CHARS_PER_TOKEN
        prior = caps * self.decode_share
        completion = prior
        if measured is not None and measured.answers:
            if measured.prompt_tokens and measured.characters:
                ratio = max(0.25, measured.characters / measured.prompt_tokens)
            seen = measured.completion_tokens
            completion = (seen + PRIOR_WEIGHT * prior) / (measured.answers + PRIOR_WEIGHT)
            completion = np.minimum(completion, caps)
        return Tokens(
            prompt=np.asarray(characters / ratio, dtype=np.float64),
            completion=np.asarray(completion, dtype=np.float64),
        )

    def cost_s(self, tokens: Tokens) -> NDArray[np.float64]:
        """Cost of each request in seconds."""
        return self.total_s(np.ones(len(tokens.prompt), np.int64), tokens.prompt, tokens.completion)

    def total_s(
        self, requests: NDArray[np.int64], prompt: NDArray[np.float64], completion: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """Cost of so many requests with so many tokens together, in seconds; elementwise."""
        cost = prompt / self.prefill_tokens_s + completion / self.decode_tokens_s + requests * self.request_s
        return np.asarray(cost, dtype=np.float64)

    def seconds(
        self, characters: NDArray[np.int64], caps: NDArray[np.int64], measured: Lengths | None = None
    ) -> NDArray[np.float64]:
        """Cost of each request of one task, shape (n,), in seconds."""
        return self.cost_s(self.tokens(characters, caps, measured))

    def calibrated(self, busy: Sequence[Spent]) -> CostModel:
        """These rates, all scaled by one factor so that they explain the seconds that workers were measured to take.

        One factor, because a total of seconds cannot tell prefill from decode: their ratio stays the prior's.
        Unchanged where nothing was measured.
        """
        usable = [b for b in busy if b.seconds >= LEAST_BUSY_S and b.requests]
        expected = sum(
            b.prompt_tokens / self.prefill_tokens_s
            + b.completion_tokens / self.decode_tokens_s
            + b.requests * self.request_s
            for b in usable
        )
        seconds = sum(b.seconds for b in usable)
        if not expected or not seconds:
            return self
        speed = expected / seconds
        return replace(
            self,
            prefill_tokens_s=self.prefill_tokens_s * speed,
            decode_tokens_s=self.decode_tokens_s * speed,
            request_s=self.request_s / speed,
        )
