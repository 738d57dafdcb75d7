"""Names as users write them, and the directory names that stand for them."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from typing import Final

_PLAIN: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
_SLUGGED: Final = re.compile(r".*-[0-9a-f]{16}", re.DOTALL)


def slug(text: str) -> str:
    """A directory name for any text: at most 63 characters of [a-z0-9._-], readable where it can be.

    A text that is such a name already stands for itself; everything else gets 64 bits of its SHA-256
    appended, and a plain name that looks as if it had one gets one too, so that no two texts share a slug
    (also where the file system folds case).
    """
    if _PLAIN.fullmatch(text) and not _SLUGGED.fullmatch(text):
        return text
    ascii_text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode("ascii").lower()
    readable = re.sub(r"[^a-z0-9]+", "-", ascii_text).strip("-")[:40].strip("-")
    mark = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
    return f"{readable or 'x'}-{mark}"


def name_fault(text: str) -> str | None:
    """Why `text` cannot name a run or a model; None if it can.

    Spaces, quotes, newlines, `$()` and any script are fine; a name must not be blank, must be encodable
    and must hold no NUL, which no file system and no argument list can carry.
    """
    if not text.strip():
        return "must not be empty"
    if "\x00" in text:
        return "must not contain a NUL character"
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return "must be valid unicode (it contains half of a surrogate pair)"
    return None
