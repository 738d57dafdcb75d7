"""The engine over HTTP: an OpenAI-compatible server of any make, one or several of it."""

from __future__ import annotations

import time
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import replace
from types import TracebackType
from typing import Final, Self

from proctor.config.spec import OpenAIEngine as OpenAISpec
from proctor.infer.askers import Askers
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
from proctor.infer.engine import PhysicalRequest, Sampling
from proctor.infer.loglikelihood import Scored
from proctor.infer.probe import Conformance
from proctor.infer.profiles import finish_text
from proctor.infer.resolve import Resolver, TokenizerSource, context_length
from proctor.infer.same_tokenizer import check_same
from proctor.infer.scorer import Scorer
from proctor.infer.server import Backend, Load
from proctor.infer.tokenizer import LocalTokenizer
from proctor.records import Answer, Boundary, EngineInfo, Failure, Request, Response, quickly

_response: Final = quickly(Response)


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
        company: bool = False,
    ) -> None:
        """`company`: other processes ask the same servers; what is right only without company is not done then."""
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
        self._tokenizer_checked = False
        self._scorer = Scorer(
            self._client, spec, dialect=self._find_dialect, tokenizer=self._resolver.tokenizer, company=company
        )
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

    def allow(self, in_flight: int) -> None:
        """From now on each backend gets at most so many at a time, and never more than `max_in_flight` of the spec."""
        self._client.allow(in_flight)

    @property
    def info(self) -> EngineInfo:
        """What answers; `method` is filled in by the probe, before the first log-likelihood."""
        found, conformance = self._read_info(), self.conformance
        return found if conformance is None else replace(found, method=conformance.method)

    @property
    def resolves_alone(self) -> bool:
        """Whether `resolve` needs no server: the tokenizer is a local file."""
        return self._resolver.local

    @property
    def conformance(self) -> Conformance | None:
        """What the probe found; None before the first log-likelihood."""
        return self._scorer.conformance

    async def resolve(
        self, requests: Sequence[Request], keys: Sequence[str] | None = None
    ) -> list[PhysicalRequest | Failure]:
        return await self._resolver.resolve(requests, keys)

    async def prove(self) -> Conformance:
        """Run the conformance probe now, once. Raises ProbeError if no way to score is right on this server."""
        return await self._scorer.prove()

    async def run(self, requests: AsyncIterable[PhysicalRequest]) -> AsyncIterator[Answer]:
        await self._check_tokenizer(await self._find_dialect())
        self._client.tail(ending=False)
        askers = Askers(self._answer, self._client.wanted)
        async with aclosing(askers.run(self._batches(requests), dry=self._client.tail)) as found:
            async for answers in found:
                for answer in answers:
                    yield answer

    async def _batches(self, requests: AsyncIterable[PhysicalRequest]) -> AsyncIterator[list[PhysicalRequest]]:
        """Single requests, neighbours of one context together, or as many log-likelihoods as `batch_size` says."""
        held: list[PhysicalRequest] = []
        async for request in requests:
            scored = request.sampling is None
            if scored and self.conformance is None:
                await self.prove()
            alone = not scored or len(request.passages) != 1
            if held and (alone or not self._scorer.together([r.passages[0] for r in held], request.passages[0])):
                yield held
                held = []
            if alone:
                yield [request]
            else:
                held.append(request)
        if held:
            yield held

    def _answer(self, batch: list[PhysicalRequest]) -> Awaitable[list[Answer]]:
        request = batch[0]
        if request.sampling is None:
            return self._score(batch)
        generate = self._generate_in_turn if self._scorer.takes_turns else self._generate
        return generate(request, request.sampling)

    async def _generate_in_turn(self, request: PhysicalRequest, sampling: Sampling) -> list[Answer]:
        async with self._scorer.turn("generate"):
            return await self._generate(request, sampling)

    async def _score(self, batch: list[PhysicalRequest]) -> list[Answer]:
        request = batch[0]
        if len(batch) > 1 or len(request.passages) == 1:
            found = await self._scorer.score([r.passages[0] for r in batch])
            return [self._scored(r, [one]) for r, one in zip(batch, found, strict=True)]
        if request.prompt_text is not None:
            start = context_length(request.request)
            return [self._scored(request, [await self._scorer.score_text(request.prompt_text, start)])]
        return [self._scored(request, await self._scorer.score_windows(request.passages))]

    async def _generate(self, request: PhysicalRequest, sampling: Sampling) -> list[Answer]:
        path, body = generation_body(request, sampling, self._dialect or await self._find_dialect())
        native, seed = path == NATIVE, sampling.seed
        read = read_native if native else read_generation
        reply = await self._client.post(path, body, read=read, named=not native, hedge=seed is None)
        if isinstance(reply, Broken):
            return [_failure(request, reply)]
        found: Generated = reply.value
        sent = 0 if request.prompt_ids is None else len(request.prompt_ids)
        read_tokens = found.prompt_tokens or sent
        unread = sent - read_tokens if read_tokens < sent else 0
        if unread and self._spec.truncation == "fail":
            message = (
                f"the server read {found.prompt_tokens} of {sent} prompt tokens: it cuts prompts without a word. "
                "Let it take more, or set `engine.max_length` to what it takes; `engine.truncation: truncate_left` "
                "counts such prompts as cut, and keeps their answers"
            )
            cut = Broken(boundary=Boundary.CONTEXT, message=message, retryable=False, attempts=reply.attempts)
            return [_failure(request, cut)]
        answer = _response(
            key=request.key,
            physical_key=request.physical_key,
            text=finish_text(self._spec.profile, found.text, sampling),
            token_ids=found.token_ids,
            finish_reason=found.finish_reason,
            prompt_tokens=read_tokens,
            completion_tokens=found.completion_tokens,
            truncated_tokens=request.truncated_tokens + unread,
            seed=seed,
            seed_honoured=None if seed is None else self._honours_seeds,
            engine_id=self._engine_id(""),
            latency_s=reply.latency_s,
            created=time.time(),
        )
        return [answer]

    def _scored(self, request: PhysicalRequest, outcomes: Sequence[Scored | Broken]) -> Answer:
        good: list[Scored] = []
        for outcome in outcomes:
            if isinstance(outcome, Broken):
                return _failure(request, outcome)
            good.append(outcome)
        logprobs = tuple(value for one in good for value in one.token_logprobs)
        return _response(
            key=request.key,
            physical_key=request.physical_key,
            logprob=float(sum(one.logprob for one in good)),
            is_greedy=all(one.is_greedy for one in good),
            token_logprobs=logprobs,
            prompt_tokens=sum(one.prompt_tokens for one in good),
            truncated_tokens=request.truncated_tokens,
            engine_id=self._engine_id(good[0].method if good else self.info.method),
            latency_s=sum(one.latency_s for one in good),
            created=time.time(),
        )

    async def _find_dialect(self) -> Dialect:
        if self._dialect is None:
            self._dialect = await self._choose_dialect()
        return self._dialect

    async def _choose_dialect(self) -> Dialect:
        if self._spec.dialect != "auto":
            return Dialect(self._spec.dialect)
        return await find_dialect(self._client, self._read_info().engine)

    async def _check_tokenizer(self, dialect: Dialect) -> None:
        """Once, before anything is asked. Raises ModelError."""
        if self._tokenizer_checked:
            return
        tokenizer = await self._resolver.tokenizer()
        if isinstance(tokenizer, LocalTokenizer):
            await check_same(self._client, tokenizer, dialect)
        self._tokenizer_checked = True

    @property
    def _honours_seeds(self) -> bool | None:
        # A strict OpenAI endpoint only promises to try.
        return None if self._dialect is Dialect.OPENAI else True

    def _engine_id(self, method: str) -> str:
        info = self._read_info()
        known = self._ids.get(method)
        if known is None or (known[0] is not info and known[0] != info):
            known = self._ids[method] = (info, replace(info, method=method).id)
        return known[1]


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
