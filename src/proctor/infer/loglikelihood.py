"""Log-likelihood over HTTP, by the ways that servers offer.

- **echo**: `/v1/completions` gives back the prompt with a log-probability for each of its tokens. One request for
  each passage, or one list of prompts for several. It makes no use of the server's prefix cache.
- **next-token**: vLLM's `logprob_token_ids` gives the log-probabilities of chosen tokens after a prompt. One request
  for all single-token choices of a question; a request for each place of longer ones, on a context that the server
  has computed already (`infer.next_tokens`).
- **cached-echo**: echo that makes use of the prefix cache, on one more route of vLLM's (`infer.cached_echo`).
- **forced**: llama.cpp's `/completion` is asked for one token at a time, with a logit bias that forces the token to
  score; the log-probability it reports is the one before the bias. The server's prefix cache makes a step cheap.
  A token that ends inside a UTF-8 character comes back without log-probabilities: the server holds such text back
  until it is complete. It is looked up among the alternatives to another token.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, cast

from proctor.infer.client import Broken, Client, Reply
from proctor.infer.costs import ECHO, FORCED, NEXT_TOKEN, Way
from proctor.infer.engine import Passage
from proctor.infer.next_tokens import Next, Place, assemble, places
from proctor.infer.outcome import UNREADABLE
from proctor.infer.routing import Affinity
from proctor.records import Boundary

FORCING_BIAS: Final = 10_000.0
"""Added to one token's logit: far above any difference between logits."""
_ALTERNATIVES: Final = (1024, 10_000_000)
"""How many to ask for when a token is looked up: those that are likely, then, megabytes long, the whole vocabulary."""


