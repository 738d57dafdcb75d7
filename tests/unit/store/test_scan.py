"""Damage never costs a good row."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proctor.records import Boundary, EngineInfo, Failure, Response
from proctor.store import rows
from proctor.store.keys import key_array
from proctor.store.scan import KIND_PERMANENT, KIND_RETRYABLE, Block, Scan, scan

RESOLUTION = "0123456789abcdef"
KEYS = [hashlib.sha256(b"%d" % n).hexdigest() for n in range(40)]


def response_line(key: str, text: str = "hello", at: int = 1_700_000_000_000_000) -> bytes:
    answer = Response(key=key, physical_key=key[::-1], text=text)
    return rows.line(rows.answer_row(answer, RESOLUTION, at))


def scanned(data: bytes, tmp_path: Path, *, complete: bool = True) -> Scan:
    path = tmp_path / "segment"
    path.write_bytes(data)
    fd = os.open(path, os.O_RDONLY)
    try:
        return scan(fd, 0, complete=complete)
    finally:
        os.close(fd)


def keys_of(found: Scan) -> list[str]:
    """The keys found, in the order of the file."""
    block = Block.joined(found.blocks)
    block = block.take(np.argsort(block.where))
    known = {tuple(row): key for key, row in zip(KEYS, key_array(KEYS).tolist(), strict=True)}
    return [known[tuple(row)] for row in block.key.tolist()]


def bodies_of(found: Scan, data: bytes) -> list[bytes]:
    block = Block.joined(found.blocks)
    return [data[w : w + s] for w, s in zip(block.where.tolist(), block.size.tolist(), strict=True)]


def test_every_kind_of_row_is_read(tmp_path: Path) -> None:
    engine = EngineInfo(engine="fake", version="1")
    failure = Failure(key=KEYS[1], boundary=Boundary.SERVER, message="x", retryable=True)
    final = Failure(key=KEYS[2], boundary=Boundary.CONTEXT, message="x", retryable=False, physical_key=KEYS[9])
    data = b"".join(
        [
            rows.line(rows.engine_row(engine)),
            response_line(KEYS[0]),
            rows.line(rows.answer_row(failure, RESOLUTION, 5)),
            rows.line(rows.answer_row(final, RESOLUTION, 6)),
            rows.line(rows.alias_row(KEYS[3], KEYS[9], RESOLUTION, 1_700_000_000_000_001)),
        ]
    )
    found = scanned(data, tmp_path)
    assert found.damage == []
    assert found.engines == [engine]
    assert keys_of(found) == KEYS[:4]
    block = Block.joined(found.blocks)
    assert sorted(block.kind.tolist()) == [0, 1, KIND_RETRYABLE, KIND_PERMANENT]
    assert {5, 6, 1_700_000_000_000_000, 1_700_000_000_000_001} == set(block.at.tolist())
    assert all(rows.parse(body)["resolution"] == RESOLUTION for body in bodies_of(found, data))


def test_a_tail_torn_at_any_byte_costs_only_the_last_row(tmp_path: Path) -> None:
    whole = response_line(KEYS[0]) + response_line(KEYS[1])
    last = response_line(KEYS[2], text='quotes " and {"crc":" inside')
    for cut in range(len(last)):
        found = scanned(whole + last[:cut], tmp_path)
        # Without its newline, or the brace before it, the row itself is still whole.
        intact = cut >= len(last) - 2
        assert keys_of(found) == KEYS[:3] if intact else KEYS[:2], cut
        assert found.damage == ([] if intact or cut == 0 else [(len(whole), cut)]), cut
        assert found.end == len(whole) + cut


def test_the_tail_of_a_growing_file_is_left_for_the_next_scan(tmp_path: Path) -> None:
    first, second = response_line(KEYS[0]), response_line(KEYS[1])
    found = scanned(first + second[:-1], tmp_path, complete=False)
    assert keys_of(found) == KEYS[:1]
    assert found.damage == []
    assert found.end == len(first)


def test_a_flipped_byte_costs_at_most_its_row(tmp_path: Path) -> None:
    before, row, after = (response_line(key) for key in KEYS[:3])
    for at in range(len(row)):
        broken = bytearray(row)
        broken[at] ^= 0x20
        found = scanned(before + bytes(broken) + after, tmp_path)
        assert keys_of(found)[0] == KEYS[0], at
        assert keys_of(found)[-1] == KEYS[2], at
        # Upper case in the checksum's digits changes nothing.
        assert found.damage or keys_of(found) == KEYS[:3], at
        assert all(len(before) <= start and start + size <= len(before) + len(row) for start, size in found.damage)


def test_nuls_in_the_middle_cost_only_what_they_cover(tmp_path: Path) -> None:
    lines = [response_line(key) for key in KEYS[:8]]
    data = bytearray(b"".join(lines))
    start, end = len(lines[0]) * 2 + 30, len(lines[0]) * 5 + 100
    data[start:end] = bytes(end - start)
    found = scanned(bytes(data), tmp_path)
    assert keys_of(found) == [*KEYS[:2], *KEYS[6:8]]
    assert found.damage == [(len(lines[0]) * 2, len(lines[0]) * 4)]


def test_rows_whose_newlines_are_lost_are_good(tmp_path: Path) -> None:
    data = b"".join(response_line(key) for key in KEYS[:5]).replace(b"\n", b"\0")
    found = scanned(data, tmp_path)
    assert keys_of(found) == KEYS[:5]
    assert sum(size for _, size in found.damage) == 5


def test_a_row_that_only_looks_like_one_is_damage(tmp_path: Path) -> None:
    odd = rows.line({"type": rows.RESPONSE, "key": "short"})
    found = scanned(odd + response_line(KEYS[0]), tmp_path)
    assert keys_of(found) == KEYS[:1]
    assert found.damage == [(0, len(odd))]


def test_rows_larger_than_a_chunk_and_rows_across_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("proctor.store.scan.CHUNK", 700)
    data = b"".join(response_line(key, text="x" * (37 * n)) for n, key in enumerate(KEYS))
    found = scanned(data, tmp_path)
    assert keys_of(found) == KEYS
    assert found.damage == []


texts = st.text(max_size=40) | st.sampled_from(['{"crc":"', '","row":{', "\\", "\n", "\ud800", "é" * 9, "\x00"])
patches = st.lists(
    st.tuples(st.integers(0, 5000), st.binary(min_size=1, max_size=30) | st.just(bytes(200)) | st.just(b"\n")),
    max_size=4,
)


@settings(max_examples=150, deadline=None)
@given(texts=st.lists(texts, min_size=1, max_size=12), patches=patches, cut=st.integers(0, 400))
def test_every_untouched_row_is_found_and_nothing_else(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], patches: list[tuple[int, bytes]], cut: int
) -> None:
    lines = [response_line(key, text=text) for key, text in zip(KEYS, texts, strict=False)]
    data = bytearray(b"".join(lines))
    whole = bytes(data)
    for at, patch in patches:
        at %= len(data)
        data[at : at + len(patch)] = patch[: len(data) - at]
    damaged = bytes(data[: len(data) - cut % len(data)])
    untouched: list[str] = []
    start = 0
    for key, line in zip(KEYS, lines, strict=False):
        # The row itself: from its mark to its closing brace.
        if (
            damaged[start : start + len(line) - 2] == whole[start : start + len(line) - 2]
            and len(damaged) >= start + len(line) - 2
        ):
            untouched.append(key)
        start += len(line)
    found = scanned(damaged, tmp_path_factory.mktemp("scan"))
    assert keys_of(found) == untouched
    good = {line[rows.HEAD : -2] for line in lines}
    assert set(bodies_of(found, damaged)) <= good
    # Every byte is a row, its wrapping, or reported.
    covered = sum(size for _, size in found.damage) + sum(len(b) for b in bodies_of(found, damaged))
    assert covered <= len(damaged) <= covered + (rows.HEAD + 2) * len(texts) + sum(p.count(b"\n") for _, p in patches)
