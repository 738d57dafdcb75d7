"""Whether a server scores rightly in the ways that are quicker than echo, seen by effect and beside the traffic that
it will have.

Servers answer 200 to fields that they ignore, and one version of vLLM returned -9999 to requests that wanted the most
probable tokens while others in the same batch wanted chosen ones. So the same places are asked while generations and
echoes are under way, and compared with what was generated and echoed alone. A server that is right only without such
company gets one kind of request at a time. Echo on top of the prefix cache has to be right in company.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from typing import Any, Final, Literal

from proctor.infer.cached_echo import score_by_cached_echo
from proctor.infer.client import Broken, Client
from proctor.infer.costs import Costs
from proctor.infer.engine import Passage
from proctor.infer.loglikelihood import Scored, ask_next, score_by_echo, score_by_next_tokens
from proctor.infer.next_tokens import Place
from proctor.infer.routing import Affinity

Mixing = Literal["no", "alone", "mixed"]
"""Chosen next tokens are scored: not rightly; rightly beside nothing else; rightly beside anything."""

ROUNDS: Final = 2
CACHED_ROUNDS: Final = 4
"""Of several servers any may be asked: so often until one has the context already."""
_NOISY: Final = 0.03
"""A tolerance from which on the server's numbers are those of bf16 or of quantised weights."""
_BLOCK: Final = re.compile(r'^\w+:cache_config_info\{[^}]*?\bblock_size="(\d+)"', re.MULTILINE)
_CACHING: Final = re.compile(r'^\w+:cache_config_info\{[^}]*?\benable_prefix_caching="(\w+)"', re.MULTILINE)


async def try_next_tokens(
    client: Client,
    sample: Passage,
    generated: Sequence[float],
    *,
    max_tokens: int,
    tolerance: float,
    extra: dict[str, Any],
) -> Mixing:
    """Ask for the places of a greedy continuation whose log-probabilities are known.

    `sample`: a prompt and the tokens that were generated; `generated`: their log-probabilities. `tolerance` in nats
    for each token. A difference of kind is one of answers: never an exception.
    """
    ids = sample.token_ids
    prompt = ids[: len(ids) - sample.scored]
    # Choices as a task has them: the likely one, and others that begin alike or differ at once.
    unlikely = tuple(dict.fromkeys(t for t in prompt[:3] if t != ids[len(prompt)]))
    choices = [sample, *(Passage(token_ids=(*prompt, t), scored=1) for t in unlikely)]
    if sample.scored > 1:
        choices.append(Passage(token_ids=(*ids[:-1], prompt[0]), scored=sample.scored))
    first = await ask_next(client, Place(prompt, (ids[len(prompt)],)), extra=extra)
    if isinstance(first, Broken):
        return "no"
    expected = await score_by_echo(client, choices[:1], max_tokens=max_tokens, extra=extra)
    for one in choices[1:]:
        expected += await score_by_echo(client, [one], max_tokens=max_tokens, extra=extra)
    if not _agree([Scored(token_logprobs=tuple(generated), is_greedy=True)], expected[:1], tolerance):
        return "no"

    async def once(*, beside: bool) -> bool:
        company = [_company(client, ids, prompt, max_tokens, extra)] if beside else []
        found, *others = await asyncio.gather(
            score_by_next_tokens(client, choices, extra=extra, near=Affinity()), *company
        )
        echoed = [one for other in others for one in other]
        return _agree(found, expected, tolerance) and _agree(echoed, expected[:1] * len(echoed), tolerance)

    if all([await once(beside=True) for _ in range(ROUNDS)]):
        return "mixed"
    return "alone" if all([await once(beside=False) for _ in range(ROUNDS)]) else "no"


async def try_cached_echo(
    client: Client, sample: Passage, *, block: int, max_tokens: int, tolerance: float, extra: dict[str, Any]
) -> bool:
    """Score choices after a context longer than a block of the prefix cache, by echo and on top of the cache.

    `sample`: a prompt and the tokens that were generated. `block`, in tokens; `tolerance` in nats for each token.
    True if at least one passage was scored on a prefix that the server had, and none otherwise than by echo.
    """
    generated = sample.token_ids[-sample.scored :]
    prompt = sample.token_ids[: -sample.scored]
    # The choices end within the context's last block, so that they are not found whole when they are asked again.
    context = (prompt * (block // len(prompt) + 2))[: block + 3]
    ends = [generated[-1:], generated[:1] + prompt[:2], prompt[1:3]]
    choices = [Passage(token_ids=context + end, scored=len(end)) for end in ends]
    for _ in range(CACHED_ROUNDS):
        near = Affinity()
        found = await score_by_cached_echo(client, choices[:1], extra=extra, near=near)
        if not isinstance(found[0], Scored):
            continue  # there is no such route, or it was bad luck: one request says little, and costs little
        others, company = await asyncio.gather(
            score_by_cached_echo(client, choices[1:], extra=extra, near=near),
            _company(client, sample.token_ids, prompt, max_tokens, extra),
        )
        pairs = [(one, c) for one, c in zip(found + others, choices, strict=True) if isinstance(one, Scored)]
        pairs += [(one, sample) for one in company]
        for one, passage in pairs:
            if not _agree([one], await score_by_echo(client, [passage], max_tokens=max_tokens, extra=extra), tolerance):
                return False
        if any(isinstance(one, Scored) and one.cached_tokens for one in others):
            return True
    return False


async def _company(
    client: Client, ids: tuple[int, ...], prompt: tuple[int, ...], max_tokens: int, extra: dict[str, Any]
) -> list[Scored | Broken]:
    """Generations and echoes, as runs have them; the echoes' values."""
    common: dict[str, Any] = {"prompt": prompt, "max_tokens": 4, "stream": False}
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 1.0, "top_k": 5, "seed": 1},
        {"temperature": 0.8, "top_p": 0.9, "seed": 2},
        {"temperature": 0.0, "logprobs": 3},
    ]
    passage = Passage(token_ids=ids, scored=len(ids) - len(prompt))
    echoes = [score_by_echo(client, [passage], max_tokens=max_tokens, extra=extra) for _ in range(2)]
    generations = [client.try_post("/v1/completions", common | kind | extra) for kind in kinds]
    values, _ = await asyncio.gather(asyncio.gather(*echoes), asyncio.gather(*generations))
    return [one for value in values for one in value]


def _agree(found: Sequence[Scored | Broken], expected: Sequence[Scored | Broken], tolerance: float) -> bool:
    """Whether every passage has the same log-probabilities, and is greedy where it was."""
    for a, b in zip(found, expected, strict=True):
        if not isinstance(a, Scored) or not isinstance(b, Scored):
            return False
        count = len(b.token_logprobs)
        if len(a.token_logprobs) != count:
            return False
        # Where numbers are noisy, two nearly equal tokens may change places.
        if tolerance < _NOISY and a.is_greedy is not b.is_greedy:
            return False
        difference = sum(abs(x - y) for x, y in zip(a.token_logprobs, b.token_logprobs, strict=True))
        if difference > tolerance * count:
            return False
    return True


async def prefix_cache(client: Client) -> Costs:
    """What the server's own metrics say of its prefix cache; the usual where they say nothing."""
    text = await client.get_text("/metrics") or ""
    block, caching = _BLOCK.search(text), _CACHING.search(text)
    usual = Costs()
    return Costs(
        request=usual.request,
        block=int(block.group(1)) if block and int(block.group(1)) else usual.block,
        cached=caching is None or caching.group(1) == "True",
    )
