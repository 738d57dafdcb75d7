"""The metadata of a GGUF file: what its header says, without reading a tensor.

Layout (GGUF 2 and 3): magic, u32 version, u64 tensor count, u64 pair count, then the pairs: string key,
u32 type, value. Strings are u64 length and bytes; arrays are u32 element type, u64 length and elements.
"""

from __future__ import annotations

import hashlib
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from proctor.errors import ModelError

MAGIC: Final = b"GGUF"
_STRING: Final = 8
_ARRAY: Final = 9
_SCALARS: Final = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEMPLATE: Final = "tokenizer.chat_template"
_MAX_PAIRS: Final = 100_000

Scalar = str | int | float | bool


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufMetadata:
    """Scalars of the header, and a digest of everything about the tokenizer."""

    scalars: dict[str, Scalar]
    tokenizer_digest: str | None
    """SHA-256 over the tokenizer's pairs as stored, templates left out; None if there are none."""

    @property
    def context_length(self) -> int | None:
        """The window that the model was trained for: `<architecture>.context_length`."""
        value = self.scalars.get(f"{self.scalars.get('general.architecture')}.context_length")
        return value if isinstance(value, int) else None

    @property
    def chat_templates(self) -> dict[str, str]:
        """Every template, by its key."""
        return {k: v for k, v in self.scalars.items() if k.startswith(_TEMPLATE) and isinstance(v, str)}


def read_gguf(path: Path) -> GgufMetadata:
    """Read the header of a GGUF file. Raises ModelError if it is none, is damaged, or cannot be read."""
    try:
        with path.open("rb") as stream:
            if stream.read(4) != MAGIC:
                raise ModelError(f"{str(path)!r} is not a GGUF file")
            with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _read(data)
    except OSError as error:
        raise ModelError(f"cannot read {str(path)!r}: {error.strerror or error}") from error
    except (struct.error, ValueError, OverflowError) as error:
        raise ModelError(f"the header of {str(path)!r} is damaged or cut short: {error}") from error


def _read(data: mmap.mmap) -> GgufMetadata:
    version, _tensors, pairs = struct.unpack_from("<IQQ", data, 4)
    if version not in (2, 3):
        raise ValueError(f"GGUF version {version} (2 and 3 are known, little-endian)")
    if pairs > _MAX_PAIRS:
        raise ValueError(f"{pairs} metadata entries")
    scalars: dict[str, Scalar] = {}
    tokenizer = hashlib.sha256()
    seen_tokenizer = False
    at = 24
    for _ in range(pairs):
        start = at
        key, at = _string(data, at)
        (kind,) = struct.unpack_from("<I", data, at)
        value, at = _value(data, kind, at + 4)
        if at > len(data):
            raise ValueError(f"the value of {key!r} ends beyond the file")
        if value is not None:
            scalars[key] = value
        if key.startswith("tokenizer.") and not key.startswith(_TEMPLATE):
            seen_tokenizer = True
            tokenizer.update(data[start:at])
    return GgufMetadata(scalars=scalars, tokenizer_digest=tokenizer.hexdigest() if seen_tokenizer else None)


def _string(data: mmap.mmap, at: int) -> tuple[str, int]:
    end = _skip_string(data, at)
    return data[at + 8 : end].decode("utf-8", "surrogateescape"), end


def _skip_string(data: mmap.mmap, at: int) -> int:
    (length,) = struct.unpack_from("<Q", data, at)
    if length > len(data) - at:
        raise ValueError("a text ends beyond the file")
    return at + 8 + length


def _value(data: mmap.mmap, kind: int, at: int) -> tuple[Scalar | None, int]:
    """A scalar and where it ends; arrays are skipped and give None."""
    if kind == _STRING:
        return _string(data, at)
    if kind == _ARRAY:
        return None, _skip_array(data, at)
    code = _SCALARS.get(kind)
    if code is None:
        raise ValueError(f"unknown value type {kind}")
    (value,) = struct.unpack_from("<" + code, data, at)
    return value, at + struct.calcsize("<" + code)


def _skip_array(data: mmap.mmap, at: int) -> int:
    kind, length = struct.unpack_from("<IQ", data, at)
    at += 12
    if length > len(data):
        raise ValueError(f"an array of {length} elements")
    code = _SCALARS.get(kind)
    if code is not None:
        return at + length * struct.calcsize("<" + code)
    for _ in range(length):
        at = _skip_string(data, at) if kind == _STRING else _value(data, kind, at)[1]
    return at
