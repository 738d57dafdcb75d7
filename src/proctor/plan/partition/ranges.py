"""Which documents of a dataset a `test_range` chooses: OpenCompass's notation, without `eval`.

Nothing or '' means all. A number of 1 or more is a random sample of that size, shuffled by a generator seeded
with the size; a number between 0 and 1 is that share of the documents, sampled likewise; a number ≤ 0 or ≥ the
total means all. A text is one or more Python slices in brackets, applied one after the other.

Two things that OpenCompass cannot run have a meaning here. A sample may be sliced further: `1000[0: 100]` is the
first hundred, by position, of the sample of 1,000 (splitting a sampled dataset writes such a text). A single
position, `[5]`, is that one document.
"""

from __future__ import annotations

import random
import re
from typing import Final

import numpy as np
from numpy.typing import NDArray

from proctor.errors import ConfigError

TestRange = int | float | str | None

_SAMPLE: Final = re.compile(r"\s*(-?\d+(?:\.\d+)?(?:e-?\d+)?)(?=\s*\[|\s*$)")
_BRACKET: Final = re.compile(r"\s*\[\s*(-?\d+)?\s*(?:(:)\s*(-?\d+)?\s*(?::\s*(-?\d+)?\s*)?)?\]\s*")
_HINT: Final = "write a count, a share such as 0.1, or slices such as [:100] or [10:20:2]"


def chosen(test_range: TestRange, total: int) -> NDArray[np.int64]:
    """The chosen documents of `total`, in the order in which they are asked. Raises ConfigError."""
    if test_range is None:
        return np.arange(total, dtype=np.int64)
    if not isinstance(test_range, str):
        return _sample(test_range, total)
    text = test_range
    documents = np.arange(total, dtype=np.int64)
    if number := _SAMPLE.match(text):
        documents = _sample(int(number[1]) if number[1].lstrip("-").isdigit() else float(number[1]), total)
        text = text[number.end() :]
    while text.strip():
        bracket = _BRACKET.match(text)
        if bracket is None:
            raise ConfigError(f"test range {test_range!r} is not understood at {text!r}", hint=_HINT)
        documents = _sliced(documents, bracket, test_range)
        text = text[bracket.end() :]
    return documents


def actual_size(test_range: TestRange, total: int) -> int:
    """How many of `total` documents are chosen. Raises ConfigError."""
    return len(chosen(test_range, total))


def part_range(test_range: TestRange, start: int, stop: int, *, space: bool) -> str:
    """The text that chooses positions `start`..`stop` - 1 of what `test_range` chooses.

    `space`: one after the colon, as the size strategy writes it and the workers strategy does not.
    """
    whole = "" if test_range is None else str(test_range)
    return f"{whole}[{start}:{' ' if space else ''}{stop}]"


def _sample(size: float, total: int) -> NDArray[np.int64]:
    documents = list(range(total))
    if size <= 0 or size >= total:
        return np.array(documents, dtype=np.int64)
    count = int(size * total) if size < 1 else size
    random.Random(count).shuffle(documents)
    return np.array(documents[: int(count)], dtype=np.int64)


def _sliced(documents: NDArray[np.int64], bracket: re.Match[str], text: str) -> NDArray[np.int64]:
    first, colon, last, step = bracket.groups()
    numbers = [None if n is None else int(n) for n in (first, last, step)]
    if colon:
        if numbers[2] == 0:
            raise ConfigError(f"test range {text!r} has a step of 0", hint=_HINT)
        return documents[slice(*numbers)]
    position = numbers[0]
    if position is None or not -len(documents) <= position < len(documents):
        raise ConfigError(f"test range {text!r} names none of {len(documents)} documents", hint=_HINT)
    return documents[[position]]
