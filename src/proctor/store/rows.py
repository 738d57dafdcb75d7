r"""One row, one line: `{"crc":"xxxxxxxx","row":{...}}` with the CRC-32 of the row's exact bytes.

The bytes `{"crc":"` cannot occur inside a JSON string, where quotes are escaped, and no row has such an
object inside: wherever they stand, a row starts. The fields that an index needs stand first, at fixed
offsets, so that a scan can take them without parsing.
"""

from __future__ import annotations

import json
import math
import operator
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Final

import orjson

from proctor.records import Answer, Boundary, EngineInfo, Failure, Json, Response
from proctor.store.owner import Owner

MARK: Final = b'{"crc":"'
HEAD: Final = len(b'{"crc":"xxxxxxxx","row":')
"""Bytes before the row itself."""
MIDDLE: Final = b'","row":'

RESPONSE: Final = "response"
FAILURE: Final = "failure"
ALIAS: Final = "alias"
ENGINE: Final = "engine"
SEGMENT: Final = "segment"

_KEY: Final = re.compile(r"[0-9a-f]{64}")
_HEX: Final = re.compile(r"[0-9a-f]*")
_RESOLUTION: Final = re.compile(r"[0-9a-f]{16}")

_RESPONSE_DEFAULTS: Final = {f.name: f.default for f in fields(Response) if f.name not in ("key", "physical_key")}
_OPTIONAL: Final = tuple(name for name, default in _RESPONSE_DEFAULTS.items() if default is None)
_OPTIONALS: Final = operator.attrgetter(*_OPTIONAL)


@dataclass(frozen=True, slots=True, kw_only=True)
class Damage:
    """Bytes of the store that are no row: what stood there is owed again."""

    file: str
    """Relative to the weights directory."""
    offset: int
    """In bytes; in a part, the row's number."""
    bytes: int
    """How many; in a part, the row's stored size (0: not known)."""


def check_key(key: str) -> str:
    """Return `key` if it is 64 lower-case hexadecimal digits; ValueError otherwise."""
    if _KEY.fullmatch(key) is None:
        raise ValueError(f"a key is 64 hexadecimal digits, not {key!r}")
    return key


def check_keys(keys: Sequence[str]) -> None:
    """ValueError unless `check_key` takes each of them: all are looked at together."""
    joined = "".join(keys)
    if set(map(len, keys)) <= {64} and _HEX.fullmatch(joined) is not None:
        return
    for key in keys:
        check_key(key)


def check_resolution(resolution: str) -> str:
    """Return `resolution` if it is 16 lower-case hexadecimal digits; ValueError otherwise."""
    if _RESOLUTION.fullmatch(resolution) is None:
        raise ValueError(f"a resolution is 16 hexadecimal digits, not {resolution!r}")
    return resolution


def line(row: dict[str, Json]) -> bytes:
    """The row's line, with its newline."""
    try:
        body = orjson.dumps(row)
    except orjson.JSONEncodeError:
        # A lone surrogate, which a server may well send; or an integer over 64 bits.
        body = json.dumps(row, separators=(",", ":"), ensure_ascii=True).encode("ascii")
    return b'%s%08x","row":%s}\n' % (MARK, zlib.crc32(body), body)


def answer_row(answer: Answer, resolution: str, at: int) -> dict[str, Json]:
    """The row of an answer; `at` is its time stamp in microseconds. ValueError for malformed keys."""
    check_key(answer.key)
    if answer.physical_key or isinstance(answer, Response):
        check_key(answer.physical_key)
    return _answer_row(answer, resolution, at)


def answer_lines(answers: Sequence[Answer], resolution: str, at: int) -> list[bytes]:
    """The lines of several answers; the first one's time stamp is `at`, and each next one's later by a microsecond."""
    check_keys([answer.key for answer in answers])
    check_keys([answer.physical_key for answer in answers if answer.physical_key or isinstance(answer, Response)])
    return [line(_answer_row(answer, resolution, at + i)) for i, answer in enumerate(answers)]


def _answer_row(answer: Answer, resolution: str, at: int) -> dict[str, Json]:
    if isinstance(answer, Response):
        row: dict[str, Json] = {
            "at": at,
            "key": answer.key,
            "resolution": resolution,
            "physical_key": answer.physical_key,
            "type": RESPONSE,
            "prompt_tokens": answer.prompt_tokens,
            "engine_id": answer.engine_id,
            "latency_s": answer.latency_s,
            "created": answer.created,
        }
        if answer.completion_tokens:
            row["completion_tokens"] = answer.completion_tokens
        if answer.truncated_tokens:
            row["truncated_tokens"] = answer.truncated_tokens
        for name, value in zip(_OPTIONAL, _OPTIONALS(answer), strict=True):
            if value is not None:
                row[name] = value
        if answer.logprob is not None:
            row["logprob"] = _number(answer.logprob)
        if answer.token_logprobs is not None:
            row["token_logprobs"] = [_number(value) for value in answer.token_logprobs]
        return row
    return {
        "at": at,
        "key": answer.key,
        "resolution": resolution,
        "physical_key": answer.physical_key,
        "type": FAILURE,
        "boundary": answer.boundary.value,
        "message": answer.message,
        "retryable": answer.retryable,
        "attempts": answer.attempts,
        "created": answer.created,
    }


def alias_row(key: str, physical_key: str, resolution: str, at: int) -> dict[str, Json]:
    """The row that says: this key's answer is the one already stored under `physical_key`."""
    return {
        "at": at,
        "key": check_key(key),
        "resolution": resolution,
        "physical_key": check_key(physical_key),
        "type": ALIAS,
    }


def engine_row(info: EngineInfo) -> dict[str, Json]:
    """The row that says what an engine id stands for."""
    return {"type": ENGINE, "id": info.id} | {f.name: getattr(info, f.name) for f in fields(EngineInfo)}


def segment_row(owner: Owner, resolution: str) -> dict[str, Json]:
    """The first row of every segment: who writes it."""
    return {"type": SEGMENT, "resolution": resolution, "owner": owner.to_json()}


def parse(body: bytes | memoryview) -> dict[str, Any]:
    """The row from its bytes. ValueError if they are no JSON object."""
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError:
        value = json.loads(bytes(body))
    if not isinstance(value, dict):
        raise ValueError("a row is a JSON object")
    return value  # pyright: ignore[reportUnknownVariableType]


def answer_of(row: dict[str, Any], *, key: str) -> Answer:
    """The answer in a response or failure row, as the answer to `key`. KeyError, TypeError, ValueError if malformed."""
    if row["type"] == FAILURE:
        return Failure(
            key=key,
            boundary=Boundary(row["boundary"]),
            message=row["message"],
            retryable=row["retryable"],
            physical_key=row["physical_key"],
            attempts=row["attempts"],
            created=row["created"],
        )
    given = {name: row[name] for name in _RESPONSE_DEFAULTS if name in row}
    if "token_ids" in given:
        given["token_ids"] = tuple(given["token_ids"])
    if "logprob" in given:
        given["logprob"] = float(given["logprob"])
    if "token_logprobs" in given:
        given["token_logprobs"] = tuple(float(value) for value in given["token_logprobs"])
    return Response(key=key, physical_key=row["physical_key"], **given)


def engine_of(row: dict[str, Any]) -> EngineInfo:
    """The engine in an engine row. KeyError if malformed."""
    return EngineInfo(**{f.name: row[f.name] for f in fields(EngineInfo)})


def _number(value: float) -> float | str:
    """JSON has no infinities: those are written as text, which `float` reads back."""
    return value if math.isfinite(value) else str(value)
