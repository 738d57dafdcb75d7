"""The engine seam: requests in, answers out, in any order."""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self

from proctor.records import Answer, EngineInfo, Failure, Kind, Request


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """Every sampling field a server is sent; nothing is left to a server's or a model's defaults."""

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    """0: not limited."""
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    min_tokens: int = 0
    seed: int | None = None
    """Set for sampled requests only (temperature > 0)."""
    extra: str = "{}"
    """Canonical JSON of further fields that the task asks for and the profile passes on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Passage:
    """Token ids whose last `scored` ones are to be given log-probabilities."""

    token_ids: tuple[int, ...]
    scored: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PhysicalRequest:
    """What an engine is really asked for one logical request.

    LOGLIKELIHOOD has one passage, ROLLING one per window (their log-probabilities add up), GENERATE a
    prompt (`prompt_ids`, or `prompt_text` where only the server can tokenise) and its sampling.
    Engines that render and tokenise by themselves (an lm-eval model class) use `request`.
    """

    key: str
    physical_key: str
    kind: Kind
    request: Request
    passages: tuple[Passage, ...] = ()
    prompt_ids: tuple[int, ...] | None = None
    prompt_text: str | None = None
    sampling: Sampling | None = None
    truncated_tokens: int = 0


class Engine(Protocol):
    """An async context manager around whatever answers. Implementations: openai, lm_eval_lm, fake."""

    async def __aenter__(self) -> Self: ...

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    @property
    def info(self) -> EngineInfo:
        """What answers, as recorded with each response. Valid once entered."""
        ...

    @property
    def resolves_alone(self) -> bool:
        """Whether `resolve` works before the context is entered, with no server up: to overlap with its start."""
        ...

    async def resolve(
        self, requests: Sequence[Request], keys: Sequence[str] | None = None
    ) -> list[PhysicalRequest | Failure]:
        """Render, tokenise, fit to the window: one result per request, in order. Never raises for one request.

        `keys`: the requests' keys, where they are known: computing one costs as much as the rest.
        """
        ...

    def run(self, requests: AsyncIterable[PhysicalRequest]) -> AsyncIterator[Answer]:
        """Ask everything that `requests` yields; yield one answer per request as it finishes, in any order.

        Pulls lazily: no more is taken than can soon be sent. Raises ServerError only when the engine as a
        whole is lost; whatever was yielded before stands, and the rest is owed.
        """
        ...
