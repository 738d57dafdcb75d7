"""What every engine promises, whatever stands behind it."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from typing import cast

import pytest

from proctor.infer.engine import Engine, PhysicalRequest
from proctor.records import Answer, Boundary, Failure, Kind, Message, Request, Response


async def resolve_all(engine: Engine, requests: Sequence[Request]) -> list[PhysicalRequest]:
    resolved = await engine.resolve(requests)
    assert [r.key for r in resolved] == [r.key for r in requests]
    assert not [r for r in resolved if isinstance(r, Failure)]
    return cast("list[PhysicalRequest]", resolved)


async def ask(engine: Engine, physical: Sequence[PhysicalRequest]) -> dict[str, Answer]:
    async def feed() -> AsyncIterator[PhysicalRequest]:
        for one in physical:
            yield one

    answers = [answer async for answer in engine.run(feed())]
    assert len(answers) == len(physical)
    return {answer.key: answer for answer in answers}


async def respond(engine: Engine, requests: Sequence[Request]) -> list[Response]:
    answers = await ask(engine, await resolve_all(engine, requests))
    found = [answers[r.key] for r in requests]
    assert not [a for a in found if isinstance(a, Failure)], found
    return cast("list[Response]", found)


def scored(context: str, *continuations: str) -> list[Request]:
    return [Request(kind=Kind.LOGLIKELIHOOD, text=context, continuation=c) for c in continuations]


async def test_every_request_is_answered_once_and_tells_what_answered_it(engine: Engine, arguments: str) -> None:
    requests = [Request(kind=Kind.GENERATE, text=f"Question {i}:", arguments=arguments) for i in range(12)]
    requests += scored("The sky is", " blue", " red", " green")
    responses = await respond(engine, requests)
    for request, response in zip(requests, responses, strict=True):
        assert response.key == request.key
        assert response.engine_id
        assert response.created > 0
        if request.kind is Kind.GENERATE:
            assert response.text is not None and response.logprob is None
            assert response.finish_reason in ("stop", "length")
            assert 0 < response.completion_tokens <= 12
        else:
            assert response.logprob is not None and response.text is None
            assert response.token_logprobs is not None
            assert response.logprob == pytest.approx(sum(response.token_logprobs))
            assert response.logprob < 0
    assert engine.info.id in {r.engine_id for r in responses}


async def test_the_same_question_has_the_same_answer_alone_and_in_company(engine: Engine, arguments: str) -> None:
    lone = Request(kind=Kind.GENERATE, text="Once upon a time", arguments=arguments)
    crowd = [Request(kind=Kind.GENERATE, text=f"Chapter {i}", arguments=arguments) for i in range(8)]
    (alone,) = await respond(engine, [lone])
    together = await respond(engine, [*crowd, lone])
    assert together[-1].text == alone.text
    assert together[-1].physical_key == alone.physical_key


async def test_greedy_repeats_are_one_physical_request_and_samples_are_not(engine: Engine) -> None:
    greedy = json.dumps({"until": ["\n"], "max_gen_toks": 6})
    sampled = json.dumps({"until": ["\n"], "max_gen_toks": 6, "temperature": 1.0})
    repeats = [Request(kind=Kind.GENERATE, text="A", arguments=greedy, sample_index=i) for i in range(3)]
    draws = [Request(kind=Kind.GENERATE, text="A", arguments=sampled, sample_index=i) for i in range(3)]
    again = [Request(kind=Kind.GENERATE, text="A", arguments=sampled, sample_index=i, replicate=1) for i in range(3)]
    assert len({p.physical_key for p in await resolve_all(engine, repeats)}) == 1
    physical = await resolve_all(engine, draws + again)
    assert len({p.physical_key for p in physical}) == 6
    seeds = {p.sampling.seed for p in physical if p.sampling}
    assert len(seeds) == 6
    assert all(seed is not None and 0 <= seed < 2**31 for seed in seeds)
    assert [r.seed for r in await respond(engine, draws)] == [p.sampling.seed for p in physical[:3] if p.sampling]


async def test_stops_end_the_text_and_are_not_part_of_it(engine: Engine) -> None:
    long = Request(kind=Kind.GENERATE, text="Tell me more", arguments=json.dumps({"until": [], "max_gen_toks": 24}))
    (whole,) = await respond(engine, [long])
    assert whole.text
    stop = whole.text[len(whole.text) // 2]
    cut = Request(kind=Kind.GENERATE, text="Tell me more", arguments=json.dumps({"until": [stop], "max_gen_toks": 24}))
    (stopped,) = await respond(engine, [cut])
    assert stopped.text == whole.text.split(stop)[0]
    assert stopped.finish_reason == "stop"


async def test_what_is_generated_greedily_scores_as_greedy(engine: Engine) -> None:
    contexts = ["One, two, three, four,", "Monday, Tuesday,", "The capital of France is"]
    arguments = json.dumps({"until": [], "max_gen_toks": 4})
    texts = await respond(engine, [Request(kind=Kind.GENERATE, text=c, arguments=arguments) for c in contexts])
    context, text = next((c, t.text) for c, t in zip(contexts, texts, strict=True) if t.finish_reason == "length")
    assert text
    likely, unlikely = await respond(engine, scored(context, text, "}{~"))
    assert likely.is_greedy is True
    assert unlikely.is_greedy is False
    assert likely.token_logprobs is not None and unlikely.token_logprobs is not None
    assert min(likely.token_logprobs) > min(unlikely.token_logprobs)


async def test_a_conversation_is_rendered_and_answered(engine: Engine, arguments: str) -> None:
    messages = (Message(role="user", content="What is 2+2?"),)
    other = (Message(role="user", content="What is 2+3?"),)
    requests = [Request(kind=Kind.GENERATE, messages=m, arguments=arguments) for m in (messages, other)]
    resolved = await engine.resolve(requests)
    if any(isinstance(r, Failure) and "no chat template" in r.message for r in resolved):
        pytest.skip("this server tells no chat template")
    one, two = await respond(engine, requests)
    assert one.text is not None
    assert one.physical_key != two.physical_key


async def test_a_document_is_scored_over_all_its_tokens(engine: Engine) -> None:
    document = Request(kind=Kind.ROLLING, text="A short document of several words.")
    (resolved,) = await engine.resolve([document])
    if isinstance(resolved, Failure):
        assert "tokenizer" in resolved.message
        return
    answers = await ask(engine, [resolved])
    response = answers[document.key]
    assert isinstance(response, Response)
    assert response.token_logprobs is not None
    assert len(response.token_logprobs) == sum(p.scored for p in resolved.passages)


async def test_requests_are_pulled_no_faster_than_answers_are_taken(engine: Engine, arguments: str) -> None:
    requests = [Request(kind=Kind.GENERATE, text=f"{i}", arguments=arguments) for i in range(300)]
    physical = await resolve_all(engine, requests)
    taken = 0

    async def feed() -> AsyncIterator[PhysicalRequest]:
        nonlocal taken
        for one in physical:
            taken += 1
            yield one

    answers = engine.run(feed())
    first = await anext(answers)
    assert isinstance(first, Response)
    assert taken < 150
    await answers.aclose()  # type: ignore[attr-defined]
    stopped_at = taken
    again = await respond(engine, requests[:2])
    assert len(again) == 2
    assert taken == stopped_at


@pytest.mark.parametrize(
    "bad",
    [
        Request(kind=Kind.GENERATE, text="x", arguments=json.dumps({"until": 7})),
        Request(kind=Kind.GENERATE, text="x", arguments="{"),
        Request(kind=Kind.GENERATE, text="x", arguments='{"max_gen_toks": "many"}'),
        Request(kind=Kind.GENERATE, text="half a \ud83e pair", arguments="{}"),
        Request(kind=Kind.LOGLIKELIHOOD, text="half a", continuation="\ud83e pair"),
    ],
    ids=["until", "json", "number", "prompt", "continuation"],
)
async def test_a_malformed_request_fails_alone(engine: Engine, arguments: str, bad: Request) -> None:
    good = Request(kind=Kind.GENERATE, text="x", arguments=arguments)
    failed, resolved = await engine.resolve([bad, good])
    assert isinstance(failed, Failure)
    assert (failed.key, failed.boundary, failed.retryable) == (bad.key, Boundary.RENDER, False)
    assert isinstance(resolved, PhysicalRequest)
