"""What comes of asking a server, and how it is read from an answer."""

from __future__ import annotations

import email.utils
import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, cast

import orjson

from proctor.infer.origin import HttpAnswer
from proctor.records import Boundary

RETRY_STATUS: Final = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
OVERLOAD_STATUS: Final = frozenset({429, 503, 529})
BUSY_STATUS: Final = 429
"""The server works, and has too much to do: counted against it where others could do it."""
MOVED_STATUS: Final = frozenset({301, 302, 303, 307, 308})
UNREADABLE: Final = (AttributeError, IndexError, KeyError, OverflowError, TypeError, ValueError)
"""What taking a value out of JSON may raise where its shape is not the expected one."""

Read = Callable[[dict[str, Any]], object]
"""Takes out of an answer what is wanted of it. Raises one of `UNREADABLE` if that is not there."""

_ABORTED: Final = ("abort", "error")
"""Why vLLM and SGLang say that a text ends when they were shut down, paused or put to sleep meanwhile: with status 200,
and whatever there was of it (https://github.com/vllm-project/vllm/issues/57082)."""
_FILTERED: Final = "content_filter"

_CONTEXT: Final = re.compile(
    r"context[ _]?(length|size|window)|maximum (model|input|prompt) length|max_model_len|too (long|many tokens)"
    r"|longer than the (maximum|model)|exceed_context",
    re.IGNORECASE,
)
_EXCERPT: Final = 300


class Reply(NamedTuple):
    """A JSON object that a server answered with 200, and that is no error."""

    value: Any
    """The object, or what was read from it."""
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


def read_answer(raw: bytes, latency_s: float, attempts: int, read: Read | None = None) -> Reply | Broken:
    """The reply in the body of a 200, or what is wrong with it: `read` may find that too."""
    try:
        value = _parse(raw)
    except (ValueError, RecursionError):
        return _malformed("the answer is no whole JSON text", raw, attempts)
    if isinstance(value, list):
        # llama.cpp answers a list of prompts with a list.
        value = {"answers": cast("list[Any]", value)}
    if not isinstance(value, dict):
        return _malformed("the answer is no JSON object", raw, attempts)
    answer: dict[str, Any] = value  # pyright: ignore[reportUnknownVariableType]
    if answer.get("error") or answer.get("object") == "error":
        return _malformed("the answer is an error with status 200", raw, attempts)
    try:
        reasons = [choice.get("finish_reason") for choice in answer.get("choices") or ()]
    except UNREADABLE:
        reasons = []  # what is wrong with the choices is said by who reads them
    for reason in reasons:
        if reason in _ABORTED:
            what = f"the server ended the answer before the model did (finish_reason {reason!r})"
            return _malformed(what, raw, attempts)
        if reason == _FILTERED:
            message = "a content filter of the server's took hold of the answer"
            return Broken(boundary=Boundary.REFUSED, message=message, retryable=False, attempts=attempts, status=200)
    if read is None:
        return Reply(answer, latency_s, attempts)
    try:
        return Reply(read(answer), latency_s, attempts)
    except UNREADABLE as error:
        return _malformed(f"the answer is not what was asked for ({type(error).__name__}: {error})", raw, attempts)


def _parse(raw: bytes) -> Any:
    try:
        return orjson.loads(raw)
    except orjson.JSONDecodeError:
        # Half a character, escaped, or an infinite log-probability: not quite JSON, and said by servers all the same.
        return json.loads(raw, parse_constant=_constant)


def _constant(name: str) -> float:
    if name == "NaN":
        raise ValueError("NaN is no answer")
    return float(name)


def _malformed(what: str, raw: bytes, attempts: int) -> Broken:
    message = f"{what}: {_excerpt(raw)}"
    return Broken(boundary=Boundary.SERVER, message=message, retryable=True, attempts=attempts, status=200)


def read_refusal(answer: HttpAnswer, attempts: int) -> Broken:
    """What any other status means."""
    status = answer.status
    message = f"HTTP {status}: {_excerpt(answer.body)}"
    if status in RETRY_STATUS or status >= 500:
        if status >= 500 and _CONTEXT.search(message):
            # Some servers answer 500 to a prompt that is too long.
            boundary, retryable = Boundary.CONTEXT, False
        else:
            boundary, retryable = Boundary.SERVER, True
        return Broken(
            boundary=boundary,
            message=message,
            retryable=retryable,
            attempts=attempts,
            status=status,
            retry_after_s=_retry_after(answer.headers.get("retry-after")) if retryable else None,
            overloaded=retryable and status in OVERLOAD_STATUS,
        )
    if status in MOVED_STATUS:
        message = f"HTTP {status}: the server sends us elsewhere, to {answer.headers.get('location')}"
    boundary = Boundary.CONTEXT if status == 413 or _CONTEXT.search(message) else Boundary.REFUSED
    return Broken(boundary=boundary, message=message, retryable=False, attempts=attempts, status=status)


def faulty(outcome: Broken) -> bool:
    """Whether the outcome speaks against the server rather than for its being busy or the request being bad."""
    if outcome.boundary is Boundary.TRANSPORT:
        return True
    return outcome.status is not None and outcome.status >= 500 and outcome.boundary is Boundary.SERVER


def _retry_after(value: str | None) -> float | None:
    """Seconds from a Retry-After header: a number or an HTTP date (RFC 9110, 10.2.3)."""
    if value is None:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return None


def _excerpt(raw: bytes) -> str:
    text = raw[: 4 * _EXCERPT].decode("utf-8", errors="replace")
    try:
        value = orjson.loads(raw)
    except orjson.JSONDecodeError:
        return text[:_EXCERPT]
    if isinstance(value, dict):
        inner = cast("dict[str, Any]", value)
        error = inner.get("error", inner)
        if isinstance(error, dict):
            details = cast("dict[str, Any]", error)
            text = str(details.get("message") or details)
        else:
            text = str(error)
    return text[:_EXCERPT]
