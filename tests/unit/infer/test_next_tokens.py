"""Scoring by chosen next tokens: the same numbers as echo, from fewer and shorter requests, or not at all."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proctor.errors import ProbeError
from proctor.infer.engine import Passage
from proctor.infer.next_tokens import MOST_IDS, Next, assemble, places
from proctor.records import Kind, Request, Response
from proctor.testing import FakeServer, Latency, ServerOptions

from .asking import bodies, respond

LETTERS = [Request(kind=Kind.LOGLIKELIHOOD, text="Q: which?" * 40, continuation=c) for c in "ABCD"]
WORDS = [
    Request(kind=Kind.LOGLIKELIHOOD, text="The capital is" * 40, continuation=c)
    for c in (" Rome", " Riga", " Rom", " x")
]
SAMPLED = json.dumps({"do_sample": True, "temperature": 1.0, "top_k": 5, "max_gen_toks": 8})


def rounded(answers: Sequence[Response]) -> list[list[float]]:
    """Log-probabilities, to a billionth."""
    return [[round(value, 9) for value in answer.token_logprobs or ()] for answer in answers]


# --- pure ---

passages_of_one_context = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=5), min_size=1, max_size=6).map(
    lambda ends: [Passage(token_ids=(9, 9, 9, *end), scored=len(end)) for end in ends]
)


@given(passages_of_one_context)
def test_places_cover_every_scored_token_once(passages: list[Passage]) -> None:
    found = places(passages)
    asked = [(place.prompt, token) for place in found for token in place.wanted]
    needed = {
        (p.token_ids[:at], p.token_ids[at])
        for p in passages
        for at in range(len(p.token_ids) - p.scored, len(p.token_ids))
    }
    assert len(asked) == len(set(asked)) == len(needed)
    assert set(asked) == needed
    assert found[0].prompt == (9, 9, 9)


@given(passages_of_one_context)
def test_a_passage_is_put_together_from_its_places(passages: list[Passage]) -> None:
    def value(prompt: tuple[int, ...], token: int) -> float:
        return -float(sum(prompt) * 7 + token) / 100

    answers: dict[tuple[int, ...], dict[int, Next]] = {}
    for place in places(passages):
        one = Next({t: value(place.prompt, t) for t in place.wanted}, top=3, top_logprob=value(place.prompt, 3))
        answers.setdefault(place.prompt, {}).update(dict.fromkeys(place.wanted, one))
    for passage in passages:
        values, greedy = assemble(passage, answers)
        ids = passage.token_ids
        assert values == tuple(value(ids[:at], ids[at]) for at in range(3, len(ids)))
        assert greedy is all(value(ids[:at], ids[at]) >= value(ids[:at], 3) for at in range(3, len(ids)))


def test_no_place_wants_more_tokens_than_a_server_gives() -> None:
    found = places([Passage(token_ids=(1, 2, token), scored=1) for token in range(300)])
    assert [len(p.wanted) for p in found] == [MOST_IDS, MOST_IDS, 300 - 2 * MOST_IDS]
    assert {p.prompt for p in found} == {(1, 2)}


# --- over HTTP ---


@pytest.mark.parametrize("requests", [LETTERS, WORDS, LETTERS + WORDS], ids=["letters", "words", "both"])
async def test_the_numbers_are_those_of_echo(connect: Any, requests: list[Request]) -> None:
    async with FakeServer() as server:
        async with connect(lambda: [server.backend], loglikelihood="echo") as engine:
            expected = await respond(engine, requests)
        async with connect(lambda: [server.backend], loglikelihood="next-token") as engine:
            found = await respond(engine, requests)
    assert rounded(found) == rounded(expected)
    for one, right in zip(found, expected, strict=True):
        assert one.is_greedy is right.is_greedy
        assert one.physical_key == right.physical_key
        assert one.engine_id != right.engine_id  # the method is recorded


async def test_single_token_choices_of_one_question_are_one_request(connect: Any, tmp_path: Path) -> None:
    log = tmp_path / "bodies"
    async with FakeServer(ServerOptions(bodies=str(log))) as server, connect(lambda: [server.backend]) as engine:
        await respond(engine, LETTERS)
        before = len(bodies(log))
        await respond(engine, [replace(r, text=r.text + "!") for r in LETTERS])
        sent = bodies(log)[before:]
    assert len(sent) == 1
    assert sorted(sent[0]["logprob_token_ids"]) == [*b"ABCD"]


async def test_the_context_of_long_choices_is_asked_before_the_rest(connect: Any, tmp_path: Path) -> None:
    log = tmp_path / "bodies"
    options = ServerOptions(bodies=str(log))
    async with FakeServer(options) as server, connect(lambda: [server.backend], loglikelihood="next-token") as engine:
        await engine.prove()
        before = len(bodies(log))
        await respond(engine, WORDS)
        sent = bodies(log)[before:]
    # " ": all four; " R": o, i; " Ro": m twice; " Rom": e, and " Ri": g, " Rig": a; the first byte is shared by all.
    assert len(sent[0]["prompt"]) == min(len(b["prompt"]) for b in sent)
    assert len(sent) == 7
    assert "echo" not in sent[0]


@pytest.mark.parametrize("mode", ["ignored"])
async def test_a_server_that_ignores_the_field_is_asked_by_echo(connect: Any, mode: Any) -> None:
    async with FakeServer(ServerOptions(next_tokens=mode)) as server:
        async with connect(lambda: [server.backend]) as engine:
            await respond(engine, LETTERS)
            assert engine.conformance is not None
            assert engine.conformance.next_tokens == "no"
        async with connect(lambda: [server.backend], loglikelihood="next-token") as engine:
            with pytest.raises(ProbeError, match="logprob_token_ids"):
                await respond(engine, LETTERS)


async def test_kinds_that_spoil_each_other_are_never_in_flight_together(connect: Any) -> None:
    generations = [Request(kind=Kind.GENERATE, text=f"Say {i}", arguments=SAMPLED) for i in range(12)]
    mixed = [one for pair in zip(generations, LETTERS * 3, strict=True) for one in pair]
    requests = [
        Request(kind=r.kind, text=f"{i} {r.text}", continuation=r.continuation, arguments=r.arguments)
        for i, r in enumerate(mixed)
    ]
    async with FakeServer() as server, connect(lambda: [server.backend], loglikelihood="echo") as engine:
        expected = await respond(engine, requests)
    options = ServerOptions(next_tokens="spoilt", latency=Latency(fixed_s=0.02))
    async with FakeServer(options) as server:
        async with connect(lambda: [server.backend], loglikelihood="next-token") as engine:
            found = await respond(engine, requests)
            assert engine.conformance is not None
            assert engine.conformance.next_tokens == "alone"
        assert server.stats.max_in_flight > 1
    assert rounded(found) == rounded(expected)
    assert [r.text for r in found] == [r.text for r in expected]


async def test_what_is_right_only_alone_is_not_done_where_other_processes_ask(connect: Any) -> None:
    async with FakeServer(ServerOptions(next_tokens="spoilt", latency=Latency(fixed_s=0.02))) as server:
        async with connect(lambda: [server.backend]) as engine:
            await respond(engine, LETTERS)
            assert engine.conformance.next_tokens == "alone"
        async with connect(lambda: [server.backend], company=True) as engine:
            found = await respond(engine, LETTERS)
            assert engine.conformance.next_tokens == "no"
        async with connect(lambda: [server.backend], company=True, loglikelihood="next-token") as engine:
            with pytest.raises(ProbeError, match="while others ask the same server"):
                await respond(engine, LETTERS)
    async with FakeServer() as server, connect(lambda: [server.backend], company=True) as engine:
        expected = await respond(engine, LETTERS)
        assert engine.conformance.next_tokens == "mixed"
    assert rounded(found) == rounded(expected)


async def test_a_server_that_is_right_in_company_is_given_company(connect: Any) -> None:
    async with FakeServer() as server, connect(lambda: [server.backend]) as engine:
        assert (await engine.prove()).next_tokens is None  # costs nothing before it can save anything
        await respond(engine, LETTERS)
        assert (await engine.prove()).next_tokens == "mixed"


async def test_unusable_next_tokens_after_the_canary_are_asked_by_echo(connect: Any) -> None:
    """Another load than the canary's: the answers cannot be read, and no score is made of them."""
    async with FakeServer() as server, connect(lambda: [server.backend]) as engine:
        await respond(engine, LETTERS[:2])
        server.break_next_tokens()
        found = await respond(engine, LETTERS)
    async with FakeServer() as server, connect(lambda: [server.backend], loglikelihood="echo") as engine:
        expected = await respond(engine, LETTERS)
    assert [r.logprob for r in found] == [r.logprob for r in expected]
