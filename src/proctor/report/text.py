"""Text that others chose (names, messages), made safe to print."""

from __future__ import annotations

import unicodedata
from typing import Final

_UNSAFE: Final = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
"""Control, format (direction overrides, zero width), surrogates, line and paragraph separators."""
_JOINERS: Final = frozenset("\u200c\u200d")
"""Part of ordinary words and emoji in many scripts."""
_NAMED: Final = {"\n": "\\n", "\r": "\\r", "\t": "\\t", "\x1b": "\\x1b"}


def shown(text: str) -> str:
    """One line that a terminal prints as it stands: what would move the cursor, hide or reorder is escaped."""
    if text.isprintable():
        return text
    return "".join(_escaped(c) if unicodedata.category(c) in _UNSAFE and c not in _JOINERS else c for c in text)


def encodable(text: str, encoding: str | None) -> str:
    """`text` with what `encoding` (None: UTF-8) cannot write as backslash escapes."""
    name = encoding or "utf-8"
    return text.encode(name, errors="backslashreplace").decode(name)


def count(n: int) -> str:
    """12,345."""
    return f"{n:,}"


def duration(seconds: float) -> str:
    """45 s, 3 min 20 s, 2 h 05 min, 3 d 4 h."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 86_400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86_400} d {whole % 86_400 // 3600} h"


def _escaped(c: str) -> str:
    named = _NAMED.get(c)
    if named is not None:
        return named
    return f"\\x{ord(c):02x}" if ord(c) < 256 else f"\\u{ord(c):04x}" if ord(c) < 65_536 else f"\\U{ord(c):08x}"
