"""What is written is what is read, exactly."""

from __future__ import annotations

import dataclasses
import math
import zlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proctor.records import Boundary, Failure, Response
from proctor.store import rows

RESOLUTION = "0123456789abcdef"
KEY, PHYSICAL = "a1" * 32, "b2" * 32


def round_trip(answer: Response | Failure) -> Response | Failure:
    line = rows.line(rows.answer_row(answer, RESOLUTION, 1_700_000_000_000_000))
    body = line[rows.HEAD : -2]
    assert line == b'{"crc":"%08x","row":%s}\n' % (zlib.crc32(body), body)
    assert line.count(rows.MARK) == 1
    assert line.count(b"\n") == 1
    return rows.answer_of(rows.parse(body), key=answer.key)


@given(
    text=st.none() | st.text() | st.text(alphabet=st.characters(categories=["Cs", "Cc", "Lu"])),
    token_ids=st.none() | st.lists(st.integers(0, 2**32)).map(tuple),
    logprob=st.none() | st.floats(),
    token_logprobs=st.none() | st.lists(st.floats(), max_size=4).map(tuple),
    is_greedy=st.none() | st.booleans(),
    seed=st.none() | st.integers(0, 2**64 - 1),
    latency_s=st.floats(0, 1e9),
)
def test_a_response_survives(**fields: object) -> None:
    answer = Response(key=KEY, physical_key=PHYSICAL, finish_reason="stop", **fields)  # type: ignore[arg-type]
    # JSON cannot tell a pair of surrogates from the character that it means.
    text = answer.text and answer.text.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")
    # repr, because nan is not equal to itself.
    assert repr(round_trip(answer)) == repr(dataclasses.replace(answer, text=text))


def test_impossible_log_probabilities_are_kept() -> None:
    answer = Response(key=KEY, physical_key=PHYSICAL, logprob=-math.inf, token_logprobs=(-math.inf, -1.5))
    assert round_trip(answer) == answer


@given(message=st.text(), boundary=st.sampled_from(Boundary), retryable=st.booleans(), attempts=st.integers(1, 99))
def test_a_failure_survives(message: str, boundary: Boundary, retryable: bool, attempts: int) -> None:
    for physical in ("", PHYSICAL):
        answer = Failure(
            key=KEY,
            boundary=boundary,
            message=message,
            retryable=retryable,
            physical_key=physical,
            attempts=attempts,
            created=12.25,
        )
        assert round_trip(answer) == answer


def test_no_field_of_a_response_is_forgotten() -> None:
    every: dict[str, Any] = {
        "key": KEY,
        "physical_key": PHYSICAL,
        "text": "t",
        "token_ids": (1, 2),
        "finish_reason": "stop",
        "logprob": -1.5,
        "is_greedy": False,
        "token_logprobs": (-0.5, -1.0),
        "prompt_tokens": 3,
        "completion_tokens": 2,
        "truncated_tokens": 1,
        "seed": 7,
        "seed_honoured": True,
        "engine_id": "e",
        "latency_s": 0.25,
        "created": 12.5,
    }
    assert set(every) == {field.name for field in dataclasses.fields(Response)}
    assert round_trip(Response(**every)) == Response(**every)


@pytest.mark.parametrize("key", ["", "a" * 63, "A" * 64, "g" * 64, "a" * 65, "a" * 63 + "\n"])
def test_malformed_keys_are_refused(key: str) -> None:
    with pytest.raises(ValueError, match="64 hexadecimal digits"):
        rows.answer_row(Response(key=key, physical_key=PHYSICAL), RESOLUTION, 0)
    with pytest.raises(ValueError, match="64 hexadecimal digits"):
        rows.answer_row(Response(key=KEY, physical_key=key), RESOLUTION, 0)
    with pytest.raises(ValueError, match="64 hexadecimal digits"):
        rows.alias_row(KEY, key, RESOLUTION, 0)
    good = Response(key=KEY, physical_key=PHYSICAL)
    for bad in (Response(key=key, physical_key=PHYSICAL), Response(key=KEY, physical_key=key)):
        with pytest.raises(ValueError, match="64 hexadecimal digits"):
            rows.answer_lines([good, bad, good], RESOLUTION, 0)


def test_keys_that_are_wrong_only_one_by_one_are_refused_together() -> None:
    answers = [Response(key="a" * n, physical_key=PHYSICAL) for n in (63, 65)]
    with pytest.raises(ValueError, match="64 hexadecimal digits"):
        rows.answer_lines(answers, RESOLUTION, 0)


@pytest.mark.parametrize("resolution", ["", "0" * 15, "0" * 17, "x" * 16, "0" * 15 + "\n"])
def test_malformed_resolutions_are_refused(resolution: str) -> None:
    with pytest.raises(ValueError, match="16 hexadecimal digits"):
        rows.check_resolution(resolution)
