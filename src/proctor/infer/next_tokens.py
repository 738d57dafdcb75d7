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
