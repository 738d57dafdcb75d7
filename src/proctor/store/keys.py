"""Keys as arrays: 128 bits of each, as two unsigned integers. A million keys are 16 MB.

A key's 256 bits are folded to 128 by an odd multiplication and an addition. Of a SHA-256 half of the bits would do
as well; so folded, all of them count, also where something else than a hash is taken for a key.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from proctor.store.rows import check_key

KeyArray = NDArray[np.uint64]
"""Shape (n, 2)."""

_FOLD: Final = 0x9E3779B97F4A7C15
"""Odd, so that nothing is lost: the golden ratio's first 64 bits."""

_WORDS: Final = struct.Struct(">4Q")
_WORD: Final = 2**64 - 1

_NIBBLES: Final = np.full(256, 255, np.uint8)
_NIBBLES[np.frombuffer(b"0123456789abcdef", np.uint8)] = np.arange(16, dtype=np.uint8)


def key_array(keys: Sequence[str]) -> KeyArray:
    """The array of `keys`, each 64 hexadecimal digits. ValueError otherwise."""
    joined = "".join(keys)
    if set(map(len, keys)) - {64}:
        for key in keys:
            check_key(key)
    try:
        return from_bytes(bytes.fromhex(joined), 32)
    except ValueError:
        for key in keys:
            check_key(key)
        raise


def from_bytes(data: bytes, width: int) -> KeyArray:
    """The array of keys of 32 bytes each, one after the other; or, with `width` 16, of what `to_bytes` gave."""
    words = np.frombuffer(data, dtype=">u8").reshape(-1, width // 8).astype(np.uint64)
    return words[:, :2] + words[:, 2:] * np.uint64(_FOLD) if width == 32 else words


def folded(key: str) -> tuple[int, int]:
    """One key as it stands in an array. ValueError for another number of digits."""
    data = bytes.fromhex(key)
    if len(data) != _WORDS.size:
        check_key(key)
    a, b, c, d = _WORDS.unpack(data)
    return (a + c * _FOLD) & _WORD, (b + d * _FOLD) & _WORD


def to_bytes(keys: KeyArray) -> bytes:
    """16 bytes for each key."""
    return keys.astype(">u8").tobytes()


def from_hex(digits: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Decode ASCII digits of shape (n, 2 m) to bytes of shape (n, m), and say which rows were valid."""
    nibbles = _NIBBLES[digits]
    valid: NDArray[np.bool_] = (nibbles != 255).all(axis=1)
    decoded: NDArray[np.uint8] = nibbles[:, 0::2] * np.uint8(16) + nibbles[:, 1::2]
    return decoded, valid


class KeyTable:
    """Sorted distinct keys, each with one integer: what `find` returns for it."""

    __slots__ = ("_high", "_low", "_values")

    def __init__(self, keys: KeyArray, values: NDArray[np.int64], rank: NDArray[np.int64]) -> None:
        """Where a key occurs more than once, the value with the lowest rank stays."""
        order = np.lexsort((rank, keys[:, 1], keys[:, 0]))
        high, low = keys[order, 0], keys[order, 1]
        first = np.ones(len(order), np.bool_)
        first[1:] = (high[1:] != high[:-1]) | (low[1:] != low[:-1])
        self._high = high[first]
        self._low = low[first]
        self._values = values[order[first]]

    def __len__(self) -> int:
        return len(self._high)

    @property
    def keys(self) -> KeyArray:
        """The keys, sorted."""
        return np.stack([self._high, self._low], axis=1)

    def find(self, keys: KeyArray) -> NDArray[np.int64]:
        """The value of each key; -1 for those that are not there."""
        found = np.full(len(keys), -1, np.int64)
        if not len(self._high) or not len(keys):
            return found
        # Sorted look-ups touch memory in order, which is several times faster than the sort costs.
        order = np.argsort(keys[:, 0])
        high, low = keys[order, 0], keys[order, 1]
        at: NDArray[np.intp] = np.asarray(np.searchsorted(self._high, high), np.intp)
        pending = np.arange(len(keys))
        while len(pending):
            inside = at[pending] < len(self._high)
            pending = pending[inside]
            pending = pending[self._high[at[pending]] == high[pending]]
            same = self._low[at[pending]] == low[pending]
            found[order[pending[same]]] = self._values[at[pending[same]]]
            # Two keys may share their first 64 bits: look at the next one.
            pending = pending[~same]
            at[pending] += 1
        return found
