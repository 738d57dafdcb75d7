"""What the client does when servers fail, and what is retried."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
from aiohttp import web

from proctor.errors import ServerError
from proctor.infer.client import Broken, Client, Reply, Retries, Timeouts
from proctor.infer.engine import PhysicalRequest
from proctor.infer.server import Backend
from proctor.records import Answer, Boundary, Failure, Kind, Request, Response
from proctor.testing import FakeServer, Faults, Latency, ServerOptions, prompt_digest

from .asking import ask

BODY = {"prompt": "hello", "max_tokens": 4, "temperature": 0}
ARGUMENTS = json.dumps({"until": ["\n"], "max_gen_toks": 8})


def generations(count: int) -> list[Request]:
    return [Request(kind=Kind.GENERATE, text=f"Question {i}:", arguments=ARGUMENTS) for i in range(count)]


def texts(answers: Sequence[Answer]) -> dict[str, str | None]:
    return {a.key: a.text for a in answers if isinstance(a, Response)}


@pytest.mark.parametrize(
    "fault", ["rate_limited", "server_error", "reset", "truncated", "error_body", "aborted", "empty"]
)
async def test_passing_faults_are_retried_until_every_answer_is_there(connect: Any, fault: str) -> None:
    requests = generations(60)
    async with FakeServer() as sound, connect(lambda: [sound.backend]) as engine:
        expected = texts(await ask(engine, requests))
    faults = Faults(**{fault: 0.3}, retry_after_s=0.01)  # type: ignore[arg-type]
    async with FakeServer(ServerOptions(faults=faults)) as server, connect(lambda: [server.backend]) as engine:
        assert texts(await ask(engine, requests)) == expected
        assert server.stats.faults[fault] > 5
        assert server.stats.answered == len(requests)


@pytest.mark.parametrize("fault", ["rate_limited", "reset", "stall", "truncated", "error_body", "aborted", "empty"])
async def test_a_server_that_fails_half_of_the_time(connect: Any, fault: str) -> None:
    """Finished, correct, each asked no more often than allowed, and what failed says why and may be asked again."""
    requests = generations(120)
    async with FakeServer() as sound, connect(lambda: [sound.backend]) as engine:
        expected = texts(await ask(engine, requests))
    retries = Retries(attempts=3, base_s=0.001, cap_s=0.01)
    faults = Faults(**{fault: 0.5}, retry_after_s=0.02, stall_s=60.0, seed=5)  # type: ignore[arg-type]
    async with (
        FakeServer(ServerOptions(faults=faults)) as server,
        connect(lambda: [server.backend], retries=retries, timeout_s=0.3 if fault == "stall" else 30.0) as engine,
    ):
        answers = await ask(engine, requests)
        asked = server.stats.prompts.values()
    failures = [a for a in answers if isinstance(a, Failure)]
    found = texts(answers)
    assert len(answers) == len(requests)
    assert found == {key: text for key, text in expected.items() if key in found}
    # 429 is "later", not "no": it costs a quarter.
    allowed = 1 + 4 * 3 if fault == "rate_limited" else 1 + 3
    # After ten in a row the server looks dead, and a failure is not the request's own.
    spare = 3 if fault in ("reset", "stall") else 0
    assert max(asked) <= allowed + spare
    assert server.stats.faults[fault] > 60
    names = {
        "reset": "Server disconnected",
        "stall": "no answer from",
        "truncated": "no whole JSON",
        "error_body": "lost",
        "aborted": "ended the answer before the model did",
        "empty": "not what was asked for (KeyError: 'choices')",
    }
    if fault == "rate_limited":
        assert not failures
    else:
        assert 0 < len(failures) < 30
        assert all(
            names[fault] in f.message and f.retryable and allowed <= f.attempts <= allowed + spare for f in failures
        )
        boundary = Boundary.TRANSPORT if fault in ("reset", "stall") else Boundary.SERVER
        assert {f.boundary for f in failures} == {boundary}


@pytest.mark.parametrize("fault", ["rate_limited", "reset", "stall", "truncated", "error_body", "aborted", "empty"])
async def test_where_another_server_works_no_answer_is_missing(connect: Any, fault: str) -> None:
    requests = generations(120)
    async with FakeServer() as sound, connect(lambda: [sound.backend]) as engine:
        expected = texts(await ask(engine, requests))
    faults = Faults(**{fault: 0.5}, retry_after_s=0.02, stall_s=60.0, seed=5)  # type: ignore[arg-type]
    async with (
        FakeServer(ServerOptions(faults=faults)) as bad,
        FakeServer() as good,
        connect(
            lambda: [bad.backend, good.backend],
            retries=Retries(attempts=3, base_s=0.001, cap_s=0.01),
            timeout_s=0.3 if fault == "stall" else 30.0,
        ) as engine,
    ):
        assert texts(await ask(engine, requests)) == expected
        assert bad.stats.faults[fault] > 3


async def test_a_stalled_request_is_sent_again_after_its_timeout() -> None:
    options = ServerOptions(faults=Faults(stall=0.5, seed=1))
    retries = Retries(attempts=20, base_s=0.001, cap_s=0.01)
    async with (
        FakeServer(options) as server,
        Client(lambda: [server.backend], timeouts=Timeouts(request=0.1), retries=retries) as client,
    ):
        replies = [await client.post("/v1/completions", BODY) for _ in range(6)]
    assert all(isinstance(r, Reply) for r in replies)
    assert server.stats.faults["stall"] > 0


async def test_a_lasting_fault_ends_as_a_failure_that_may_be_asked_again(connect: Any) -> None:
    async with (
        FakeServer(ServerOptions(faults=Faults(error_body=1.0))) as server,
        connect(lambda: [server.backend], retries=Retries(attempts=3, base_s=0.001)) as engine,
    ):
        (failure,) = await ask(engine, generations(1))
    assert isinstance(failure, Failure)
    assert failure.boundary is Boundary.SERVER
    assert failure.retryable
    assert failure.attempts == 4
    assert "the engine is lost" in failure.message


async def test_a_prompt_over_the_servers_window_is_a_context_failure_and_asked_once(connect: Any) -> None:
    async with (
        FakeServer(ServerOptions(max_model_len=40)) as server,
        connect(lambda: [server.backend]) as engine,
    ):
        short, long = await ask(
            engine, [*generations(1), Request(kind=Kind.GENERATE, text="x" * 99, arguments=ARGUMENTS)]
        )
        assert isinstance(short, Response)
        assert isinstance(long, Failure)
        assert (long.boundary, long.retryable, long.attempts) == (Boundary.CONTEXT, False, 1)
        assert server.stats.prompts[prompt_digest(list(b"x" * 99))] == 1


@pytest.mark.parametrize("native", [False, True])
async def test_a_server_that_cuts_prompts_silently_is_found_out(connect: Any, native: bool) -> None:
    dialect = "llama.cpp" if native else "vllm"
    async with (
        FakeServer(ServerOptions(cut_at=20, native=native)) as server,
        connect(lambda: [server.backend], dialect=dialect) as engine,
    ):
        short, long = await ask(
            engine, [*generations(1), Request(kind=Kind.GENERATE, text="x" * 50, arguments=ARGUMENTS)]
        )
        assert isinstance(short, Response)
        assert isinstance(long, Failure)
        assert (long.boundary, long.retryable) == (Boundary.CONTEXT, False)
        assert "read 20 of 50 prompt tokens" in long.message
        assert server.stats.prompts[prompt_digest(list(b"x" * 50))] == 1


async def test_what_a_server_cuts_is_counted_where_cutting_is_the_policy(connect: Any) -> None:
    async with (
        FakeServer(ServerOptions(cut_at=20)) as server,
        connect(lambda: [server.backend], truncation="truncate_left") as engine,
    ):
        (answer,) = await ask(engine, [Request(kind=Kind.GENERATE, text="x" * 50, arguments=ARGUMENTS)])
    assert isinstance(answer, Response)
    assert (answer.prompt_tokens, answer.truncated_tokens) == (20, 30)


async def test_a_refused_request_is_not_retried() -> None:
    async with FakeServer() as server, Client(lambda: [server.backend]) as client:
        outcome = await client.post("/v1/completions", {"prompt": []})
    assert isinstance(outcome, Broken)
    assert (outcome.boundary, outcome.retryable, outcome.attempts) == (Boundary.REFUSED, False, 1)


async def test_a_list_that_is_refused_as_a_whole_is_asked_one_by_one(connect: Any) -> None:
    long = Request(kind=Kind.LOGLIKELIHOOD, text="y" * 200, continuation=" z")
    short = [Request(kind=Kind.LOGLIKELIHOOD, text="y", continuation=f" {i}") for i in range(3)]
    async with (
        FakeServer(ServerOptions(max_model_len=150)) as server,
        connect(lambda: [server.backend], batch_size=4, loglikelihood="echo") as engine,
    ):
        answers = {a.key: a for a in await ask(engine, [*short, long])}
        # The list, and each of its four prompts.
        assert server.stats.prompts[prompt_digest(list(b"y 0"))] == 2
    assert all(isinstance(answers[r.key], Response) for r in short)
    failure = answers[long.key]
    assert isinstance(failure, Failure)
    assert failure.boundary is Boundary.CONTEXT


@pytest.mark.parametrize("key", [None, "wrong"])
async def test_a_wrong_key_stops_the_engine_and_is_not_shown(connect: Any, key: str | None) -> None:
    async with FakeServer(ServerOptions(api_key="right-secret")) as server:
        wrong = Backend(url=server.url, api_key=key)
        async with connect(lambda: [wrong]) as engine:
            with pytest.raises(ServerError) as caught:
                await ask(engine, generations(3))
            with pytest.raises(ServerError, match="API key"):
                await ask(engine, [Request(kind=Kind.LOGLIKELIHOOD, text="x", continuation="y")])
        async with connect(lambda: [server.backend]) as engine:
            assert isinstance((await ask(engine, generations(1)))[0], Response)
    assert "API key" in str(caught.value)
    assert "right-secret" not in str(caught.value)


async def test_a_server_that_sends_us_elsewhere_is_named_with_where(connect: Any) -> None:
    class Moved(FakeServer):
        async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
            return web.Response(status=308, headers={"Location": "https://elsewhere/v1"})

    async with Moved() as server, connect(lambda: [server.backend]) as engine:
        with pytest.raises(ServerError, match="elsewhere, to https://elsewhere/v1"):
            await ask(engine, generations(1))


class Canned(FakeServer):
    """Answers every completion with the same text, and keeps what it was sent."""

    def __init__(self, text: bytes) -> None:
        super().__init__()
        self.text = text
        self.sent: list[bytes] = []

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        self.sent.append(await request.read())
        return web.Response(body=self.text)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (rb'{"text": "half a \ud83d"}', {"text": "half a \ud83d"}),
        (b'{"logprob": -Infinity}', {"logprob": float("-inf")}),
        (b'{"logprob": NaN}', None),
        (b'{"text": "cut', None),
        (b"\xff\xfe\xfd", None),
        (b"", None),
        (b"3", None),
        (b"[" * 100_000, None),
    ],
)
async def test_what_is_nearly_json_is_taken_and_what_is_no_answer_is_not(text: bytes, value: object) -> None:
    retries = Retries(attempts=1, base_s=0.001)
    async with Canned(text) as server, Client(lambda: [server.backend], retries=retries) as client:
        outcome = await client.post("/v1/completions", BODY)
    if value is None:
        assert isinstance(outcome, Broken)
        assert (outcome.boundary, outcome.retryable, outcome.attempts) == (Boundary.SERVER, True, 2)
    else:
        assert isinstance(outcome, Reply)
        assert outcome.value == value


def completion(**fields: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "text": "yes", "finish_reason": "stop"} | fields], "usage": {}}


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        ({"choices": []}, "IndexError"),
        ({"choices": ["yes"]}, "AttributeError"),
        ({"choices": {"0": "yes"}}, "KeyError"),
        ({"choices": 3}, "TypeError"),
        (completion(text=None), "TypeError"),
        (completion(text=["yes"]), "TypeError"),
        (completion(message={"reasoning_content": "hm"}), "KeyError"),
        (completion(token_ids=[1, None]), "TypeError"),
        (completion(token_ids=[float("inf")]), "OverflowError"),
        (completion(finish_reason={"type": "abort"}), "TypeError"),
        (completion() | {"usage": ["3"]}, "AttributeError"),
        (completion() | {"usage": {"prompt_tokens": "many"}}, "ValueError"),
        (completion(finish_reason="abort"), "finish_reason 'abort'"),
        (completion(finish_reason="error"), "finish_reason 'error'"),
    ],
)
async def test_an_answer_of_another_shape_is_asked_for_again_and_never_taken(
    connect: Any, answer: dict[str, Any], told: str
) -> None:
    retries = Retries(attempts=2, base_s=0.001)
    async with Canned(json.dumps(answer).encode()) as server, connect(lambda: [server.backend], retries=retries) as e:
        (failure,) = await ask(e, generations(1))
    assert isinstance(failure, Failure)
    assert (failure.boundary, failure.retryable, failure.attempts) == (Boundary.SERVER, True, 3)
    assert told in failure.message


async def test_an_answer_with_nothing_but_reasoning_is_an_empty_text(connect: Any) -> None:
    text = json.dumps(completion(message={"content": None, "reasoning_content": "hm"}))
    async with Canned(text.encode()) as server, connect(lambda: [server.backend]) as engine:
        (answer,) = await ask(engine, generations(1))
    assert isinstance(answer, Response)
    assert answer.text == ""


async def test_what_a_content_filter_cut_is_refused_and_asked_once(connect: Any) -> None:
    text = json.dumps(completion(text="", finish_reason="content_filter"))
    async with Canned(text.encode()) as server, connect(lambda: [server.backend]) as engine:
        (failure,) = await ask(engine, generations(1))
        assert len([body for body in server.sent if b"max_tokens" in body]) == 1
    assert isinstance(failure, Failure)
    assert (failure.boundary, failure.retryable) == (Boundary.REFUSED, False)
    assert "content filter" in failure.message


async def test_half_a_character_in_a_prompt_is_sent_as_it_is() -> None:
    async with Canned(b"{}") as server, Client(lambda: [server.backend]) as client:
        assert isinstance(await client.post("/v1/completions", {"prompt": "half a \ud83d"}), Reply)
    assert json.loads(server.sent[0])["prompt"] == "half a \ud83d"


@pytest.mark.parametrize("body", [{}, {"prompt": "p", "max_tokens": 1}])
@pytest.mark.parametrize("name", ["a/b", 'quoted "name" \\', "half \ud83d"])
async def test_each_server_is_told_the_model_by_its_own_name(body: dict[str, Any], name: str) -> None:
    async with Canned(b"{}") as server:
        backend = replace(server.backend, served_model=name)
        async with Client(lambda: [backend]) as client:
            assert isinstance(await client.post("/v1/completions", body), Reply)
            assert isinstance(await client.post("/v1/completions", body, named=False), Reply)
    assert [json.loads(sent) for sent in server.sent] == [{"model": name, **body}, body]


async def test_a_url_that_is_none_ends_the_run(connect: Any) -> None:
    async with connect(lambda: [Backend(url="ftp://host")]) as engine:
        with pytest.raises(ServerError, match="not a URL of a server: 'ftp://host'"):
            await ask(engine, generations(1))


async def test_an_unreachable_server_ends_the_run_after_the_budget(connect: Any) -> None:
    async with FakeServer() as server:
        gone = server.backend
    async with connect(lambda: [gone], retries=Retries(unreachable_s=0.2, base_s=0.001)) as engine:
        with pytest.raises(ServerError, match="no server answered"):
            await ask(engine, generations(5))


async def test_a_restarted_server_is_found_at_its_new_address(connect: Any) -> None:
    current: list[Backend] = []
    async with FakeServer() as first:
        gone = first.backend
    current.append(gone)
    async with FakeServer() as second, connect(lambda: tuple(current)) as engine:
        asking = asyncio.create_task(ask(engine, generations(5)))
        await asyncio.sleep(0.1)
        current[:] = [second.backend]
        assert all(isinstance(a, Response) for a in await asking)


async def test_a_dead_backend_is_ejected_and_the_others_take_over(connect: Any) -> None:
    async with FakeServer() as dead:
        gone = dead.backend
    async with FakeServer() as one, FakeServer() as two:
        backends = [gone, one.backend, two.backend]
        async with connect(lambda: tuple(backends)) as engine:
            answers = await ask(engine, generations(80))
        assert all(isinstance(a, Response) for a in answers)
        assert one.stats.answered + two.stats.answered == 80
        assert min(one.stats.answered, two.stats.answered) > 10


async def test_a_backend_that_recovers_is_asked_again(connect: Any) -> None:
    options = ServerOptions(slow_start_s=0.3)
    async with FakeServer(options) as slow, connect(lambda: [slow.backend]) as engine:
        answers = await ask(engine, generations(4))
    assert all(isinstance(a, Response) for a in answers)


async def test_retry_after_is_honoured() -> None:
    options = ServerOptions(faults=Faults(rate_limited=0.5, retry_after_s=0.15, seed=3))
    async with FakeServer(options) as server, Client(lambda: [server.backend]) as client:
        loop = asyncio.get_running_loop()
        for _ in range(8):
            limited, started = server.stats.faults["rate_limited"], loop.time()
            assert isinstance(await client.post("/v1/completions", BODY), Reply)
            waited = server.stats.faults["rate_limited"] - limited
            assert loop.time() - started >= 0.15 * waited
        assert server.stats.faults["rate_limited"] > 0


async def test_no_more_is_in_flight_than_allowed_and_the_window_grows_to_it(connect: Any) -> None:
    options = ServerOptions(latency=Latency(fixed_s=0.005))
    async with FakeServer(options) as server, connect(lambda: [server.backend], max_in_flight=24) as engine:
        await ask(engine, generations(400))
    assert 16 <= server.stats.max_in_flight <= 24


async def test_an_abandoned_run_leaves_nothing_running(connect: Any) -> None:
    options = ServerOptions(latency=Latency(fixed_s=0.02))
    async with FakeServer(options) as server, connect(lambda: [server.backend]) as engine:
        resolved = [r for r in await engine.resolve(generations(50)) if isinstance(r, PhysicalRequest)]

        async def feed() -> AsyncIterator[PhysicalRequest]:
            for one in resolved:
                yield one

        answers = engine.run(feed())
        await anext(answers)
        await answers.aclose()  # type: ignore[attr-defined]
        asked = server.stats.requests
        await asyncio.sleep(0.1)
        assert server.stats.requests == asked
        assert server.stats.in_flight == 0
