"""What comes of asking a server."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from proctor.records import Boundary


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """A JSON object that a server answered with 200, and that is no error."""

    value: dict[str, Any]
    latency_s: float
    """Of the attempt that succeeded."""
    attempts: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Broken:
    """No answer: which boundary broke, and whether asking again later can help."""

    boundary: Boundary
    message: str
    retryable: bool
    attempts: int = 1
    status: int | None = None
    retry_after_s: float | None = None
    overloaded: bool = False
    gone: bool = False
    """Nobody listens there."""
