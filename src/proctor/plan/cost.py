"""What a request costs, in seconds of one model server."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

CHARS_PER_TOKEN = 4.0
"""English text under a 32k–128k byte-pair vocabulary; only relative costs depend on it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CostModel:
    """Token rates of one model class on one engine, and a prior for how much of its cap an answer uses."""

    prefill_tokens_s: float = 5_000.0
    decode_tokens_s: float = 500.0
    request_s: float = 0.002
    """Fixed cost of one request."""
    decode_share: float = 0.35
    """Expected output length as a share of the cap, until the store has seen this task."""

    def seconds(self, prefill_chars: NDArray[np.int64], decode_tokens: NDArray[np.int64]) -> NDArray[np.float64]:
        """Cost of each request, shape (n,), in seconds."""
        prefill = prefill_chars / CHARS_PER_TOKEN / self.prefill_tokens_s
        decode = decode_tokens * self.decode_share / self.decode_tokens_s
        return np.asarray(prefill + decode + self.request_s, dtype=np.float64)