_ID: Final = "token_id:"
_NO_LOGPROB: Final = -9_000.0
"""vLLM writes -9999 where it has none."""
_MOST: Final = 1e-3
"""A logarithm of a probability is not above 0, but for the rounding of a server's arithmetic."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """One passage's scored tokens."""

    token_logprobs: tuple[float, ...]
    is_greedy: bool
    """Every scored token is the most probable one at its place (ties count as greedy), as lm-eval's classes say."""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Of these, the ones that the server says it had computed before."""
    latency_s: float = 0.0
    method: Way = ECHO

    @property
    def logprob(self) -> float:
        """Natural logarithm, summed over the scored tokens."""
        return float(sum(self.token_logprobs))


def echo_body(prompts: Sequence[Sequence[int]] | str, *, max_tokens: int) -> dict[str, Any]:
    """The request that asks for prompt log-probabilities; a single prompt goes unwrapped."""
    prompt: object = prompts if isinstance(prompts, str) else prompts[0] if len(prompts) == 1 else list(prompts)
    return {
        "prompt": prompt,
        "max_tokens": max_tokens,
        "echo": True,
        "logprobs": 1,
        "temperature": 0.0,
        "stream": False,
    }


async def score_by_echo(
    client: Client, passages: Sequence[Passage], *, max_tokens: int, extra: dict[str, Any]
) -> list[Scored | Broken]:
    """Score passages with one request; a list that is refused as a whole, or answered with what makes no sense, is
    asked one by one.
    """

    def read(value: dict[str, Any]) -> list[tuple[tuple[float, ...], bool]]:
        choices = ordered_choices(value)
        if len(choices) != len(passages):
            raise ValueError(f"{len(choices)} answers to {len(passages)} prompts")
        return [_read_echo(choice, p, max_tokens) for choice, p in zip(choices, passages, strict=True)]

    body = echo_body([p.token_ids for p in passages], max_tokens=max_tokens) | extra
    reply = await client.post("/v1/completions", body, read=read, hedge=True)
    if isinstance(reply, Broken):
        if len(passages) == 1 or (reply.retryable and reply.status != 200):
            return [reply] * len(passages)
        singles = [await score_by_echo(client, [p], max_tokens=max_tokens, extra=extra) for p in passages]
        return [single[0] for single in singles]
    latency = reply.latency_s / len(passages)
    return [
        Scored(token_logprobs=values, is_greedy=greedy, prompt_tokens=len(p.token_ids), latency_s=latency)
        for (values, greedy), p in zip(reply.value, passages, strict=True)
    ]


async def score_text_by_echo(
    client: Client, text: str, start: int, *, max_tokens: int, extra: dict[str, Any]
) -> Scored | Broken:
    """Score the tokens of `text` that begin at or after character `start`, by the offsets that the server returns."""

    def read(value: dict[str, Any]) -> tuple[Scored, bool]:
        choice = ordered_choices(value)[0]
        offsets = [int(o) for o in choice["logprobs"]["text_offset"]]
        end = sum(offset < len(text) for offset in offsets) if max_tokens else len(offsets)
        first = next((i for i in range(end) if offsets[i] >= start), end)
        first = max(first, 1) if start == 0 else first
        values, greedy = _slice(choice["logprobs"], first, end)
        astray = bool(offsets[first:end]) and offsets[first] != start and start > 0
        return Scored(token_logprobs=values, is_greedy=greedy, prompt_tokens=end), astray

    reply = await client.post("/v1/completions", echo_body(text, max_tokens=max_tokens) | extra, read=read)
    if isinstance(reply, Broken):
        return reply
    scored, astray = cast("tuple[Scored, bool]", reply.value)
    if astray:
        message = "the server's tokens do not break where the context ends; a local tokenizer is needed"
        return Broken(boundary=Boundary.RENDER, message=message, retryable=False)
    return replace(scored, latency_s=reply.latency_s)


async def score_by_next_tokens(
    client: Client, passages: Sequence[Passage], *, extra: dict[str, Any], near: Affinity
) -> list[Scored | Broken]:
    """Score passages of one context: its own place first, so that the server has it when the others are asked."""
    first, *others = places(passages)
    asked = [first, *others]
    replies: list[tuple[Next, Reply] | Broken] = [await ask_next(client, first, extra=extra, near=near)]
    if isinstance(replies[0], Broken):
        return [replies[0]] * len(passages)
    replies += await asyncio.gather(*(ask_next(client, place, extra=extra, near=near) for place in others))
    found: dict[tuple[int, ...], dict[int, Next]] = {}
    broken: dict[tuple[int, ...], Broken] = {}
    latency = 0.0
    for place, reply in zip(asked, replies, strict=True):
        if isinstance(reply, Broken):
            broken[place.prompt] = reply
        else:
            found.setdefault(place.prompt, {}).update(dict.fromkeys(place.wanted, reply[0]))
            latency += reply[1].latency_s
    return [_assembled(p, found, broken, latency / len(passages)) for p in passages]


def _assembled(
    passage: Passage,
    found: dict[tuple[int, ...], dict[int, Next]],
    broken: dict[tuple[int, ...], Broken],
    latency_s: float,
) -> Scored | Broken:
    ids = passage.token_ids
    for at in range(len(ids) - passage.scored, len(ids)):
        if ids[:at] in broken:
            return broken[ids[:at]]
    values, greedy = assemble(passage, found)
    return Scored(
        token_logprobs=values, is_greedy=greedy, prompt_tokens=len(ids), latency_s=latency_s, method=NEXT_TOKEN
    )


def next_body(place: Place) -> dict[str, Any]:
    """The request for the log-probabilities of chosen tokens after a prompt."""
    return {
        "prompt": place.prompt,
        "max_tokens": 1,
        "temperature": 0.0,
        "logprobs": 1,
        "logprob_token_ids": place.wanted,
        "return_tokens_as_token_ids": True,
        # An end-of-text token must come back like any other.
        "ignore_eos": True,
        "stream": False,
    }


async def ask_next(
    client: Client, place: Place, *, extra: dict[str, Any], near: Affinity | None = None
) -> tuple[Next, Reply] | Broken:
    """Ask for one place."""
    reply = await client.post("/v1/completions", next_body(place) | extra, hedge=True, near=near)
    if isinstance(reply, Broken):
        return reply
    try:
        return read_next(reply.value, place), reply
    except UNREADABLE as error:
        return _unreadable(error, reply)


def read_next(value: dict[str, Any], place: Place) -> Next:
    """What the server says of a place. Raises KeyError, TypeError, ValueError or IndexError for anything less."""
    logprobs = ordered_choices(value)[0]["logprobs"]
    (token,), (top_logprob,), (tops,) = logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"]
    given = cast("dict[str, float]", tops)
    found = {wanted: float(given[f"{_ID}{wanted}"]) for wanted in place.wanted}
    top = int(str(token).removeprefix(_ID))
    for number in (*found.values(), float(top_logprob)):
        if not _NO_LOGPROB < number <= _MOST:
            raise ValueError(f"{number} is no log-probability")
    return Next(found, top, float(top_logprob))


async def score_by_forcing(
    client: Client, passage: Passage, *, extra: dict[str, Any], near: Affinity | None = None
) -> Scored | Broken:
    """Score one passage token by token, in order, so that each step finds the one before in the prefix cache.

    `near`: who has what comes before the passage.
    """
    ids = passage.token_ids
    near = near or Affinity()
    logprobs: list[float] = []
    greedy, latency = True, 0.0
    for at in range(len(ids) - passage.scored, len(ids)):
        step = await force(client, ids[:at], ids[at], extra=extra, near=near)
        if isinstance(step, Broken):
            return step
        logprob, top, seconds = step
        logprobs.append(logprob)
        greedy = greedy and top == ids[at]
        latency += seconds
    return Scored(
        token_logprobs=tuple(logprobs), is_greedy=greedy, prompt_tokens=len(ids), latency_s=latency, method=FORCED
    )


async def force(
    client: Client, prompt: Sequence[int], token: int, *, extra: dict[str, Any], near: Affinity | None = None
) -> tuple[float, int, float] | Broken:
    """(log-probability of `token` after `prompt`, the most probable token, seconds), from llama.cpp's own route."""
    reply = await _step(client, prompt, token, 1, extra, near)
    if isinstance(reply, Broken):
        return reply
    if "completion_probabilities" not in reply.value:
        return await _look_up(client, prompt, token, extra, near)
    try:
        step = reply.value["completion_probabilities"][0]
        if int(step["id"]) != token:
            raise ValueError(f"token {step['id']} came back where {token} was forced")
        return read_logprob(step["logprob"]), int(step["top_logprobs"][0]["id"]), reply.latency_s
    except UNREADABLE as error:
        return _unreadable(error, reply)


