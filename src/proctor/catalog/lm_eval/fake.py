"""Answers without a model: the same for the same question, different for others, plausible enough to be marked.

Standard library only.
"""

from __future__ import annotations

from proctor.records import Kind


def answer(kind: Kind, key: str) -> tuple[float, bool] | float | str:
    """What lm-eval gets from a model for a request of this logical key: (logprob, greedy), logprob, or text."""
    number = int(key[:13], 16)
    logprob = -0.01 - (number % 1_000_003) / 20_000
    if kind is Kind.LOGLIKELIHOOD:
        return logprob, number % 5 == 0
    if kind is Kind.ROLLING:
        return logprob * 10
    letter = "ABCD"[number % 4]
    return f" I add {number % 7} and {number % 11}.\nThe answer is ({letter}). #### {number % 10}"
