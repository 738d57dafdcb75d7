"""Log-likelihoods by echo: what a server says that makes no sense is asked for again, and never taken for a value."""

from __future__ import annotations

import json
from typing import Any

import pytest
from aiohttp import web

from proctor.infer.client import Broken, Client, Retries
from proctor.infer.engine import Passage
from proctor.infer.loglikelihood import Scored, score_by_echo
from proctor.records import Boundary
from proctor.testing import FakeServer

PASSAGES = [Passage(token_ids=(*b"question: ", letter), scored=1) for letter in b"abc"]
BAD = PASSAGES[1].token_ids


class Odd(FakeServer):
    """Echoes rightly, but for one passage, whose choice it changes, as often as it is told to."""

    def __init__(self, change: dict[str, Any], *, times: int) -> None:
        super().__init__()
        self.change = change
        self.left = times
        self.lists: list[int] = []

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        found = await super()._handle(request)
        if request.path != "/v1/completions":
            return found
        prompt: Any = json.loads(await request.read())["prompt"]
        prompts = [tuple(p) for p in prompt] if isinstance(prompt[0], list) else [tuple(prompt)]
        self.lists.append(len(prompts))
        if BAD not in prompts or self.left == 0:
            return found
        self.left -= 1
        assert isinstance(found, web.Response)
        assert isinstance(found.body, bytes)
        answer = json.loads(found.body)
        answer["choices"][prompts.index(BAD)] |= self.change
        return web.Response(body=json.dumps(answer).encode())


async def ask(server: Odd) -> list[Scored | Broken]:
    retries = Retries(attempts=1, base_s=0.001)
    async with server, Client(lambda: [server.backend], retries=retries) as client:
        return await score_by_echo(client, PASSAGES, max_tokens=0, extra={})


CHANGES: list[dict[str, Any]] = [
    {"logprobs": None},
    {"logprobs": {"token_logprobs": None, "top_logprobs": None}},
    {"logprobs": {"token_logprobs": [None] * len(BAD), "top_logprobs": [None] * len(BAD)}},
    {"logprobs": {"token_logprobs": [-1.0] * len(BAD), "top_logprobs": [None] * len(BAD)}},
    {"logprobs": {"token_logprobs": [-1.0] * len(BAD), "top_logprobs": [{}] * len(BAD)}},
    {"logprobs": {"token_logprobs": ["NaN"] * len(BAD), "top_logprobs": [{"a": -1.0}] * len(BAD)}},
    {"logprobs": {"token_logprobs": [1.0] * len(BAD), "top_logprobs": [{"a": 1.0}] * len(BAD)}},
    {"logprobs": {"token_logprobs": [-1.0] * 3, "top_logprobs": [{"a": -1.0}] * 3}},
    {"finish_reason": "abort"},
]


@pytest.mark.parametrize("change", CHANGES)
async def test_what_makes_no_sense_once_is_asked_for_again(change: dict[str, Any]) -> None:
    expected = await ask(Odd({}, times=0))
    found = await ask(odd := Odd(change, times=1))
    assert [one.token_logprobs for one in found if isinstance(one, Scored)] == [
        one.token_logprobs for one in expected if isinstance(one, Scored)
    ]
    assert odd.lists == [3, 3]


@pytest.mark.parametrize("change", CHANGES)
async def test_one_passage_that_never_makes_sense_costs_no_other(change: dict[str, Any]) -> None:
    found = await ask(odd := Odd(change, times=-1))
    assert [isinstance(one, Scored) for one in found] == [True, False, True]
    broken = found[1]
    assert isinstance(broken, Broken)
    assert (broken.boundary, broken.retryable, broken.attempts) == (Boundary.SERVER, True, 2)
    # The list twice, then each alone, the bad one twice.
    assert odd.lists == [3, 3, 1, 1, 1, 1]
