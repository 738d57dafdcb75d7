"""What the fake server can be told to do, and to do wrong."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

EchoMode = Literal["right", "ignored", "shifted"]
MetricsOf = Literal["", "vllm", "sglang", "llama.cpp"]
NextTokensMode = Literal["right", "ignored", "spoilt"]
CachedEchoMode = Literal["right", "uncounted", "shifted", "refused"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Latency:
    """Seconds added to every completion."""

    fixed_s: float = 0.0
    lognormal_s: float = 0.0
    """Median of a log-normal part; 0: none."""
    sigma: float = 0.5
    """Its standard deviation, in the logarithm."""
    by_prompt: bool = False
    """Draw it by the prompt: the same takes as long wherever and whenever it is asked."""
    per_token_s: float = 0.0
    """For each generated token."""
    slots: int = 0
    """So many completions are worked on at a time, and the others wait in order of arrival; 0: all at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Faults:
    """Shares of the completions that go wrong, drawn by a seeded generator; they add up to 1 at most."""

    rate_limited: float = 0.0
    """429 with Retry-After."""
    server_error: float = 0.0
    """500."""
    reset: float = 0.0
    """The connection is cut without an answer."""
    stall: float = 0.0
    """No answer for `stall_s`."""
    truncated: float = 0.0
    """200 with half of the JSON text."""
    error_body: float = 0.0
    """200 with an error object."""
    aborted: float = 0.0
    """200 with the beginning of the answer, as from a server that is being shut down."""
    empty: float = 0.0
    """200 with an empty object."""
    retry_after_s: float = 0.05
    stall_s: float = 0.0
    """Then the answer comes; 0: it never does."""
    room: int = 0
    """429 for what comes while so many are in flight; 0: none is refused for that."""
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerOptions:
    """Answers depend on `weights`, the prompt and the sampling fields only: several instances agree."""

    weights: str = "fake"
    served_model: str = "default"
    end_share: float = 1 / 24
    latency: Latency = field(default_factory=Latency)
    faults: Faults = field(default_factory=Faults)
    echo: EchoMode = "right"
    next_tokens: NextTokensMode = "right"
    """`logprob_token_ids`; spoilt: nothing but -9999 while requests of other kinds are in flight."""
    prefix_cache: int = 0
    """Tokens in a block of the prefix cache that /inference/v1/generate reads; 0: there is no such route."""
    cached_echo: CachedEchoMode = "right"
    """What that route answers on a prefix that was computed before: uncounted: without the number of its tokens;
    shifted: each place with its successor's value; refused: with a status of 400."""
    echo_zero: bool = True
    """Whether max_tokens 0 is allowed beside echo."""
    native: bool = False
    """Offer llama.cpp's /completion, /props and /tokenize instead of vLLM's /version and /tokenize."""
    metrics: MetricsOf = ""
    """Whose names /metrics has for what runs and what waits; empty: none of that."""
    tokenize: bool = True
    """Offer /tokenize."""
    max_model_len: int = 1_000_000
    """Prompt and output together; a longer request is refused with 400."""
    cut_at: int = 0
    """Prompt tokens of a completion that are read: what stands before the last so many is dropped silently; 0: all."""
    slow_start_s: float = 0.0
    """503 for everything until then."""
    die_after: int | None = None
    """The process ends without a word when this many completions have been asked and one more comes."""
    journal: str | None = None
    """File that gets one line for each prompt as it arrives: digest, path, what was done with it."""
    bodies: str | None = None
    """File that gets each completion's body as it was sent, as a line of JSON."""
    api_key: str | None = None
    defaults: Mapping[str, float] = field(default_factory=dict[str, float])
    """Sampling fields that a request does not send: what a model's generation_config.json does to a real server."""
