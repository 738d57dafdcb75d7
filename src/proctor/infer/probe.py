"""The conformance probe: which way of scoring is right on this server, by what it answers, not by what it accepts.

A few tokens are generated greedily with their log-probabilities. Scoring the prompt with those tokens appended must
give the same numbers at the same places. A server that ignores `echo`, or reports each value one position off
(and says 200), is thereby told from one that is right. Then: may nothing be generated beside the echo, and are
lists of prompts answered in order.

Whether the quicker ways are right, which some servers offer besides echo, `infer.canary` says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from proctor.errors import ProbeError
from proctor.infer.canary import Mixing, prefix_cache
from proctor.infer.client import Client
from proctor.infer.costs import CACHED_ECHO, ECHO, NEXT_TOKEN, Costs, Way
from proctor.infer.dialect import Dialect
from proctor.infer.engine import Passage
from proctor.infer.loglikelihood import (
    FORCING_BIAS,
    Scored,
    echo_body,
    echoed_values,
    ordered_choices,
    score_by_echo,
    score_by_forcing,
)
from proctor.infer.outcome import UNREADABLE
from proctor.infer.tokenizer import Tokenizer

PROMPT: Final = "The capital of France is Paris, the capital of Italy is Rome, and the capital of Spain"
STEPS: Final = 6
TOLERANCE: Final = 0.25
"""Mean difference in nats a token: generation and prefill differ by up to a tenth in bf16 or quantised."""
NOISE: Final = 0.02
"""Differences below this say nothing: a model that repeats itself gives neighbours nearly the same value."""

Method = Literal["echo", "forced"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Conformance:
    """How this server is to be asked for log-likelihoods."""

    method: Method
    max_tokens: int = 1
    """Beside the echo: 0 where the server can, else 1 token that is thrown away."""
    lists: bool = False
    """Lists of prompts are answered each, in order."""
    error: float = 0.0
    """Mean difference seen between scoring and generation, in nats a token."""
    sample: Sample | None = None
    """What was generated, where ids can be sent: what every other way has to reproduce."""
    next_tokens: Mixing | None = None
    """Whether chosen next tokens are scored rightly, and beside what; None: not tried, since nothing was cheaper so."""
    cached_echo: bool | None = None
    """Whether echo on top of the prefix cache is right; None: not tried, since nothing was cheaper so."""
    costs: Costs = field(default_factory=Costs)
    """What decides between the ways."""

    @property
    def tolerance(self) -> float:
        """How far another way may be from the echoed values, in nats a token."""
        return min(TOLERANCE, NOISE + 4 * self.error)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """Greedy continuation of the prompt: what scoring has to reproduce."""

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]

    @property
    def passage(self) -> Passage:
        return Passage(token_ids=self.prompt + self.tokens, scored=len(self.tokens))


async def probe(
    client: Client,
    *,
    dialect: Dialect,
    tokenizer: Tokenizer | None,
    wanted: Literal["auto"] | Way = "auto",
    extra: dict[str, Any] | None = None,
) -> Conformance:
    """Find a right way to score. Raises ProbeError with what was seen if there is none, or `wanted` is not one."""
    extra = extra or {}
    if tokenizer is None:
        return await _probe_text(client, extra)
    (ids,) = await tokenizer.encode([(PROMPT, False)])
    seen: list[str] = []
    forcing_first = dialect is Dialect.LLAMA_CPP
    for method in ("forced", "echo") if forcing_first else ("echo", "forced"):
        # The quicker ways stand on echo, which they have to agree with and which says what they cannot.
        if method != {"auto": method, NEXT_TOKEN: ECHO, CACHED_ECHO: ECHO}.get(wanted, wanted):
            continue
        found = await (_try_echo if method == "echo" else _try_forced)(client, tuple(ids), tokenizer, extra)
        if isinstance(found, Conformance):
            return found
        seen.append(f"{method}: {found}")
    raise refusal("; ".join(seen))


def refusal(seen: str) -> ProbeError:
    """The error of a server on which no way that is wanted is right."""
    return ProbeError(
        f"no way to measure log-likelihoods on this server is right. {seen}",
        hint="serve the model with vLLM or llama.cpp's own server, or use engine {type: lm_eval}; "
        "generative tasks are not affected",
    )


async def _try_echo(
    client: Client, ids: tuple[int, ...], tokenizer: Tokenizer, extra: dict[str, Any]
) -> Conformance | str:
    sample = await _generate(client, ids, tokenizer, extra)
    if isinstance(sample, str):
        return sample
    outcome: float | str = ""
    for max_tokens in (0, 1):
        outcome = await _echo_error(client, sample, max_tokens, extra)
        if isinstance(outcome, float):
            lists = await _lists_work(client, sample, max_tokens, extra)
            costs = await prefix_cache(client)
            return Conformance(
                method="echo", max_tokens=max_tokens, lists=lists, error=outcome, sample=sample, costs=costs
            )
    return str(outcome)


async def _generate(client: Client, ids: tuple[int, ...], tokenizer: Tokenizer, extra: dict[str, Any]) -> Sample | str:
    body = {
        "prompt": ids,
        "max_tokens": STEPS,
        "temperature": 0.0,
        "logprobs": 1,
        "stream": False,
        "return_token_ids": True,
    }
    value = await client.try_post("/v1/completions", body | extra)
    if value is None:
        body.pop("return_token_ids")
        value = await client.try_post("/v1/completions", body | extra)
    try:
        choice = ordered_choices(value or {})[0]
        logprobs = tuple(value for value in echoed_values(choice) if value is not None)
        tokens = choice.get("token_ids")
        if tokens is None:
            (tokens,) = await tokenizer.encode([(str(choice["text"]), False)])
    except UNREADABLE:
        return "the server gives no log-probabilities with a completion of token ids"
    # A stop token or a text that is tokenised otherwise ends the comparison, it does not spoil it.
    count = min(len(tokens), len(logprobs))
    if count == 0 or (choice.get("token_ids") is None and len(tokens) != len(logprobs)):
        return "the tokens of a generated text cannot be told, so the alignment of echo cannot be checked"
    return Sample(prompt=ids, tokens=tuple(int(t) for t in tokens[:count]), logprobs=logprobs[:count])


async def _echo_error(client: Client, sample: Sample, max_tokens: int, extra: dict[str, Any]) -> float | str:
    """The mean difference where echo is right, else what is wrong."""
    whole = sample.passage.token_ids
    value = await client.try_post("/v1/completions", echo_body([whole], max_tokens=max_tokens) | extra)
    try:
        got = echoed_values(ordered_choices(value or {})[0])
    except UNREADABLE:
        return f"echo with max_tokens {max_tokens} gives no log-probabilities"
    if len(got) < len(whole):
        return f"`echo` is ignored: {len(got)} log-probabilities came back for a prompt of {len(whole)} tokens"
    return alignment(got, sample)


def alignment(got: Sequence[float | None], sample: Sample) -> float | str:
    """The mean difference in place, in nats; or what is wrong, if another position fits or none does."""
    start, count = len(sample.prompt), len(sample.tokens)
    errors: dict[int, float] = {}
    for shift in (-1, 0, 1):
        pairs = [
            (value, sample.logprobs[i])
            for i in range(count)
            if start + i + shift < len(got) and (value := got[start + i + shift]) is not None
        ]
        if pairs:
            errors[shift] = sum(abs(a - b) for a, b in pairs) / len(pairs)
    best = min(errors, key=lambda s: (errors[s], abs(s)), default=0)
    in_place = errors.get(0, float("inf"))
    if best != 0 and errors[best] <= TOLERANCE and in_place > max(NOISE, 4 * errors[best]):
        return (
            f"echoed log-probabilities are off by one position ({best:+d}): "
            f"{errors[best]:.3f} nats from the generated ones there, {in_place:.3f} in place"
        )
    if in_place > TOLERANCE:
        return f"echoed log-probabilities differ from generated ones by {in_place:.3f} nats a token"
    return in_place


async def _lists_work(client: Client, sample: Sample, max_tokens: int, extra: dict[str, Any]) -> bool:
    whole = sample.passage
    shorter = Passage(token_ids=whole.token_ids[:-2], scored=1)
    together = await score_by_echo(client, [whole, shorter], max_tokens=max_tokens, extra=extra)
    alone = [(await score_by_echo(client, [p], max_tokens=max_tokens, extra=extra))[0] for p in (whole, shorter)]
    return all(
        isinstance(a, Scored)
        and isinstance(b, Scored)
        and abs(a.logprob - b.logprob) <= TOLERANCE * len(a.token_logprobs)
        for a, b in zip(together, alone, strict=True)
    )


async def _try_forced(
    client: Client, ids: tuple[int, ...], tokenizer: Tokenizer, extra: dict[str, Any]
) -> Conformance | str:
    """Greedy steps on llama.cpp's own route, the same tokens forced, and one other token, which must score less."""
    del tokenizer
    tokens: list[int] = []
    logprobs: list[float] = []
    other = 0
    for _ in range(3):
        body = {"prompt": [*ids, *tokens], "n_predict": 1, "n_probs": 2, "temperature": 0.0, "stream": False}
        value = await client.try_post("/completion", body | extra, named=False)
        try:
            step = (value or {})["completion_probabilities"][0]
            tokens.append(int(step["id"]))
            logprobs.append(float(step["logprob"]))
            other = int(step["top_logprobs"][1]["id"])
        except UNREADABLE:
            return "no /completion route with token probabilities, as llama.cpp's server has"
    sample = Sample(prompt=ids, tokens=tuple(tokens), logprobs=tuple(logprobs))
    forced = await score_by_forcing(client, sample.passage, extra=extra)
    unlikely = await score_by_forcing(client, Passage(token_ids=(*ids, *tokens[:-1], other), scored=1), extra=extra)
    if not isinstance(forced, Scored) or not isinstance(unlikely, Scored):
        return f"a logit bias of {FORCING_BIAS:.0f} does not force a token"
    error = sum(abs(a - b) for a, b in zip(forced.token_logprobs, logprobs, strict=True)) / len(logprobs)
    if error > TOLERANCE or not forced.is_greedy or unlikely.is_greedy:
        return f"forced log-probabilities differ from generated ones by {error:.3f} nats a token"
    if unlikely.logprob > logprobs[-1] + TOLERANCE:
        return "a forced token reports the probability after the bias"
    return Conformance(method="forced", error=error)


