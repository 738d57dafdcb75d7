"""The metrics of native tasks, and the figures that stand for a whole task.

Standard errors are computed as the figures are printed; intervals belong to `stats`.
"""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

HIGHER_IS_BETTER: Final = {
    "accuracy": True,
    "normalised_accuracy": True,
    "exact_match": True,
    "f1": True,
    "contains": True,
    "regex": True,
    "word_perplexity": False,
    "byte_perplexity": False,
    "bits_per_byte": False,
}

_PUNCTUATION: Final = str.maketrans("", "", string.punctuation)
_ARTICLES: Final = re.compile(r"\b(a|an|the)\b")


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One number for a whole task, with its standard error where there is one."""

    value: float | None
    stderr: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Ignoring:
    """Differences that do not count when texts are compared."""

    case: bool = False
    punctuation: bool = False
    whitespace: bool = False

    def normal(self, text: str) -> str:
        """The text without them. Punctuation is ASCII's `string.punctuation`, deleted as lm-evaluation-harness's
        exact_match does; whitespace is collapsed to single spaces and stripped at both ends."""
        if self.case:
            text = text.lower()
        if self.punctuation:
            text = text.translate(_PUNCTUATION)
        if self.whitespace:
            text = " ".join(text.split())
        return text


# --- one document ---------------------------------------------------------------------------------


def choose(logprobs: Sequence[float]) -> int:
    """Index of the greatest log-probability; the first of equals, as numpy.argmax in lm-evaluation-harness."""
    return max(range(len(logprobs)), key=lambda i: (logprobs[i], -i))


def choose_normalised(logprobs: Sequence[float], choices: Sequence[str]) -> int:
    """Index of the greatest log-probability per character of the choice's text.

    lm-evaluation-harness's acc_norm: the length is `len(choice)` in Unicode code points, without the
    delimiter before it. Choices are not empty.
    """
    return choose([value / len(choice) for value, choice in zip(logprobs, choices, strict=True)])


def exact_match(answer: str, references: Sequence[str], ignoring: Ignoring) -> float:
    """1 if the answer equals any reference after normalising both, else 0."""
    normal = ignoring.normal(answer)
    return float(any(normal == ignoring.normal(reference) for reference in references))


def contains(answer: str, references: Sequence[str], ignoring: Ignoring) -> float:
    """1 if any reference occurs in the answer after normalising both, else 0.

    A reference that normalises to nothing (all punctuation) occurs nowhere.
    """
    normal = ignoring.normal(answer)
    wanted = [ignoring.normal(reference) for reference in references]
    return float(any(w in normal for w in wanted if w))


def regex_found(answer: str, patterns: Sequence[str]) -> float:
    """1 if any pattern is found anywhere in the answer (`re.search`), else 0."""
    return float(any(re.search(pattern, answer) for pattern in patterns))


def token_f1(answer: str, references: Sequence[str]) -> float:
    """Greatest F1 over the references between the bags of words of answer and reference.

    SQuAD 1.1's definition (Rajpurkar et al. 2016, evaluate-v1.1.py): lower case, ASCII punctuation deleted,
    the articles a, an and the deleted, split at whitespace; F1 = 2PR/(P+R) over the words in common, counted
    with multiplicity; 0 without a word in common.
    """
    return max(_f1(_squad_words(answer), _squad_words(reference)) for reference in references)


def _squad_words(text: str) -> list[str]:
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def _f1(answer: list[str], reference: list[str]) -> float:
    common = sum((Counter(answer) & Counter(reference)).values())
    if common == 0:
        return 0.0
    precision, recall = common / len(answer), common / len(reference)
    return 2 * precision * recall / (precision + recall)


def count_words(text: str) -> int:
    """lm-evaluation-harness's count: the pieces between runs of whitespace, empty ones at the ends included."""
    return len(re.split(r"\s+", text))


def count_bytes(text: str) -> int:
    """Bytes of the UTF-8 form."""
    return len(text.encode("utf-8"))


# --- a whole task ---------------------------------------------------------------------------------


def mean_figure(values: Sequence[float]) -> Figure:
    """Arithmetic mean; standard error s/√n with the sample standard deviation s (divisor n-1).

    The formula of lm-evaluation-harness's mean_stderr. No value without documents, no error with one.
    """
    n = len(values)
    if n == 0:
        return Figure(value=None, stderr=None)
    mean = sum(values) / n
    if n == 1:
        return Figure(value=mean, stderr=None)
    return Figure(value=mean, stderr=math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1) / n))


def perplexity_figure(logprobs: Sequence[float], weights: Sequence[int]) -> Figure:
    """exp(-Σl/Σw): l natural-log probabilities of documents, w their words or bytes.

    The value is lm-evaluation-harness's weighted_perplexity. The standard error is the delta method's:
    exp(-r)·se(r) with se(r) of `ratio_stderr`. Infinite where it leaves the range of a double.
    """
    if not logprobs:
        return Figure(value=None, stderr=None)
    ratio, stderr = _ratio(logprobs, weights)
    value = exp(-ratio)
    return Figure(value=value, stderr=None if stderr is None or math.isinf(value) else value * stderr)


def bits_figure(logprobs: Sequence[float], weights: Sequence[int]) -> Figure:
    """-Σl/Σw/ln 2, in bits for each unit of w; standard error se(r)/ln 2 (see `ratio_stderr`)."""
    if not logprobs:
        return Figure(value=None, stderr=None)
    ratio, stderr = _ratio(logprobs, weights)
    return Figure(value=-ratio / math.log(2), stderr=None if stderr is None else stderr / math.log(2))


def ratio_stderr(values: Sequence[float], weights: Sequence[float]) -> float | None:
    """Standard error of r = Σv/Σw over sampled documents, by linearisation (the delta method):

    se(r) = √(n/(n-1) · Σ(v - r·w)²) / Σw   (Cochran, Sampling Techniques, 3rd ed., §2.11)

    Biased of order 1/n; None for fewer than two documents.
    """
    n = len(values)
    if n < 2:
        return None
    total = sum(weights)
    ratio = sum(values) / total
    residual = sum((v - ratio * w) ** 2 for v, w in zip(values, weights, strict=True))
    return math.sqrt(n / (n - 1) * residual) / total


def exp(x: float) -> float:
    """e^x, infinite instead of an overflow."""
    try:
        return math.exp(x)
    except OverflowError:
        return math.inf


def _ratio(values: Sequence[float], weights: Sequence[int]) -> tuple[float, float | None]:
    return sum(values) / sum(weights), ratio_stderr(values, weights)
