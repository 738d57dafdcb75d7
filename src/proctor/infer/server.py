"""The server seam: an async context manager that yields base URLs."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from proctor.records import EngineInfo


@dataclass(frozen=True, slots=True, kw_only=True)
class Backend:
    """One base URL without a trailing slash and without /v1, and the key it wants (None: no key)."""

    url: str
    api_key: str | None = field(default=None, repr=False)
    served_model: str = "default"
    proxy: str | None = field(default=None, repr=False)
    """URL of the HTTP proxy that it is asked through; what we start ourselves needs none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What the client has with one backend."""

    in_flight: int = 0
    answered: int = 0
    """Answers of any status, ever."""
    limit: int = 0
    """How many may be in flight now; found by the client."""
    why: str = ""
    """Where the limit comes from, in a few words."""
    waiting: float | None = None
    """Requests that wait inside the server, as its /metrics say; None if they do not."""
    hedged: int = 0
    """Second copies of slow requests that were sent here, ever."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """What a server is asked to serve."""

    path: str
    """Directory, GGUF file or hub id."""
    revision: str | None = None
    name: str = "default"
    """The served model name."""
    tokenizer: str | None = None
    trust_remote_code: bool = False


class Server(Protocol):
    """Starts, watches and stops model servers. Implementations: llama.cpp, vllm, sglang, command, endpoint, fake."""

    async def __aenter__(self) -> Self:
        """Start and wait until healthy. Raises ServerError with the state, a hint and the last log lines."""
        ...

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop every process of every group that was started, and prove it."""
        ...

    @property
    def backends(self) -> tuple[Backend, ...]:
        """Where to ask; changes after a restart."""
        ...

    @property
    def info(self) -> EngineInfo:
        """Engine, version, dtype, parallelism, hardware. Valid once entered."""
        ...

    async def ensure(self) -> None:
        """Check liveness; restart what died, within the budget. Raises ServerError when the budget is spent."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerPaths:
    """Where a server may write."""

    logs: Path
    scratch: Path
