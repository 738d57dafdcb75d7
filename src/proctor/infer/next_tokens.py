"""Which next tokens to ask for, so that passages that share a context are scored by short requests: pure.

A passage's log-probability is a sum over places, and a place is a prompt and the token that follows it. Passages
with one context share its places: all first tokens of a question's choices are one request, and so is every later
place that two choices reach by the same tokens. What remains costs little on a server that keeps the computed
prefix: single-token choices are one request instead of k, and longer ones a request for each place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from proctor.infer.engine import Passage

MOST_IDS: Final = 128
"""vLLM returns the log-probabilities of so many chosen tokens with one request."""


@dataclass(frozen=True, slots=True)
class Place:
    """A prompt, and the tokens whose log-probabilities after it are wanted."""

    prompt: tuple[int, ...]
    wanted: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Next:
    """What a server says of the token after one prompt."""

    logprobs: Mapping[int, float]
    """Natural logarithms of the wanted tokens' probabilities."""
    top: int
    """The most probable token."""
    top_logprob: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """What a request costs, in tokens of prompt that have to be computed."""

    request: float = 32.0
    """Besides its tokens: HTTP, scheduling, sampling."""
    block: int = 16
    """Tokens in a block of the server's prefix cache: only whole blocks are found again."""
    cached: bool = True
    """Whether the server keeps prefixes at all."""


def places(passages: Sequence[Passage]) -> list[Place]:
    """The distinct places of all passages, the shortest prompt first, none with more than `MOST_IDS` wanted tokens."""
    wanted: dict[tuple[int, ...], dict[int, None]] = {}
    for passage in passages:
        ids = passage.token_ids
        for at in range(len(ids) - passage.scored, len(ids)):
            wanted.setdefault(ids[:at], {})[ids[at]] = None
    found: list[Place] = []
    for prompt in sorted(wanted, key=len):
        tokens = tuple(wanted[prompt])
        found += [Place(prompt, tokens[i : i + MOST_IDS]) for i in range(0, len(tokens), MOST_IDS)]
    return found


def echo_cost(passages: Sequence[Passage], costs: Costs) -> float:
    """Echo computes every passage from its first token on."""
    return sum(len(p.token_ids) + costs.request for p in passages)


def places_cost(found: Sequence[Place], costs: Costs) -> float:
    """The first place computes the context; the others find its whole blocks in the prefix cache."""
    if not found:
        return 0.0
    context = len(found[0].prompt)
    kept = context // costs.block * costs.block if costs.cached else 0
    return context + costs.request + sum(len(p.prompt) - kept + costs.request for p in found[1:])


def cheaper_by_places(passages: Sequence[Passage], costs: Costs) -> bool:
    """Whether asking for next tokens costs less than echoing every passage."""
    longest = max((p.scored for p in passages), default=0)
    if longest > 1 and not costs.cached:
        return False
    # A lower bound first: every place of the longest passage is a request of its own.
    if longest * costs.request > echo_cost(passages, costs):
        return False
    return places_cost(places(passages), costs) < echo_cost(passages, costs)


def same_context(a: Passage, b: Passage) -> bool:
    """Whether two passages score what follows the same tokens."""
    end = len(a.token_ids) - a.scored
    return end == len(b.token_ids) - b.scored and a.token_ids[:end] == b.token_ids[:end]


def assemble(passage: Passage, answers: Mapping[tuple[int, ...], Mapping[int, Next]]) -> tuple[tuple[float, ...], bool]:
    """Log-probabilities of a passage's scored tokens, and whether each is the most probable at its place.

    `answers`: by prompt and wanted token. Ties count as most probable, as with echo. Raises KeyError for a place
    that was not answered.
    """
    ids = passage.token_ids
    values: list[float] = []
    greedy = True
    for at in range(len(ids) - passage.scored, len(ids)):
        found = answers[ids[:at]][ids[at]]
        value = found.logprobs[ids[at]]
        values.append(value)
        greedy = greedy and (found.top == ids[at] or value >= found.top_logprob)
    return tuple(values), greedy