async def _probe_text(client: Client, extra: dict[str, Any]) -> Conformance:
    """Without a tokenizer: the same comparison over texts and the offsets that the server returns."""
    body = {"prompt": PROMPT, "max_tokens": STEPS, "temperature": 0.0, "logprobs": 1, "stream": False}
    value = await client.try_post("/v1/completions", body | extra)
    try:
        choice = ordered_choices(value or {})[0]
        generated = tuple(value for value in echoed_values(choice) if value is not None)
        whole = PROMPT + str(choice["text"])
        echoed = await client.try_post("/v1/completions", echo_body(whole, max_tokens=1) | extra)
        second = ordered_choices(echoed or {})[0]
        offsets = [int(o) for o in second["logprobs"]["text_offset"]]
        start = next(i for i, offset in enumerate(offsets) if offset >= len(PROMPT))
        got = echoed_values(second)
        sample = Sample(prompt=(0,) * start, tokens=(0,) * len(generated), logprobs=generated)
        outcome = alignment(got, sample)
    except (*UNREADABLE, StopIteration):
        outcome = "`echo` is ignored, or log-probabilities lack text offsets"
    if isinstance(outcome, float):
        return Conformance(method="echo", max_tokens=1, error=outcome)
    raise ProbeError(
        f"log-likelihoods cannot be measured on this server: {outcome}",
        hint="set `tokenizer:` of the model, or serve it with vLLM or llama.cpp's own server; "
        "generative tasks are not affected",
    )
