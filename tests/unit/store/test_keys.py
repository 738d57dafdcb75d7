"""Tables of keys."""

from __future__ import annotations

import random

import numpy as np
import pytest

from proctor.store.keys import KeyTable, folded, from_bytes, key_array, to_bytes


def table(pairs: list[tuple[int, int]], values: list[int], rank: list[int] | None = None) -> KeyTable:
    ranks = np.array(rank or range(len(values)), np.int64)
    return KeyTable(np.array(pairs, np.uint64).reshape(-1, 2), np.array(values, np.int64), ranks)


def test_keys_that_share_their_first_half_are_told_apart() -> None:
    pairs = [(7, low) for low in range(50)] + [(2**64 - 1, low) for low in (0, 2**64 - 1)]
    found = table(pairs, list(range(52))).find(np.array([*pairs, (7, 50), (8, 0), (2**64 - 1, 5)], np.uint64))
    assert found.tolist() == [*range(52), -1, -1, -1]


def test_the_lowest_rank_stays() -> None:
    assert table([(1, 1)] * 3, [10, 11, 12], [5, 3, 4]).find(np.array([[1, 1]], np.uint64)).tolist() == [11]


def test_as_a_dictionary() -> None:
    draw = random.Random(5)
    keys = [draw.randbytes(32).hex() for _ in range(2000)]
    known = {key: n for n, key in enumerate(keys[:1000])}
    kept = KeyTable(key_array(list(known)), np.arange(1000, dtype=np.int64), np.arange(1000, dtype=np.int64))
    draw.shuffle(keys)
    assert kept.find(key_array(keys)).tolist() == [known.get(key, -1) for key in keys]


def test_nothing_in_nothing() -> None:
    empty = table([], [])
    assert empty.find(key_array([])).tolist() == []
    assert empty.find(key_array(["0" * 64])).tolist() == [-1]


@pytest.mark.parametrize("pattern", ["{:064x}", "{:032x}{:032x}", "{:016x}{:048x}", "{:x<64}", "{:016x}" * 4])
def test_every_digit_counts(pattern: str) -> None:
    keys = [pattern.format(n, n, n, n).replace("x", "0") for n in range(16, 2000)]
    array = key_array(keys)
    assert len({tuple(row) for row in array.tolist()}) == len(set(keys))
    assert [tuple(row) for row in array.tolist()] == [folded(key) for key in keys]


def test_bytes_and_back() -> None:
    keys = key_array(["0123456789abcdef" * 4, "f" * 64])
    assert (from_bytes(to_bytes(keys), 16) == keys).all()


@pytest.mark.parametrize("keys", [["0" * 63], ["0" * 63, "0" * 65], ["0" * 63 + " "], ["é" * 64]])
def test_malformed(keys: list[str]) -> None:
    with pytest.raises(ValueError, match="64 hexadecimal digits"):
        key_array(keys)
