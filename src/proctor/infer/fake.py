"""The engine for `engine: {type: fake}`: answers from a hash of the question, without a server."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterable, AsyncIterator, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any, Self, cast

from proctor.config.spec import FakeEngine as FakeSpec
from proctor.infer.engine import Passage, PhysicalRequest
from proctor.infer.fake_model import END, FakeModel, decode, encode
from proctor.infer.profiles import generation_key, passages_key, sample_seed
from proctor.infer.profiles_sampling import resolve_generation
from proctor.records import Answer, Boundary, EngineInfo, Failure, Kind, Request, Response, canonical_json

RUN_SEED = 1234
CONCURRENCY = 64


class FakeEngine:
    """Implements `infer.engine.Engine` over `FakeModel`; byte tokens, no window, local-completions' sampling habits."""

    def __init__(self, spec: FakeSpec | None = None, *, weights: str = "fake") -> None:
        self._spec = spec or FakeSpec()
        self._model = FakeModel(weights)
        self._info = EngineInfo(engine="fake", version="1", dtype="none", hardware="none", method="fake")
        self.asked: list[str] = []
        """Physical keys in the order in which they were taken."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    @property
    def info(self) -> EngineInfo:
        return self._info

    @property
    def resolves_alone(self) -> bool:
        return True

    async def resolve(
        self, requests: Sequence[Request], keys: Sequence[str] | None = None
    ) -> list[PhysicalRequest | Failure]:
        return [self._resolve(request) for request in requests]

    async def run(self, requests: AsyncIterable[PhysicalRequest]) -> AsyncIterator[Answer]:
        waiting: set[asyncio.Task[Answer]] = set()
        try:
            async for request in requests:
                self.asked.append(request.physical_key)
                if not self._spec.latency_s:
                    # Nothing here waits: the others on the loop get their turn.
                    await asyncio.sleep(0)
                    yield self._answer(request)
                    continue
                waiting.add(asyncio.create_task(self._answer_later(request)))
                if len(waiting) >= CONCURRENCY:
                    done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                    for task in done:
                        yield task.result()
            for task in asyncio.as_completed(waiting):
                yield await task
        finally:
            for task in waiting:
                task.cancel()

    def _resolve(self, request: Request) -> PhysicalRequest | Failure:
        key = request.key
        text = request.text
        if request.messages:
            text = canonical_json([[m.role, m.content] for m in request.messages]) + request.template_arguments
        try:
            ids = tuple(encode(text))
            scored = tuple(encode(request.continuation or "")) if request.kind is Kind.LOGLIKELIHOOD else ids
        except UnicodeEncodeError as error:
            return Failure(key=key, boundary=Boundary.RENDER, message=str(error), retryable=False, created=time.time())
        if request.kind is Kind.GENERATE:
            return self._resolve_generation(request, key, ids)
        context = ids if request.kind is Kind.LOGLIKELIHOOD and ids else (END,)
        passages = (Passage(token_ids=context + scored, scored=len(scored)),)
        return PhysicalRequest(
            key=key,
            physical_key=passages_key(request.kind, passages),
            kind=request.kind,
            request=request,
            passages=passages,
        )

    def _resolve_generation(self, request: Request, key: str, ids: tuple[int, ...]) -> PhysicalRequest | Failure:
        try:
            raw = cast("dict[str, Any]", json.loads(request.arguments))
            found = resolve_generation("local-completions", raw, default_length=256, eos="</s>", defaults={})
        except ValueError as error:
            return Failure(key=key, boundary=Boundary.RENDER, message=str(error), retryable=False, created=time.time())
        sampling, sample = found.sampling, None
        if sampling.temperature > 0:
            sample = (request.replicate, request.sample_index)
            seed = sample_seed(RUN_SEED, request.replicate, key, request.sample_index)
            sampling = replace(sampling, seed=seed)
        return PhysicalRequest(
            key=key,
            physical_key=generation_key(ids, sampling, sample=sample),
            kind=request.kind,
            request=request,
            prompt_ids=ids,
            sampling=sampling,
        )

    async def _answer_later(self, request: PhysicalRequest) -> Answer:
        await asyncio.sleep(self._spec.latency_s)
        return self._answer(request)

    def _answer(self, request: PhysicalRequest) -> Response:
        answer = Response(
            key=request.key,
            physical_key=request.physical_key,
            engine_id=self._info.id,
            latency_s=self._spec.latency_s,
            created=time.time(),
        )
        if request.kind is not Kind.GENERATE:
            passage = request.passages[0]
            values, tops = self._model.score(passage.token_ids)
            scored = values[len(values) - passage.scored :]
            greedy = scored == tops[len(tops) - passage.scored :]
            return replace(
                answer,
                logprob=float(sum(scored)),
                is_greedy=greedy,
                token_logprobs=tuple(scored),
                prompt_tokens=len(passage.token_ids),
            )
        assert request.sampling is not None
        assert request.prompt_ids is not None
        sampling = request.sampling
        drawn = f"{sampling.temperature}:{sampling.seed}" if sampling.seed is not None else ""
        ids, _, ended = self._model.generate(request.prompt_ids, sampling.max_tokens, drawn)
        text = decode(ids)
        cuts = [at for stop in sampling.stop if (at := text.find(stop)) >= 0]
        return replace(
            answer,
            text=text[: min(cuts)] if cuts else text,
            token_ids=tuple(ids),
            finish_reason="stop" if cuts or ended else "length",
            prompt_tokens=len(request.prompt_ids),
            completion_tokens=len(ids),
            seed=sampling.seed,
            seed_honoured=None if sampling.seed is None else True,
        )
