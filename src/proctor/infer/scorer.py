"""How passages are scored on one kind of server: by the cheapest of the ways that were seen to be right on it."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import replace
from typing import Any, Final

from proctor.config.spec import OpenAIEngine as OpenAISpec
from proctor.infer.cached_echo import score_by_cached_echo
from proctor.infer.canary import Mixing, try_cached_echo, try_next_tokens
from proctor.infer.client import Broken, Client
from proctor.infer.costs import (
    CACHED_ECHO,
    ECHO,
    FORCED,
    NEXT_TOKEN,
    Way,
    by_cost,
    context_tokens,
    divided,
    ends_with_block,
    same_context,
)
from proctor.infer.dialect import Dialect
from proctor.infer.engine import Passage
from proctor.infer.loglikelihood import (
    Scored,
    score_by_echo,
    score_by_forcing,
    score_by_next_tokens,
    score_text_by_echo,
)
from proctor.infer.probe import Conformance, probe, refusal
from proctor.infer.routing import Affinity
from proctor.infer.slots import SlotPool, shared
from proctor.infer.tokenizer import Tokenizer
from proctor.infer.turns import Turns
from proctor.records import Boundary

MOST_TOGETHER: Final = 64
"""Passages of one context that are scored together: as many as a question has choices, and no flood."""
MISREADINGS: Final = 3
"""Answers that make no sense, after a canary that passed, until a way is not taken any more."""
_REMEMBERED: Final = 256
"""Passages of one size whose luck counts."""
_SUCCESSES: Final = 8
"""As many passages are taken to have been scored on the prefix cache before any was: what failed first was bad luck."""


class Scorer:
    """Proves the ways to score before it takes them. `dialect` and `tokenizer` are asked for when they are needed."""

    def __init__(
        self,
        client: Client,
        spec: OpenAISpec,
        *,
        dialect: Callable[[], Awaitable[Dialect]],
        tokenizer: Callable[[], Awaitable[Tokenizer | None]],
        company: bool = False,
    ) -> None:
        """`company`: others ask the same servers, and do not take turns with us."""
        self._client = client
        self._company = company
        self._spec = spec
        self._dialect = dialect
        self._tokenizer = tokenizer
        self._proving = asyncio.Lock()
        self._turns = Turns()
        self._slots: SlotPool | None = None
        self._before: tuple[int, ...] = ()
        """The context that was scored last: what the next one shares with it, the server has computed."""
        self._misread: dict[Way, int] = {NEXT_TOKEN: 0, CACHED_ECHO: 0}
        self._cached: dict[int, deque[bool]] = {}
        """Whether cached echo did not say the values of passages, by the binary digits of their lengths."""
        self.conformance: Conformance | None = None
        """What the probe found; None before the first log-likelihood."""

    async def prove(self) -> Conformance:
        """Run the conformance probe now, once. Raises ProbeError if no way that is wanted is right on this server."""
        async with self._proving:
            if self.conformance is None:
                self.conformance = await probe(
                    self._client,
                    dialect=await self._dialect(),
                    tokenizer=await self._tokenizer(),
                    wanted=self._spec.loglikelihood,
                    extra=self._extra,
                )
        match self._spec.loglikelihood:
            case "next-token" if await self._next_tokens() == "no":
                raise refusal(
                    "next-token: `logprob_token_ids` is ignored, or wrong"
                    + (" while others ask the same server" if self._company else "")
                )
            case "cached-echo" if not await self._cached_echo():
                raise refusal(
                    "cached-echo: the server does not give prompt log-probabilities and the number of cached tokens "
                    "by /inference/v1/generate, as vLLM does with --enable-scale-out and --enable-prompt-tokens-details"
                )
            case _:
                return self.conformance

    def together(self, held: Sequence[Passage], passage: Passage) -> bool:
        """Whether `passage` is scored together with those that are held."""
        found, size = self.conformance, self._spec.batch_size
        if found is None:
            return False
        if self._spec.loglikelihood == ECHO or (found.next_tokens == "no" and found.cached_echo is False):
            if not found.lists:
                return False
            if size is not None:
                return len(held) < size
        return len(held) < MOST_TOGETHER and same_context(held[0], passage)

    @property
    def takes_turns(self) -> bool:
        """Whether the server scores next tokens rightly only without company."""
        return self.conformance is not None and self.conformance.next_tokens == "alone"

    def turn(self, kind: str) -> AbstractAsyncContextManager[None]:
        """Keep kinds of requests apart where that is needed."""
        return self._turns.of(kind) if self.takes_turns else nullcontext()

    async def score(self, passages: Sequence[Passage]) -> list[Scored | Broken]:
        """Score passages, of one context unless they are echoed. What one way cannot say is asked by echo."""
        match await self._way(passages):
            case "next-token":
                return await self._score_next_tokens(passages)
            case "cached-echo":
                return await self._score_cached(passages)
            case "echo":
                async with self.turn(ECHO):
                    return await self._echo(passages)
            case "forced":
                return await asyncio.gather(*map(self._force, passages))

    async def score_windows(self, windows: Sequence[Passage]) -> list[Scored | Broken]:
        """Score the windows of one document, all in the same way."""
        assert self.conformance is not None
        wanted = [p for p in windows if p.scored]
        if self.conformance.method == FORCED:
            return await asyncio.gather(*map(self._force, wanted))
        async with self.turn(ECHO):
            found = await asyncio.gather(*(self._echo([p]) for p in wanted))
        return [one for (one,) in found]

    async def score_text(self, text: str, start: int) -> Scored | Broken:
        """Score the tokens of `text` from character `start` on, where only the server can tokenise."""
        assert self.conformance is not None
        async with self.turn(ECHO):
            return await score_text_by_echo(
                self._client, text, start, max_tokens=self.conformance.max_tokens, extra=self._extra
            )

    async def _way(self, passages: Sequence[Passage]) -> Way:
        """The cheapest way that is right."""
        found, wanted = self.conformance, self._spec.loglikelihood
        assert found is not None
        if found.method == FORCED:
            return FORCED
        if wanted == ECHO or not all(p.scored and context_tokens(p) for p in passages):
            return ECHO
        if wanted == NEXT_TOKEN:
            return NEXT_TOKEN if await self._works(NEXT_TOKEN) else ECHO
        first = passages[0]
        context = first.token_ids[: context_tokens(first)]
        before, self._before = shared(self._before, context), context
        luck = self._luck(first)
        again = sum(luck) / (len(luck) + _SUCCESSES)
        next_tokens = wanted == "auto" and found.next_tokens != "no"
        for way in by_cost(passages, found.costs, before=before, again=again, next_tokens=next_tokens):
            if way == ECHO or (wanted in ("auto", way) and await self._works(way)):
                if way == CACHED_ECHO and ends_with_block(first, found.costs) and not await self._works(NEXT_TOKEN):
                    continue
                return way
        return ECHO

    async def _works(self, way: Way) -> bool:
        if self._misread[way] >= MISREADINGS:
            return False
        return await self._next_tokens() != "no" if way == NEXT_TOKEN else await self._cached_echo()

    async def _next_tokens(self) -> Mixing:
        """Run the canary now, once."""
        async with self._proving:
            found = self.conformance
            assert found is not None
            if found.next_tokens is None:
                mixing: Mixing = "no"
                if found.sample is not None and found.method == ECHO:
                    mixing = await try_next_tokens(
                        self._client,
                        found.sample.passage,
                        found.sample.logprobs,
                        max_tokens=found.max_tokens,
                        tolerance=found.tolerance,
                        extra=self._extra,
                    )
                if mixing == "alone" and self._company:
                    mixing = "no"
                found = self.conformance = replace(found, next_tokens=mixing)
            assert found.next_tokens is not None
            return found.next_tokens

    async def _cached_echo(self) -> bool:
        """Run the canary now, once."""
        async with self._proving:
            found = self.conformance
            assert found is not None
            if found.cached_echo is None:
                right = False
                if found.sample is not None and found.method == ECHO:
                    right = await try_cached_echo(
                        self._client,
                        found.sample.passage,
                        block=found.costs.block,
                        max_tokens=found.max_tokens,
                        tolerance=found.tolerance,
                        extra=self._extra,
                    )
                found = self.conformance = replace(found, cached_echo=right)
            return bool(found.cached_echo)

    async def _score_next_tokens(
        self, passages: Sequence[Passage], near: Affinity | None = None
    ) -> list[Scored | Broken]:
        async with self.turn(NEXT_TOKEN):
            found = await score_by_next_tokens(self._client, passages, extra=self._extra, near=near or Affinity())
        bad = [one for one in found if isinstance(one, Broken)]
        # What was refused, or cannot be read, is asked by echo, which has been proven too.
        if all(one.retryable and not _misread(one) for one in bad):
            return found
        self._misread[NEXT_TOKEN] += any(map(_misread, bad))
        async with self.turn(ECHO):
            return await self._echo(passages)

    async def _score_cached(self, passages: Sequence[Passage], near: Affinity | None = None) -> list[Scored | Broken]:
        """Score passages on top of their context, or of a token more each; the server that is `near` has that then."""
        assert self.conformance is not None
        if near is None:
            near = Affinity()
            if ends_with_block(passages[0], self.conformance.costs):
                return await self._score_divided(passages, near)
        async with self.turn(ECHO):
            found = await score_by_cached_echo(self._client, passages, extra=self._extra, near=near)
        missing = [i for i, one in enumerate(found) if _unsaid(one)]
        for i, passage in enumerate(passages):
            self._luck(passage).append(i in missing)
        self._misread[CACHED_ECHO] += any(isinstance(one, Broken) and one.status == 200 for one in found)
        if missing:
            said = await self._score_unsaid([passages[i] for i in missing], near)
            for i, one in zip(missing, said, strict=True):
                found[i] = one
        return [one for one in found if one is not None]

    async def _score_divided(self, passages: Sequence[Passage], near: Affinity) -> list[Scored | Broken]:
        """Score passages whose context ends with a block: their first tokens as next tokens, the others behind them."""
        parts = [divided(passage) for passage in passages]
        firsts = await self._score_next_tokens([first for first, _ in parts], near)
        others = [other for _, other in parts if other is not None]
        said = iter(await self._score_cached(others, near) if others else [])
        return [
            first if other is None else _joined(first, next(said))
            for first, (_, other) in zip(firsts, parts, strict=True)
        ]

    async def _score_unsaid(self, passages: Sequence[Passage], near: Affinity) -> list[Scored | Broken]:
        """Score what cached echo did not say, by the cheaper of the other ways: whoever is `near` has the context."""
        assert self.conformance is not None
        ways = by_cost(passages, self.conformance.costs, before=context_tokens(passages[0]))
        if self._spec.loglikelihood == "auto" and NEXT_TOKEN in ways and await self._works(NEXT_TOKEN):
            return await self._score_next_tokens(passages, near)
        async with self.turn(ECHO):
            return await self._echo(passages)

    def _luck(self, passage: Passage) -> deque[bool]:
        return self._cached.setdefault(len(passage.token_ids).bit_length(), deque(maxlen=_REMEMBERED))

    async def _echo(self, passages: Sequence[Passage]) -> list[Scored | Broken]:
        assert self.conformance is not None
        size = (self._spec.batch_size or len(passages)) if self.conformance.lists else 1
        lists = [passages[i : i + size] for i in range(0, len(passages), size)]
        max_tokens = self.conformance.max_tokens
        echoed = await asyncio.gather(
            *(score_by_echo(self._client, one, max_tokens=max_tokens, extra=self._extra) for one in lists)
        )
        return [one for some in echoed for one in some]

    async def _force(self, passage: Passage) -> Scored | Broken:
        async with (await self._slot_pool()).lease(passage.token_ids) as slot:
            extra = self._extra | {"id_slot": slot.number}
            return await score_by_forcing(self._client, passage, extra=extra, near=slot.near)

    async def _slot_pool(self) -> SlotPool:
        async with self._proving:
            if self._slots is None:
                props = await self._client.get("/props") or {}
                self._slots = SlotPool(max(1, int(props.get("total_slots", 1))), max(1, len(self._client.load())))
            return self._slots

    @property
    def _extra(self) -> dict[str, Any]:
        return dict(self._spec.extra_body)


def _joined(first: Scored | Broken, other: Scored | Broken) -> Scored | Broken:
    """What was said of a passage's first token and of the others, together; or what went wrong with either."""
    if isinstance(first, Broken):
        return first
    if isinstance(other, Broken):
        return other
    return replace(
        other,
        token_logprobs=first.token_logprobs + other.token_logprobs,
        is_greedy=first.is_greedy and other.is_greedy,
        latency_s=first.latency_s + other.latency_s,
    )


def _misread(broken: Broken) -> bool:
    """Whether an answer came with status 200 that says nothing usable."""
    return broken.boundary is Boundary.SERVER and broken.status is None


def _unsaid(one: Scored | Broken | None) -> bool:
    """Whether the server answered, and not what was asked: no other attempt of the same kind would help."""
    return one is None or (isinstance(one, Broken) and one.status is not None)
