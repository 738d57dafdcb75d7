"""What each way of scoring costs a server, in tokens of prompt that it has to compute: pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

from proctor.infer.engine import Passage
from proctor.infer.next_tokens import Place, places

Way = Literal["echo", "cached-echo", "next-token", "forced"]
"""How a server is asked for log-likelihoods: `records.METHODS`."""
ECHO: Final = "echo"
CACHED_ECHO: Final = "cached-echo"
NEXT_TOKEN: Final = "next-token"
FORCED: Final = "forced"


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """What a request costs, in tokens of prompt that have to be computed."""

    request: float = 32.0
    """Besides its tokens: HTTP, scheduling, sampling."""
    block: int = 16
    """Tokens in a block of the server's prefix cache: only whole blocks are found again."""
    cached: bool = True
    """Whether the server keeps prefixes at all."""

    def kept(self, tokens: int) -> int:
        """How many of a prefix of so many tokens are found again once they have been computed."""
        return tokens // self.block * self.block if self.cached else 0


def context_tokens(passage: Passage) -> int:
    """Tokens before the scored ones."""
    return len(passage.token_ids) - passage.scored


def same_context(a: Passage, b: Passage) -> bool:
    """Whether two passages score what follows the same tokens."""
    end = context_tokens(a)
    return end == context_tokens(b) and a.token_ids[:end] == b.token_ids[:end]


def echo_cost(passages: Sequence[Passage], costs: Costs) -> float:
    """Echo computes every passage from its first token on."""
    return sum(len(p.token_ids) + costs.request for p in passages)


def ends_with_block(passage: Passage, costs: Costs) -> bool:
    """Whether the whole context is kept. The first scored token's value comes from the token before it, which is not
    computed anew then: echo on top of the cache does not say it."""
    context = context_tokens(passage)
    return costs.kept(context) == context > 0


def divided(passage: Passage) -> tuple[Passage, Passage | None]:
    """The first scored token, and the others after it, if there are any."""
    first = Passage(token_ids=passage.token_ids[: context_tokens(passage) + 1], scored=1)
    return first, Passage(token_ids=passage.token_ids, scored=passage.scored - 1) if passage.scored > 1 else None


def cached_echo_cost(passages: Sequence[Passage], costs: Costs, *, before: int = 0, next_tokens: bool = False) -> float:
    """The first passage computes the context, but for what the server has of it; the others find its whole blocks.

    `passages` have one context, of which the server has computed the first `before` tokens. Where that ends with a
    block, and with `next_tokens`, their first tokens are asked for by next tokens, before the others. Infinite where
    that is not possible, or nothing is kept.
    """
    context = context_tokens(passages[0])
    kept = costs.kept(context)
    if not kept or (kept == context and not next_tokens):
        return math.inf
    if kept < context:
        return echo_cost(passages, costs) - kept * (len(passages) - 1) - costs.kept(before)
    firsts, others = zip(*map(divided, passages), strict=True)
    rest = echo_cost([one for one in others if one is not None], costs)
    return places_cost(places(firsts), costs, before=before) + rest - kept * sum(one is not None for one in others)


def places_cost(found: Sequence[Place], costs: Costs, *, before: int = 0) -> float:
    """The first place computes the context, but for what the server has of it; the others find its whole blocks."""
    if not found:
        return 0.0
    context = len(found[0].prompt)
    kept = costs.kept(context)
    first = context - costs.kept(min(before, context - 1)) + costs.request
    return first + sum(len(p.prompt) - kept + costs.request for p in found[1:])


def by_cost(
    passages: Sequence[Passage], costs: Costs, *, before: int = 0, again: float = 0.0, next_tokens: bool = True
) -> list[Way]:
    """The ways that compute less than echo does, the cheapest first; echo is the last.

    `passages` have one context, of one token or more, of which the server has computed the first `before`. `again`:
    the share of passages of which cached echo does not say the values, as far as is known; they are asked for in the
    cheaper of the other ways then. `next_tokens`: whether that may be one of them.
    """
    echo = after = echo_cost(passages, costs)
    found: dict[Way, float] = {}
    longest = max(p.scored for p in passages)
    # A lower bound first: every place of the longest passage is a request of its own.
    if next_tokens and longest * costs.request <= echo and (longest == 1 or costs.cached):
        asked = places(passages)
        found[NEXT_TOKEN] = places_cost(asked, costs, before=before)
        after = min(echo, places_cost(asked, costs, before=context_tokens(passages[0])))
    found[CACHED_ECHO] = cached_echo_cost(passages, costs, before=before, next_tokens=next_tokens) + again * after
    return [*sorted((way for way in found if found[way] < echo), key=lambda way: found[way]), ECHO]
