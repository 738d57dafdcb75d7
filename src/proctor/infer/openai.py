"""The engine over HTTP: an OpenAI-compatible server of any make, one or several of it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterable, AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, aclosing, nullcontext
from dataclasses import replace
from types import TracebackType
from typing import Any, Final, Self, cast

from proctor.config.spec import OpenAIEngine as OpenAISpec
from proctor.infer.askers import Askers
from proctor.infer.canary import Mixing, try_next_tokens
from proctor.infer.client import Broken, Client, Retries, Timeouts
from proctor.infer.dialect import (
    NATIVE,
    Dialect,
    Generated,
    find_dialect,
    generation_body,
    read_generation,
    read_native,
)
from proctor.infer.engine import Passage, PhysicalRequest
from proctor.infer.loglikelihood import (
    Scored,
    score_by_echo,
    score_by_forcing,
    score_by_next_tokens,
    score_text_by_echo,
)
from proctor.infer.next_tokens import cheaper_by_places, same_context
from proctor.infer.probe import Conformance, probe, refusal
from proctor.infer.profiles import finish_text
from proctor.infer.resolve import Resolver, TokenizerSource, context_length
from proctor.infer.server import Backend, Load
from proctor.infer.slots import SlotPool
from proctor.infer.turns import Turns
from proctor.records import Answer, Boundary, EngineInfo, Failure, Kind, Request, Response

SCORED: Final = (Kind.LOGLIKELIHOOD, Kind.ROLLING)
NEXT_TOKEN: Final = "next-token"
MOST_TOGETHER: Final = 64
"""Requests of one context that are scored together: as many as a question has choices, and no flood."""
MISREADINGS: Final = 3
"""Answers without usable next tokens, after a canary that passed, until the engine goes back to echo for good."""


class OpenAIEngine:
    """Implements `infer.engine.Engine`.

    `backends` and `info` are asked anew when needed, because a restarted server has another port. `tokenizer` says
    where ids come from: a directory with tokenizer.json (then `resolve` needs no server), `SERVER` for the server's
    own /tokenize, or None (text prompts only). `model_directory` is read for config.json and generation_config.json.
    """

    def __init__(
        self,
        spec: OpenAISpec,
        *,
        backends: Callable[[], Sequence[Backend]],
        info: Callable[[], EngineInfo],
        tokenizer: TokenizerSource = None,
        model_directory: str | None = None,
        retries: Retries | None = None,
    ) -> None:
        self._spec = spec
        self._read_info = info
        self._client = Client(
            backends,
            timeouts=Timeouts(request=spec.timeout_s),
            retries=retries or Retries(attempts=spec.retries),
            max_in_flight=spec.max_in_flight,
        )
        self._resolver = Resolver(spec, tokenizer, client=self._client, model_directory=model_directory)
        self._dialect: Dialect | None = None
        self._conformance: Conformance | None = None
        self._slots: SlotPool | None = None
        self._probing = asyncio.Lock()
        self._turns = Turns()
        self._misread = 0
        self._ids: dict[str, tuple[EngineInfo, str]] = {}

    async def __aenter__(self) -> Self:
        await self._client.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._client.__aexit__(kind, error, trace)

    def load(self) -> dict[str, Load]:
        """What each backend has now, by URL."""
        return self._client.load()

    @property
    def info(self) -> EngineInfo:
        """What answers; `method` is filled in by the probe, before the first log-likelihood."""
        found = self._read_info()
        return found if self._conformance is None else replace(found, method=self._conformance.method)

    @property
    def resolves_alone(self) -> bool:
        """Whether `resolve` needs no server: the tokenizer is a local file."""
        return self._resolver.local

    @property
    def conformance(self) -> Conformance | None:
        """What the probe found; None before the first log-likelihood."""
        return self._conformance

    async def resolve(
        self, requests: Sequence[Request], keys: Sequence[str] | None = None
    ) -> list[PhysicalRequest | Failure]:
        return await self._resolver.resolve(requests, keys)

    async def prove(self) -> Conformance:
        """Run the conformance probe now, once. Raises ProbeError if no way to score is right on this server."""
        async with self._probing:
            if self._conformance is None:
                self._conformance = await probe(
                    self._client,
                    dialect=await self._find_dialect(),
                    tokenizer=await self._resolver.tokenizer(),
                    wanted=self._spec.loglikelihood,
                    extra=self._extra,
                )
        if self._spec.loglikelihood == NEXT_TOKEN and await self._try_next_tokens() == "no":
            raise refusal(f"{NEXT_TOKEN}: `logprob_token_ids` is ignored, or wrong")
        return self._conformance

    async def _try_next_tokens(self) -> Mixing:
        """Run the canary now, once."""
        async with self._probing:
            found = self._conformance
            assert found is not None
            if found.next_tokens is None:
                mixing: Mixing = "no"
                if found.sample is not None and found.method == "echo":
                    mixing = await try_next_tokens(
                        self._client,
                        found.sample.passage,
                        found.sample.logprobs,
                        max_tokens=found.max_tokens,
                        tolerance=found.tolerance,
                        extra=self._extra,
                    )
                found = self._conformance = replace(found, next_tokens=mixing)
            assert found.next_tokens is not None
            return found.next_tokens

    async def run(self, requests: AsyncIterable[PhysicalRequest]) -> AsyncIterator[Answer]:
        await self._find_dialect()
        self._client.tail(ending=False)
        askers = Askers(self._answer, lambda: self._client.wanted)
        async with aclosing(askers.run(self._batches(requests), dry=self._client.tail)) as found:
            async for answers in found:
                for answer in answers:
                    yield answer

    async def _batches(self, requests: AsyncIterable[PhysicalRequest]) -> AsyncIterator[list[PhysicalRequest]]:
        """Single requests, neighbours of one context together, or as many log-likelihoods as `batch_size` says."""
        held: list[PhysicalRequest] = []
        async for request in requests:
            if request.kind in SCORED and self._conformance is None:
                await self.prove()
            if held and not self._belongs(held, request):
                yield held
                held = []
            if request.kind in SCORED and len(request.passages) == 1:
                held.append(request)
            else:
                yield [request]
        if held:
            yield held

    def _belongs(self, held: list[PhysicalRequest], request: PhysicalRequest) -> bool:
        """Whether `request` is asked together with those that are held."""
        found, size = self._conformance, self._spec.batch_size
        if found is None or len(request.passages) != 1 or request.kind not in SCORED:
            return False
        if found.next_tokens == "no" or self._spec.loglikelihood == "echo":
            if not found.lists:
                return False
            if size is not None:
                return len(held) < size
        return len(held) < MOST_TOGETHER and same_context(held[0].passages[0], request.passages[0])

    async def _answer(self, batch: list[PhysicalRequest]) -> list[Answer]:
        request = batch[0]
        if request.kind is Kind.GENERATE:
            if not self._kinds_apart:
                return [await self._generate(request)]
            async with self._turn("generate"):
                return [await self._generate(request)]
        if len(batch) == 1 and (request.prompt_text is not None or len(request.passages) != 1):
            async with self._turn("echo"):
                return [await self._score(request)]
        return await self._score_group(batch)

    def _turn(self, kind: str) -> AbstractAsyncContextManager[None]:
        """Keep kinds apart on a server that scores next tokens rightly only without company."""
        return self._turns.of(kind) if self._kinds_apart else nullcontext()

    @property
    def _kinds_apart(self) -> bool:
        return self._conformance is not None and self._conformance.next_tokens == "alone"

    async def _generate(self, request: PhysicalRequest) -> Answer:
        assert request.sampling is not None
        path, body = generation_body(request, self._dialect or await self._find_dialect())
        hedge = request.sampling.seed is None
        read = read_native if path == NATIVE else read_generation
        reply = await self._client.post(path, body, read=read, named=path != NATIVE, hedge=hedge)
        if isinstance(reply, Broken):
            return _failure(request, reply)
        found = cast("Generated", reply.value)
        sent = len(request.prompt_ids or ())
        unread = max(0, sent - (found.prompt_tokens or sent))
        if unread and self._spec.truncation == "fail":
            message = (
                f"the server read {found.prompt_tokens} of {sent} prompt tokens: it cuts prompts without a word. "
                "Let it take more, or set `engine.max_length` to what it takes; `engine.truncation: truncate_left` "
                "counts such prompts as cut, and keeps their answers"
            )
            cut = Broken(boundary=Boundary.CONTEXT, message=message, retryable=False, attempts=reply.attempts)
            return _failure(request, cut)
        return Response(
            key=request.key,
            physical_key=request.physical_key,
            text=finish_text(self._spec.profile, found.text, request.sampling),
            token_ids=found.token_ids,
            finish_reason=found.finish_reason,
            prompt_tokens=found.prompt_tokens or sent,
            completion_tokens=found.completion_tokens,
            truncated_tokens=request.truncated_tokens + unread,
            seed=request.sampling.seed,
            seed_honoured=self._seed_honoured(request.sampling.seed),
            engine_id=self._engine_id(""),
            latency_s=reply.latency_s,
            created=time.time(),
        )

    async def _score(self, request: PhysicalRequest) -> Answer:
        if request.prompt_text is not None:
            start = context_length(request.request)
            outcome = await score_text_by_echo(
                self._client, request.prompt_text, start, max_tokens=self._max_tokens, extra=self._extra
            )
            return self._scored(request, [outcome])
        wanted = [p for p in request.passages if p.scored]
        outcomes = await asyncio.gather(*(self._score_passage(p) for p in wanted))
        return self._scored(request, outcomes)

    async def _score_passage(self, passage: Passage) -> Scored | Broken:
        if self._conformance is not None and self._conformance.method == "forced":
            async with (await self._slot_pool()).lease(passage.token_ids) as slot:
                return await score_by_forcing(self._client, passage, extra=self._extra | {"id_slot": slot})
        found = await score_by_echo(self._client, [passage], max_tokens=self._max_tokens, extra=self._extra)
        return found[0]

    async def _score_group(self, batch: list[PhysicalRequest]) -> list[Answer]:
        """Score requests with one passage each, of one context unless they are echoed."""
        passages = [r.passages[0] for r in batch]
        if await self._by_next_tokens(passages):
            async with self._turn(NEXT_TOKEN):
                found = await score_by_next_tokens(self._client, passages, extra=self._extra)
            bad = [one for one in found if isinstance(one, Broken)]
            # What was refused, or cannot be read, is asked by echo, which has been proven too.
            if all(one.retryable and not _misread(one) for one in bad):
                return [self._scored(r, [one], NEXT_TOKEN) for r, one in zip(batch, found, strict=True)]
            self._misread += any(map(_misread, bad))
        async with self._turn("echo"):
            if self._conformance is None or self._conformance.method == "forced":
                found = await asyncio.gather(*(self._score_passage(p) for p in passages))
            else:
                found = await self._echo(passages)
        return [self._scored(r, [one]) for r, one in zip(batch, found, strict=True)]

    async def _by_next_tokens(self, passages: Sequence[Passage]) -> bool:
        found, wanted = self._conformance, self._spec.loglikelihood
        if found is None or found.method != "echo" or wanted not in ("auto", NEXT_TOKEN):
            return False
        if found.next_tokens == "no" or self._misread >= MISREADINGS:
            return False
        if not all(p.scored and len(p.token_ids) > p.scored for p in passages):
            return False
        if wanted == "auto" and not cheaper_by_places(passages, found.costs):
            return False
        return found.next_tokens is not None or await self._try_next_tokens() != "no"

    async def _echo(self, passages: Sequence[Passage]) -> list[Scored | Broken]:
        assert self._conformance is not None
        size = (self._spec.batch_size or len(passages)) if self._conformance.lists else 1
        lists = [passages[i : i + size] for i in range(0, len(passages), size)]
        echoed = await asyncio.gather(
            *(score_by_echo(self._client, one, max_tokens=self._max_tokens, extra=self._extra) for one in lists)
        )
        return [one for some in echoed for one in some]

    def _scored(
        self, request: PhysicalRequest, outcomes: Sequence[Scored | Broken], method: str | None = None
    ) -> Answer:
        good: list[Scored] = []
        for outcome in outcomes:
            if isinstance(outcome, Broken):
                return _failure(request, outcome)
            good.append(outcome)
        logprobs = tuple(value for one in good for value in one.token_logprobs)
        if method is None:
            method = self._conformance.method if self._conformance else ""
        return Response(
            key=request.key,
            physical_key=request.physical_key,
            logprob=float(sum(one.logprob for one in good)),
            is_greedy=all(one.is_greedy for one in good),
            token_logprobs=logprobs,
            prompt_tokens=sum(one.prompt_tokens for one in good),
            truncated_tokens=request.truncated_tokens,
            engine_id=self._engine_id(method),
            latency_s=sum(one.latency_s for one in good),
            created=time.time(),
        )

    async def _slot_pool(self) -> SlotPool:
        async with self._probing:
            if self._slots is None:
                props = await self._client.get("/props") or {}
                self._slots = SlotPool(max(1, int(props.get("total_slots", 1))))
            return self._slots

    async def _find_dialect(self) -> Dialect:
        if self._dialect is None:
            self._dialect = await self._choose_dialect()
        return self._dialect

    async def _choose_dialect(self) -> Dialect:
        if self._spec.dialect != "auto":
            return Dialect(self._spec.dialect)
        return await find_dialect(self._client, self._read_info().engine)

    def _seed_honoured(self, seed: int | None) -> bool | None:
        # A strict OpenAI endpoint only promises to try.
        return None if seed is None or self._dialect is Dialect.OPENAI else True

    def _engine_id(self, method: str) -> str:
        info = self._read_info()
        known = self._ids.get(method)
        if known is None or (known[0] is not info and known[0] != info):
            known = self._ids[method] = (info, replace(info, method=method).id)
        return known[1]

    @property
    def _max_tokens(self) -> int:
        return self._conformance.max_tokens if self._conformance else 1

    @property
    def _extra(self) -> dict[str, Any]:
        return dict(self._spec.extra_body)


def _misread(broken: Broken) -> bool:
    """Whether an answer came with status 200 that says nothing usable."""
    return broken.boundary is Boundary.SERVER and broken.status is None


def _failure(request: PhysicalRequest, broken: Broken) -> Failure:
    return Failure(
        key=request.key,
        physical_key=request.physical_key,
        boundary=broken.boundary,
        message=broken.message,
        retryable=broken.retryable,
        attempts=broken.attempts,
        created=time.time(),
    )
