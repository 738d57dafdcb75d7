"""Numbers as people write them: 2_097_152, 100B, 1.5T."""

from __future__ import annotations

import math
import re
from typing import Final

_SUFFIX: Final = {"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_NUMBER: Final = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?")


def human_int(value: object) -> int:
    """A whole number from an int, a float without a fraction, or text such as `2_097_152`, `100B`, `1.5T`.

    Text is stripped, underscores are dropped, and a suffix K, M, B or T (either case) multiplies by 10^3,
    10^6, 10^9 or 10^12; with a suffix the product is rounded to the nearest whole number (eval-hive's rule).
    Raises ValueError for anything else, negative numbers included.
    """
    number = _parse(value)
    if number is None:
        raise ValueError("expected a whole number such as 2_097_152, 100B or 1.5T")
    if number < 0:
        raise ValueError("must not be negative")
    return number


def human_ints(value: object) -> object:
    """`human_int` for a single value, a tuple of them for a list; None stays None."""
    if value is None:
        return None
    if isinstance(value, list | tuple):
        return tuple(human_int(item) for item in value)  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
    return human_int(value)


def _parse(value: object) -> int | None:
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        return value
    if isinstance(value, float):
        return int(value) if value.is_integer() else None
    return _parse_text(value) if isinstance(value, str) else None


def _parse_text(text: str) -> int | None:
    cleaned = text.strip().replace("_", "")
    factor = _SUFFIX.get(cleaned[-1:].upper())
    digits = cleaned[:-1].strip() if factor else cleaned
    if not _NUMBER.fullmatch(digits):
        return None
    if factor:
        product = float(digits) * factor
        return round(product) if math.isfinite(product) else None
    if re.fullmatch(r"[+-]?\d+", digits):
        return int(digits)
    number = float(digits)
    return int(number) if number.is_integer() else None
