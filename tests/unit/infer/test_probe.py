"""Which servers may measure log-likelihoods, and by which method."""

from __future__ import annotations

import json
from typing import Any

import pytest

from proctor.config.spec import OpenAIEngine as Spec
from proctor.errors import ProbeError
from proctor.infer.engine import PhysicalRequest
from proctor.infer.fake_model import END, FakeModel, decode
from proctor.infer.openai import OpenAIEngine
from proctor.infer.probe import Sample, alignment
from proctor.infer.resolve import IF_OFFERED, SERVER
from proctor.records import EngineInfo, Kind, Message, Request, Response
from proctor.testing import FakeServer, Faults, ServerOptions

from .asking import ask

LIKELY = Request(kind=Kind.LOGLIKELIHOOD, text="The sky is", continuation=" blue")


async def test_a_right_server_is_asked_by_echo_without_generating(connect: Any) -> None:
    async with FakeServer() as server, connect(lambda: [server.backend]) as engine:
        (response,) = await ask(engine, [LIKELY])
        assert engine.conformance is not None
        assert (engine.conformance.method, engine.conformance.max_tokens) == ("echo", 0)
        assert engine.conformance.lists
        assert engine.info.method == "echo"
    values, _ = FakeModel("fake").score([*b"The sky is blue"])
    assert isinstance(response, Response)
    assert response.token_logprobs == pytest.approx(values[-5:])


async def test_a_server_that_must_generate_beside_the_echo_is_asked_for_one_token(connect: Any) -> None:
    async with FakeServer() as right, connect(lambda: [right.backend]) as engine:
        (expected,) = await ask(engine, [LIKELY])
    async with FakeServer(ServerOptions(echo_zero=False)) as server, connect(lambda: [server.backend]) as engine:
        (response,) = await ask(engine, [LIKELY])
        assert engine.conformance is not None
        assert engine.conformance.max_tokens == 1
    assert isinstance(response, Response) and isinstance(expected, Response)
    assert response.token_logprobs == expected.token_logprobs


@pytest.mark.parametrize("local", [True, False], ids=["ids", "text"])
@pytest.mark.parametrize(("echo", "said"), [("ignored", "ignored"), ("shifted", "one position")])
async def test_a_wrong_server_is_refused_by_name_of_the_fault(connect: Any, echo: Any, said: str, local: bool) -> None:
    async with (
        FakeServer(ServerOptions(echo=echo)) as server,
        connect(lambda: [server.backend], local=local) as engine,
    ):
        with pytest.raises(ProbeError) as caught:
            await ask(engine, [LIKELY])
    assert said in str(caught.value)
    assert "vLLM" in str(caught.value)


@pytest.mark.parametrize(
    ("echoed", "generated", "right"),
    [
        # A model that repeats itself: neighbours are as near as noise, and the server is right.
        ([None, -0.5, -0.101, -0.1, -0.1], (-0.1, -0.1, -0.1), True),
        # A random model, all values close: only one position fits exactly.
        ([None, -10.2, -10.31, -10.18, -10.25], (-10.31, -10.18, -10.25), True),
        ([None, -10.31, -10.18, -10.25, -10.4], (-10.31, -10.18, -10.25), False),
        # bf16: noise in place, and nothing better beside it.
        ([None, -3.0, -0.75, -2.1, -0.38], (-0.7, -2.05, -0.3), True),
        # Nothing fits anywhere.
        ([None, -3.0, -9.0, -9.0, -9.0], (-0.7, -2.05, -0.3), False),
    ],
)
def test_alignment_is_told_from_noise(echoed: list[float | None], generated: tuple[float, ...], right: bool) -> None:
    sample = Sample(prompt=(7, 8), tokens=(1,) * len(generated), logprobs=generated)
    assert isinstance(alignment(echoed, sample), float) is right


async def test_a_wrong_server_still_generates(connect: Any) -> None:
    request = Request(kind=Kind.GENERATE, text="Hello", arguments=json.dumps({"until": [], "max_gen_toks": 3}))
    async with FakeServer(ServerOptions(echo="shifted")) as server, connect(lambda: [server.backend]) as engine:
        (response,) = await ask(engine, [request])
    assert isinstance(response, Response)


