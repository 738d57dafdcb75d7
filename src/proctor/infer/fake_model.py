"""A language model made of a hash: no weights, no state, the same answers everywhere.

The state after a prefix is a hash of the weights' name and all its tokens; it names the most probable next token
and gives every other token a lower log-probability. Scoring, greedy generation and forced steps therefore agree,
as they do in a real model, and several instances answer alike.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

_MASK: Final = (1 << 64) - 1
_MULTIPLIER: Final = 0x9E3779B97F4A7C15
_MIX: Final = 0xBF58476D1CE4E5B9

LETTERS: Final = b"etaoinshrdlucmfw yp gb vk 0123456789 ABCDE ETAOIN .,  \n etaoin s"
"""What the model likes to write, as byte tokens: 64 of them."""

END: Final = 257
"""The end-of-sequence token; 256 is begin-of-sequence, below are bytes."""
BEGIN: Final = 256


@dataclass(frozen=True, slots=True)
class FakeModel:
    """Another name in `weights`, other answers. A text ends after 1/`end_share` tokens on average."""

    weights: str = "fake"
    end_share: float = 1 / 24
    seed: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "seed", int.from_bytes(hashlib.sha256(self.weights.encode()).digest()[:8], "big"))

    def start(self, sampling: str = "") -> int:
        """The state before any token; `sampling` sets apart what was asked in another way."""
        if not sampling:
            return self.seed
        return self.seed ^ int.from_bytes(hashlib.sha256(sampling.encode()).digest()[:8], "big")

    def read(self, state: int, tokens: Iterable[int]) -> int:
        """The state after further tokens."""
        for token in tokens:
            state = ((state ^ token) * _MULTIPLIER + token) & _MASK
        return state

    def best(self, state: int) -> tuple[int, float]:
        """The most probable next token and its log-probability."""
        mixed = ((state ^ (state >> 29)) * _MIX) & _MASK
        high = mixed >> 40
        if (high & 0xFFFF) < self.end_share * 0x10000:
            token = END
        else:
            token = LETTERS[(mixed >> 20) & 63]
        return token, -0.02 - (high & 0xFFF) / 4096.0

    def logprob(self, state: int, token: int) -> float:
        """The log-probability of any token; only the best one lies above -1.1."""
        best, value = self.best(state)
        if token == best:
            return value
        mixed = ((state ^ (token * _MIX)) * _MULTIPLIER) & _MASK
        return -1.1 - 12.0 * (mixed >> 40) / 16777216.0

    def score(self, tokens: Sequence[int]) -> tuple[list[float], list[float]]:
        """Log-probabilities of all tokens but the first, and of the best token at each of these places."""
        state = self.read(self.seed, tokens[:1])
        values: list[float] = []
        tops: list[float] = []
        for token in tokens[1:]:
            best, top = self.best(state)
            values.append(top if token == best else self.logprob(state, token))
            tops.append(top)
            state = ((state ^ token) * _MULTIPLIER + token) & _MASK
        return values, tops

    def generate(
        self, tokens: Sequence[int], max_tokens: int, sampling: str = ""
    ) -> tuple[list[int], list[float], bool]:
        """Tokens, their log-probabilities, and whether the end was reached (its token is included)."""
        state = self.read(self.start(sampling), tokens)
        out: list[int] = []
        logprobs: list[float] = []
        for _ in range(max_tokens):
            token, value = self.best(state)
            out.append(token)
            logprobs.append(value)
            if token == END:
                return out, logprobs, True
            state = ((state ^ token) * _MULTIPLIER + token) & _MASK
        return out, logprobs, False


def encode(text: str) -> list[int]:
    """Bytes as tokens; <s> and </s> are the special ones."""
    if "<" in text:
        parts: list[int] = []
        for piece in text.replace("<s>", "\0B").replace("</s>", "\0E").split("\0"):
            special = {"B": BEGIN, "E": END}.get(piece[:1]) if parts or text.startswith("<") else None
            if special is not None:
                parts.append(special)
                piece = piece[1:]
            parts.extend(piece.encode())
        return parts
    return list(text.encode())


def decode(tokens: Iterable[int]) -> str:
    """Bytes back to text; other tokens are shown by number."""
    out = bytearray()
    for token in tokens:
        out += bytes((token,)) if token < 256 else b"" if token in (BEGIN, END) else b"<%d>" % token
    return out.decode("utf-8", errors="replace")
