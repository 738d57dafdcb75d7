"""Echo on top of what the server has computed before: vLLM's route for token ids in and out.

`/v1/completions` computes a prompt anew when it is to be echoed. `/inference/v1/generate` takes the engine's own
sampling parameters, one of which lets the prefix cache be read in spite of prompt log-probabilities. Passages of one
context then cost the context once, and what many questions have in front of them (their examples) hardly anything.

What comes back for the part that was not computed is memory that nobody wrote: any number, or none that JSON can say,
which the server refuses to. So an answer counts only if the server says how many tokens it had (`cached_tokens`,
with `--enable-prompt-tokens-details`), and if the scored ones lie behind them. The route itself needs
`--enable-scale-out`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, Final, cast

from proctor.infer.client import Broken, Client
from proctor.infer.costs import CACHED_ECHO, context_tokens
from proctor.infer.engine import Passage
from proctor.infer.loglikelihood import Scored, read_logprob
from proctor.infer.routing import Affinity

PATH: Final = "/inference/v1/generate"


async def score_by_cached_echo(
    client: Client, passages: Sequence[Passage], *, extra: dict[str, Any], near: Affinity
) -> list[Scored | Broken | None]:
    """Score passages of one context: one first, so that the server has the context when the others are asked.

    None: the server has computed scored tokens before, and does not say their values again; or not whether it has.
    """
    first, *others = passages
    found = [await _score(client, first, extra, near)]
    return found + await asyncio.gather(*(_score(client, passage, extra, near) for passage in others))


async def _score(client: Client, passage: Passage, extra: dict[str, Any], near: Affinity) -> Scored | Broken | None:
    reply = await client.post(
        PATH,
        cached_echo_body(passage) | extra,
        read=lambda value: read_cached_echo(value, passage),
        required=False,
        hedge=True,
        near=near,
    )
    if isinstance(reply, Broken):
        return reply
    if reply.value is None:
        return None
    values, greedy, cached = cast("tuple[tuple[float, ...], bool, int]", reply.value)
    return Scored(
        token_logprobs=values,
        is_greedy=greedy,
        prompt_tokens=len(passage.token_ids),
        cached_tokens=cached,
        latency_s=reply.latency_s,
        method=CACHED_ECHO,
    )


def cached_echo_body(passage: Passage) -> dict[str, Any]:
    """The request for a passage's log-probabilities."""
    return {
        "token_ids": passage.token_ids,
        "sampling_params": {
            "max_tokens": 1,
            "temperature": 0.0,
            "prompt_logprobs": 1,
            "skip_reading_prefix_cache": False,
            # No text: ids that nobody wrote are not to be looked up.
            "detokenize": False,
        },
        "stream": False,
    }


def read_cached_echo(value: dict[str, Any], passage: Passage) -> tuple[tuple[float, ...], bool, int] | None:
    """Log-probabilities, whether each token is the most probable one, and the tokens that were not computed anew.

    None if scored ones are among those, or the server does not count them. Raises one of `outcome.UNREADABLE` for an
    answer of another shape.
    """
    ids = passage.token_ids
    usage = value["usage"]
    if int(usage["prompt_tokens"]) != len(ids):
        raise ValueError(f"{usage['prompt_tokens']} prompt tokens of {len(ids)} were read")
    details = cast("dict[str, Any]", usage.get("prompt_tokens_details") or {})
    cached = details.get("cached_tokens")
    # The last token before the scored ones has to be computed too: the first value comes from it.
    if cached is None or int(cached) >= context_tokens(passage):
        return None
    # Counted from the end: what was not computed may be left out.
    places = cast("list[dict[str, dict[str, Any]]]", value["prompt_logprobs"])[-passage.scored :]
    values: list[float] = []
    greedy = True
    for token, place in zip(ids[-passage.scored :], places, strict=True):
        values.append(read_logprob(place[str(token)]["logprob"]))
        greedy = greedy and values[-1] >= max(float(one["logprob"]) for one in place.values())
    return tuple(values), greedy, int(cached)