@pytest.mark.parametrize("echo", ["ignored", "shifted"])
async def test_where_echo_is_wrong_tokens_are_forced_and_give_the_same_numbers(connect: Any, echo: Any) -> None:
    # A token that ends inside a character comes back without log-probabilities from llama.cpp.
    requests = [LIKELY, Request(kind=Kind.ROLLING, text="A document, ünïcødé.")]
    async with FakeServer() as right, connect(lambda: [right.backend]) as engine:
        expected = {a.key: a for a in await ask(engine, requests)}
    options = ServerOptions(echo=echo, native=True)
    async with FakeServer(options) as server, connect(lambda: [server.backend]) as engine:
        answers = await ask(engine, requests)
        assert engine.info.method == "forced"
    for answer in answers:
        other = expected[answer.key]
        assert isinstance(answer, Response) and isinstance(other, Response)
        assert answer.token_logprobs == pytest.approx(other.token_logprobs)
        assert answer.is_greedy == other.is_greedy


async def test_a_wanted_method_is_not_replaced_by_another(connect: Any) -> None:
    async with (
        FakeServer(ServerOptions(native=False)) as server,
        connect(lambda: [server.backend], loglikelihood="forced") as engine,
    ):
        with pytest.raises(ProbeError, match="forced: no /completion route"):
            await ask(engine, [LIKELY])


async def test_passing_faults_do_not_condemn_a_server(connect: Any) -> None:
    options = ServerOptions(faults=Faults(server_error=0.3, truncated=0.2, seed=5))
    async with FakeServer(options) as server, connect(lambda: [server.backend]) as engine:
        (response,) = await ask(engine, [LIKELY])
        assert engine.info.method == "echo"
    assert isinstance(response, Response)


async def test_text_is_scored_by_offsets_where_nobody_here_can_tokenise(connect: Any) -> None:
    requests = [LIKELY, Request(kind=Kind.LOGLIKELIHOOD, text="The sky is ", continuation="blue")]
    async with FakeServer() as server:
        async with connect(lambda: [server.backend]) as engine:
            by_ids = {a.key: a for a in await ask(engine, requests)}
        async with connect(lambda: [server.backend], local=False) as engine:
            by_text = {a.key: a for a in await ask(engine, requests)}
    for request in requests:
        one, other = by_ids[request.key], by_text[request.key]
        assert isinstance(one, Response) and isinstance(other, Response)
        assert one.token_logprobs == pytest.approx(other.token_logprobs)
        assert one.token_logprobs is not None and len(one.token_logprobs) == 5


@pytest.mark.parametrize("native", [True, False], ids=["llama.cpp", "vllm"])
async def test_the_servers_own_tokenizer_gives_the_same_ids(connect: Any, native: bool) -> None:
    requests = [
        LIKELY,
        Request(kind=Kind.GENERATE, text="ünïcødé </s> 🦊", arguments='{"max_gen_toks":4,"until":[]}'),
    ]
    async with FakeServer(ServerOptions(native=native)) as server:
        async with connect(lambda: [server.backend]) as engine:
            local = await engine.resolve(requests)
        remote = OpenAIEngine(
            Spec(),
            backends=lambda: [server.backend],
            info=lambda: EngineInfo(engine="fake", version="1"),
            tokenizer=SERVER,
        )
        async with remote:
            found = await remote.resolve(requests)
    for one, other in zip(local, found, strict=True):
        assert isinstance(one, PhysicalRequest) and isinstance(other, PhysicalRequest)
        assert one.passages == other.passages
        assert one.prompt_ids == other.prompt_ids
    assert isinstance(found[1], PhysicalRequest) and found[1].prompt_ids is not None
    assert END in found[1].prompt_ids


@pytest.mark.parametrize("offers", [True, False])
async def test_an_endpoint_tokenises_and_renders_where_it_can(offers: bool) -> None:
    messages = (Message(role="user", content="Hi"),)
    requests = [LIKELY, Request(kind=Kind.GENERATE, messages=messages, arguments='{"max_gen_toks":9}')]
    async with FakeServer(ServerOptions(tokenize=offers)) as server:
        engine = OpenAIEngine(
            Spec(),
            backends=lambda: [server.backend],
            info=lambda: EngineInfo(engine="fake", version="1"),
            tokenizer=IF_OFFERED,
        )
        async with engine:
            scored, chat = await engine.resolve(requests)
            answers = {a.key: a for a in await ask(engine, requests)}
    assert isinstance(scored, PhysicalRequest) and isinstance(chat, PhysicalRequest)
    assert bool(scored.passages) is offers
    assert chat.prompt_ids is None and chat.prompt_text is None
    expected, _, _ = FakeModel("fake").generate([*b"[user]Hi\n[assistant]"], 9)
    answer = answers[requests[1].key]
    assert isinstance(answer, Response)
    assert answer.text == decode(expected)
