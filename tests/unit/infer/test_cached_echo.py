"""Echo on top of the prefix cache: the numbers of echo, from fewer tokens; what was not computed is never believed."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from proctor.errors import ProbeError
from proctor.infer.cached_echo import PATH, cached_echo_body, read_cached_echo
from proctor.infer.engine import Passage
from proctor.infer.outcome import UNREADABLE
from proctor.records import Kind, Request, Response
from proctor.testing import FakeServer, Faults, Latency, ServerOptions

from .asking import bodies, respond

OPTIONS = ServerOptions(prefix_cache=16)
ENDS = (" walks along the river.", " walks home.", " sings a song of long ago.", " is late.")


def questions(count: int, *, words: int = 10) -> list[Request]:
    """Four choices each, after contexts of several blocks."""
    return [
        Request(kind=Kind.LOGLIKELIHOOD, text=f"Story {i}: " + "somebody " * words, continuation=end)
        for i in range(count)
        for end in ENDS
    ]


async def echoed(connect: Any, requests: Sequence[Request]) -> list[tuple[list[float], bool | None]]:
    async with FakeServer() as server, connect(lambda: [server.backend], loglikelihood="echo") as engine:
        return values(await respond(engine, requests))


def values(answers: Sequence[Response]) -> list[tuple[list[float], bool | None]]:
    return [([round(v, 9) for v in a.token_logprobs or ()], a.is_greedy) for a in answers]


def by_route(sent: Sequence[dict[str, Any]]) -> tuple[int, int]:
    """Prompts on top of the prefix cache, and echoed ones."""
    lists = [b["prompt"] for b in sent if b.get("echo")]
    return sum("token_ids" in b for b in sent), sum(len(p) if isinstance(p[0], list) else 1 for p in lists)


async def test_the_numbers_are_those_of_echo(connect: Any, tmp_path: Path) -> None:
    log, requests = tmp_path / "bodies", questions(12)
    expected = await echoed(connect, requests)
    async with FakeServer(ServerOptions(prefix_cache=16, bodies=str(log))) as server:
        async with connect(lambda: [server.backend]) as engine:
            await respond(engine, questions(1, words=20))
            before = len(bodies(log))
            found = await respond(engine, requests)
            assert engine.conformance.cached_echo
    assert values(found) == expected
    assert by_route(bodies(log)[before:]) == (len(requests), 0)
    assert len({a.engine_id for a in found}) == 1


async def test_the_way_is_recorded(connect: Any) -> None:
    requests = questions(2)
    async with FakeServer(OPTIONS) as server:
        async with connect(lambda: [server.backend]) as engine:
            cached = await respond(engine, requests)
        async with connect(lambda: [server.backend], loglikelihood="echo") as engine:
            echo = await respond(engine, requests)
    assert {a.engine_id for a in cached}.isdisjoint({a.engine_id for a in echo})
    assert [a.physical_key for a in cached] == [a.physical_key for a in echo]


async def test_scored_tokens_that_the_server_had_before_are_echoed(connect: Any, tmp_path: Path) -> None:
    """Asked again, a prompt is found whole in the cache: its answer is memory that nobody wrote."""
    log, requests = tmp_path / "bodies", questions(3)
    expected = await echoed(connect, requests)
    async with FakeServer(ServerOptions(prefix_cache=16, bodies=str(log))) as server:
        for _ in range(2):
            async with connect(lambda: [server.backend]) as engine:
                before = len(bodies(log)) if log.exists() else 0
                assert values(await respond(engine, requests)) == expected
    cached, again = by_route(bodies(log)[before:])
    assert cached > 0
    assert again > 0


def at_a_boundary(ends: Sequence[str]) -> list[Request]:
    """Choices after a context of four whole blocks."""
    return [Request(kind=Kind.LOGLIKELIHOOD, text="x" * 64, continuation=end) for end in ends]


@pytest.mark.parametrize(
    "ends",
    [ENDS, ("walks along the river.", "sings a song of long ago.", "w", "strolls through the village")],
    ids=["the same first token", "other first tokens, and nothing after one"],
)
async def test_where_a_context_ends_with_a_block_first_tokens_are_asked_for_before_the_others(
    connect: Any, tmp_path: Path, ends: Sequence[str]
) -> None:
    log, requests = tmp_path / "bodies", at_a_boundary(ends)
    async with FakeServer(ServerOptions(prefix_cache=16, bodies=str(log))) as server:
        async with connect(lambda: [server.backend]) as engine:
            await respond(engine, [*questions(2), *at_a_boundary(["b", "c"])])  # both ways are proven
            before = len(bodies(log))
            found = await respond(engine, [replace(r, text="y" + r.text[1:]) for r in requests])
        sent = bodies(log)[before:]
    assert values(found) == await echoed(connect, [replace(r, text="y" + r.text[1:]) for r in requests])
    assert by_route(sent) == (sum(len(end) > 1 for end in ends), 0)
    assert sum("logprob_token_ids" in body for body in sent) == 1
    assert "logprob_token_ids" in sent[0], "who computes the context is asked first"


async def test_where_first_tokens_cannot_be_asked_for_such_a_context_is_echoed(connect: Any, tmp_path: Path) -> None:
    log, requests = tmp_path / "bodies", at_a_boundary(ENDS)
    async with FakeServer(ServerOptions(prefix_cache=16, next_tokens="ignored", bodies=str(log))) as server:
        async with connect(lambda: [server.backend]) as engine:
            await respond(engine, [*questions(1), *at_a_boundary(["b", "c"])])
            before = len(bodies(log))
            found = await respond(engine, requests)
    assert values(found) == await echoed(connect, requests)
    assert by_route(bodies(log)[before:]) == (0, len(ENDS))


@pytest.mark.parametrize("mode", ["uncounted", "shifted", "refused"])
async def test_a_server_that_is_wrong_is_asked_by_echo(connect: Any, mode: Any, tmp_path: Path) -> None:
    log, requests = tmp_path / "bodies", questions(3)
    async with FakeServer(ServerOptions(prefix_cache=16, cached_echo=mode, bodies=str(log))) as server:
        async with connect(lambda: [server.backend]) as engine:
            found = await respond(engine, requests)
            assert engine.conformance.cached_echo is False
    assert values(found) == await echoed(connect, requests)
    assert by_route(bodies(log)[-3:])[0] == 0


async def test_a_server_without_the_route_is_asked_by_echo_or_refused_by_name(connect: Any) -> None:
    async with FakeServer() as server:
        async with connect(lambda: [server.backend]) as engine:
            await respond(engine, questions(2))
            assert engine.conformance.cached_echo is False
        async with connect(lambda: [server.backend], loglikelihood="cached-echo") as engine:
            with pytest.raises(ProbeError, match="enable-scale-out"):
                await respond(engine, questions(2))


async def test_several_servers_are_proven_together(connect: Any) -> None:
    """Each has its own prefix cache: the one that is asked may not have the context yet."""
    requests = questions(12)
    async with FakeServer(OPTIONS) as one, FakeServer(OPTIONS) as two, FakeServer(OPTIONS) as three:
        async with connect(lambda: [one.backend, two.backend, three.backend]) as engine:
            found = await respond(engine, requests)
            assert engine.conformance.cached_echo
    assert values(found) == await echoed(connect, requests)


async def test_several_servers_compute_each_context_once(connect: Any, tmp_path: Path) -> None:
    """Each is busy: the choices of a question wait for the one that has its context."""
    logs = [tmp_path / str(n) for n in range(3)]
    requests = questions(40)
    async with AsyncExitStack() as stack:
        latency = Latency(fixed_s=0.1)  # a machine that stutters leaves no server without work
        options = [ServerOptions(prefix_cache=16, bodies=str(log), latency=latency) for log in logs]
        servers = [await stack.enter_async_context(FakeServer(one)) for one in options]
        engine = await stack.enter_async_context(connect(lambda: [s.backend for s in servers], max_in_flight=4))
        await respond(engine, questions(1, words=20))
        before = [len(bodies(log)) if log.exists() else 0 for log in logs]
        found = await respond(engine, requests)
    assert values(found) == await echoed(connect, requests)
    sent = [bodies(log)[start:] for log, start in zip(logs, before, strict=True)]
    assert by_route([b for some in sent for b in some]) == (len(requests), 0)
    size = min(len(one["token_ids"]) for some in sent for one in some) // 2
    contexts = [{tuple(b["token_ids"][:size]) for b in some} for some in sent]
    assert all(contexts), "each server got its share"
    twice = sum(map(len, contexts)) - 40
    assert twice <= 4, "but at the very end, where a server without work takes some"


@pytest.mark.parametrize("seed", range(2))
async def test_servers_that_fail_and_go_lose_nothing_and_keep_nobody_waiting(connect: Any, seed: int) -> None:
    requests = questions(40)
    expected = await echoed(connect, requests)
    faults = Faults(server_error=0.05, rate_limited=0.05, reset=0.05, retry_after_s=0.01, seed=seed)
    options = ServerOptions(prefix_cache=16, latency=Latency(fixed_s=0.02), faults=faults)
    async with AsyncExitStack() as stack:
        servers = [await stack.enter_async_context(FakeServer(options)) for _ in range(3)]
        there = [s.backend for s in servers]
        engine = await stack.enter_async_context(connect(lambda: tuple(there), max_in_flight=2))
        asking = asyncio.create_task(respond(engine, requests))
        await asyncio.sleep(0.1)
        await servers[0].stop_listening()
        await asyncio.sleep(0.1)
        assert not asking.done()
        del there[seed % 3]
        async with asyncio.timeout(60):
            found = await asking
        router, _ = engine._client._entered or pytest.fail("entered")  # type: ignore[misc]
        assert router.waiting == 0
        assert [r.window.in_flight for r in router.routes] == [0, 0]
    assert values(found) == expected


async def test_only_this_way_is_taken_where_it_is_wanted(connect: Any, tmp_path: Path) -> None:
    log = tmp_path / "bodies"
    letters = [Request(kind=Kind.LOGLIKELIHOOD, text="Which one? " * 9, continuation=c) for c in "ABCD"]
    async with FakeServer(ServerOptions(prefix_cache=16, bodies=str(log))) as server:
        async with connect(lambda: [server.backend], loglikelihood="cached-echo") as engine:
            found = await respond(engine, letters)
    assert values(found) == await echoed(connect, letters)
    assert not any("logprob_token_ids" in body for body in bodies(log))
    assert by_route(bodies(log)[-4:]) == (4, 0)


async def sent_after_the_canary(connect: Any, requests: Sequence[Request], log: Path) -> list[dict[str, Any]]:
    """To a server that passes it and does not say from then on what it had computed; the answers are right."""
    async with FakeServer(ServerOptions(prefix_cache=16, bodies=str(log))) as server:
        async with connect(lambda: [server.backend], max_in_flight=1) as engine:
            await respond(engine, questions(1, words=20))
            server.break_cached_echo()
            before = len(bodies(log))
            found = await respond(engine, requests)
    assert values(found) == await echoed(connect, requests)
    return bodies(log)[before:]


async def test_what_is_not_said_about_a_long_context_is_asked_token_by_token(connect: Any, tmp_path: Path) -> None:
    """The server has the context: a request for each token costs less than computing it once more for each choice."""
    requests = [
        Request(kind=Kind.LOGLIKELIHOOD, text=f"Story {i}: " + "somebody " * 90, continuation=end)
        for i in range(4)
        for end in (" am", " is", " it", " on")
    ]
    sent = await sent_after_the_canary(connect, requests, tmp_path / "bodies")
    assert by_route(sent)[0] > 0
    lists = [b["prompt"] if isinstance(b["prompt"][0], list) else [b["prompt"]] for b in sent if b.get("echo")]
    assert all(len(prompt) < 200 for some in lists for prompt in some), "none of the questions was echoed"


async def test_answers_that_do_not_say_what_was_computed_end_the_way(connect: Any, tmp_path: Path) -> None:
    requests = questions(20)
    sent = await sent_after_the_canary(connect, requests, tmp_path / "bodies")
    tried = {tuple(b["token_ids"]) for b in sent if "token_ids" in b}
    assert 0 < len(tried) <= 6 * len(ENDS) < len(requests)


async def test_a_way_that_hardly_ever_helps_is_not_taken_any_more(connect: Any, tmp_path: Path) -> None:
    """Everything was asked before: the server has it, and does not say it again."""
    log, requests = tmp_path / "bodies", questions(60, words=11)
    async with FakeServer(ServerOptions(prefix_cache=16, bodies=str(log))) as server:
        async with connect(lambda: [server.backend], loglikelihood="echo") as engine:
            await respond(engine, requests)
        before = len(bodies(log))
        async with connect(lambda: [server.backend], max_in_flight=8) as engine:
            found = await respond(engine, requests)
    assert values(found) == await echoed(connect, requests)
    cached, again = by_route(bodies(log)[before:])
    assert cached < len(requests) * 0.6
    assert again >= len(requests) * 0.9


async def test_faults_on_the_way_are_survived(connect: Any) -> None:
    requests = questions(25)
    expected = await echoed(connect, requests)
    faults = Faults(server_error=0.1, truncated=0.1, reset=0.05, error_body=0.05, empty=0.05, seed=3)
    async with FakeServer(ServerOptions(prefix_cache=16, faults=faults)) as server:
        async with connect(lambda: [server.backend]) as engine:
            assert values(await respond(engine, requests)) == expected


# --- reading ---

PASSAGE = Passage(token_ids=(5, 6, 7, 8, 9), scored=2)


def answer(cached: int = 2, **changed: Any) -> dict[str, Any]:
    said = [{str(t): {"logprob": -0.1 * t, "rank": 1}} for t in PASSAGE.token_ids[1:]]
    usage = {"prompt_tokens": 5, "prompt_tokens_details": {"cached_tokens": cached}}
    return {"prompt_logprobs": [None, *said], "usage": usage} | changed


def test_the_last_places_are_read() -> None:
    whole = answer()
    assert read_cached_echo(whole, PASSAGE) == ((pytest.approx(-0.8), pytest.approx(-0.9)), True, 2)
    # A server that leaves out what it did not compute.
    short = answer(prompt_logprobs=whole["prompt_logprobs"][-2:])
    assert read_cached_echo(short, PASSAGE) == read_cached_echo(whole, PASSAGE)


@pytest.mark.parametrize("cached", [3, 4, 5])
def test_nothing_is_read_where_a_value_was_not_computed(cached: int) -> None:
    assert read_cached_echo(answer(cached), PASSAGE) is None


@pytest.mark.parametrize("details", [{}, {"prompt_tokens_details": None}, {"prompt_tokens_details": {}}])
def test_nothing_is_read_where_the_server_does_not_count(details: dict[str, Any]) -> None:
    assert read_cached_echo(answer(usage={"prompt_tokens": 5} | details), PASSAGE) is None


def test_the_most_probable_token_decides_about_greedy() -> None:
    said = answer()
    said["prompt_logprobs"][-1]["77"] = {"logprob": -0.2, "rank": 1}
    assert read_cached_echo(said, PASSAGE) == ((pytest.approx(-0.8), pytest.approx(-0.9)), False, 2)
    said["prompt_logprobs"][-1]["77"] = {"logprob": said["prompt_logprobs"][-1]["9"]["logprob"], "rank": 1}
    found = read_cached_echo(said, PASSAGE)
    assert found is not None
    assert found[1]


@pytest.mark.parametrize(
    "bad",
    [
        answer(usage={"prompt_tokens": 4, "prompt_tokens_details": {"cached_tokens": 0}}),
        answer(prompt_logprobs=None),
        answer(prompt_logprobs=[{"9": {"logprob": -1.0}}]),
        answer(prompt_logprobs=[{"8": {"logprob": -1.0}}, {"8": {"logprob": -1.0}}]),
        answer(prompt_logprobs=[{"8": {"logprob": -1.0}}, {"9": {"logprob": 0.5}}]),
        answer(prompt_logprobs=[None, None]),
        {},
    ],
    ids=["cut", "none", "short", "another token", "above 0", "nothing", "empty"],
)
def test_anything_else_is_unreadable(bad: dict[str, Any]) -> None:
    with pytest.raises(UNREADABLE):
        read_cached_echo(bad, PASSAGE)


def test_the_body_asks_for_no_text() -> None:
    assert PATH.startswith("/inference")  # behind the server's key
    assert cached_echo_body(PASSAGE)["sampling_params"] == {
        "max_tokens": 1,
        "temperature": 0.0,
        "prompt_logprobs": 1,
        "skip_reading_prefix_cache": False,
        "detokenize": False,
    }