async def _step(
    client: Client, prompt: Sequence[int], token: int, alternatives: int, extra: dict[str, Any], near: Affinity | None
) -> Reply | Broken:
    """Ask for one token, which is to be `token`."""
    body = {
        "prompt": prompt,
        "n_predict": 1,
        "n_probs": alternatives,
        "temperature": 0.0,
        "logit_bias": [[token, FORCING_BIAS]],
        "cache_prompt": True,
        "stream": False,
    }
    return await client.post("/completion", body | extra, named=False, near=near)


async def _look_up(
    client: Client, prompt: Sequence[int], token: int, extra: dict[str, Any], near: Affinity | None
) -> tuple[float, int, float] | Broken:
    """As `force`, by asking for the letter `a` and reading `token` among the alternatives, which no bias touches."""
    letter = await client.post("/tokenize", {"content": "a"}, named=False)
    if isinstance(letter, Broken):
        return letter
    reply, latency = letter, letter.latency_s
    try:
        (other,) = cast("list[int]", letter.value["tokens"])
        for alternatives in _ALTERNATIVES:
            step = await _step(client, prompt, other, alternatives, extra, near)
            if isinstance(step, Broken):
                return step
            reply, latency = step, latency + step.latency_s
            tops = cast("list[dict[str, Any]]", step.value["completion_probabilities"][0]["top_logprobs"])
            found = next((read_logprob(top["logprob"]) for top in tops if int(top["id"]) == token), None)
            if found is not None:
                return found, int(tops[0]["id"]), latency
        raise ValueError(f"token {token} is not among all alternatives")
    except UNREADABLE as error:
        return _unreadable(error, reply)


def ordered_choices(value: dict[str, Any]) -> list[dict[str, Any]]:
    """The choices of a completion in the order of the prompts. Raises KeyError or TypeError if there are none."""
    choices: list[dict[str, Any]] = value["choices"]
    return choices if len(choices) < 2 else sorted(choices, key=lambda choice: int(choice["index"]))


def echoed_values(choice: dict[str, Any]) -> list[float | None]:
    """The log-probability of each token of a choice. Raises KeyError or TypeError if there are none."""
    logprobs = cast("dict[str, list[float | None]]", choice["logprobs"])
    return list(logprobs["token_logprobs"])


def _read_echo(choice: dict[str, Any], passage: Passage, max_tokens: int) -> tuple[tuple[float, ...], bool]:
    """The scored tokens' log-probabilities, and whether each is the most probable at its place."""
    length = len(passage.token_ids)
    logprobs = choice["logprobs"]
    got = len(logprobs["token_logprobs"])
    if not length <= got <= length + max_tokens:
        raise ValueError(f"{got} log-probabilities for a prompt of {length} tokens")
    return _slice(logprobs, length - passage.scored, length)


def _slice(logprobs: dict[str, Any], start: int, end: int) -> tuple[tuple[float, ...], bool]:
    values = tuple(read_logprob(v) for v in logprobs["token_logprobs"][start:end])
    tops = logprobs["top_logprobs"][start:end]
    return values, all(value >= max(top.values()) for value, top in zip(values, tops, strict=True))


def read_logprob(value: Any) -> float:
    """Raises TypeError or ValueError for what is no logarithm of a probability."""
    number = float(value)
    if not number <= _MOST:
        raise ValueError(f"{number} is no log-probability")
    return number


def _unreadable(error: Exception, reply: Reply) -> Broken:
    return Broken(
        boundary=Boundary.SERVER,
        message=f"the answer has no usable log-probabilities: {type(error).__name__}: {error}",
        retryable=True,
        attempts=reply.attempts,
    )
