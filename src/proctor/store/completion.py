"""Which requests of a run a model has answered, as bits, and how long its answers were.

Opening the answers of a model with a million rows takes a second or two and a few hundred MB. A sweep has a thousand
such models, most of them absent or finished. So what was found of one is kept beside its answers, in
`done-<resolution>.bits`, with the names, sizes and times of all files that it was found in. It is believed only while
the directory lists exactly these: any new, grown, missing or replaced file, and any segment that is still open, and the
answers themselves are read again. It can be deleted at any time.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from proctor.errors import StoreError
from proctor.records import Json, Response, digest
from proctor.store.answers import Answers
from proctor.store.durable import publish_bytes, store_errors
from proctor.store.index import Split
from proctor.store.owner import Alive, alive
from proctor.store.recording import Outline
from proctor.store.segments import OPEN, PART, SEALED, listing

Bits = NDArray[np.uint8]

KEEP_ROWS: Final = 1_000
"""Answers that are fewer are read again each time: that is as quick."""
_ROW_BYTES: Final = 100
"""A compacted row has about as many."""
_FORMAT: Final = 2
_WINDOWS: Final = 16
_WINDOW_ROWS: Final = 128
"""Lengths are measured on so many stretches of so many neighbouring rows: few row groups of a part are unpacked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerLengths:
    """Sums over a sample of the answers to one recording."""

    answers: int = 0
    characters: int = 0
    caps: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Completion:
    """What one model has of some recordings. Bits are in the recordings' order, ⌈n/8⌉ bytes each."""

    answered: Mapping[str, Bits]
    """By task fingerprint."""
    failed: Mapping[str, Bits]
    """Failed for good."""
    lengths: Mapping[str, AnswerLengths] = field(default_factory=dict[str, AnswerLengths])
    """Of recordings of which there are answers; empty where it was not asked for."""
    damaged: int = 0
    """Rows that could not be read."""
    rows: int = 0
    """Answered requests of these recordings."""
    duplicates: int = 0
    """Answers of these weights to what was answered already; compaction drops them."""


def completion(
    directory: Path, resolution: str, outlines: Mapping[str, Outline], *, measure: bool = False, alive: Alive = alive
) -> Completion:
    """What the answers in `directory` come to. Raises StoreError if they cannot be read.

    Writes the summary where it is worth it and the store can be written.
    """
    path = directory / f"done-{resolution}.bits"
    with store_errors("read answers", directory):
        token = _token(directory)
    if token == _NOTHING:
        return _nothing(outlines)
    kept = _read(path, token) if token is not None else None
    if kept is not None and kept.answered.keys() >= outlines.keys() and (kept.lengths or not measure or not kept.rows):
        return kept
    found = _opened(Answers(directory, resolution, alive=alive), outlines, measure=measure or _many(directory))
    with store_errors("read answers", directory):
        settled = token is not None and token == _token(directory)
    if settled and token is not None and found.rows >= KEEP_ROWS:
        # A reader may be on a read-only mount; then the next one reads everything again.
        with contextlib.suppress(OSError, StoreError):
            publish_bytes(path, _packed(token, found))
    return found


_NOTHING: Final = digest([])
_EMPTY: Final = AnswerLengths()


def _token(directory: Path) -> str | None:
    """A digest of the files that answers are in; None while one may still grow. Raises OSError."""
    entries: list[tuple[str, int, int]] = []
    seen = listing(directory)
    if not all(seen.segments.values()):
        return None
    names = [*seen.parts, *seen.struck, *(stem + SEALED for stem in seen.segments)]
    for name in sorted(names):
        try:
            found = os.stat(directory / name)
        except FileNotFoundError:
            return None
        entries.append((name, found.st_size, found.st_mtime_ns))
    return digest(entries)


def _many(directory: Path) -> bool:
    """Whether there is enough to write a summary, which then should hold lengths too."""
    names = [n for n in os.listdir(directory) if n.endswith((PART, SEALED, OPEN))]
    return sum(os.stat(directory / n).st_size for n in names if (directory / n).exists()) > _ROW_BYTES * KEEP_ROWS


def _nothing(outlines: Mapping[str, Outline]) -> Completion:
    empty = {fp: np.zeros(-(-len(o) // 8), np.uint8) for fp, o in outlines.items()}
    return Completion(answered=empty, failed=empty)


def _opened(answers: Answers, outlines: Mapping[str, Outline], *, measure: bool) -> Completion:
    splits = {fingerprint: answers.split(outline.folded) for fingerprint, outline in outlines.items()}
    lengths: dict[str, AnswerLengths] = {}
    if measure:
        before = len(answers.damage)
        lengths = _lengths(answers, outlines, splits)
        if len(answers.damage) > before:
            # Rows that proved damaged while they were read are owed now.
            splits = {fingerprint: answers.split(outline.folded) for fingerprint, outline in outlines.items()}
    return Completion(
        answered={fingerprint: np.packbits(split.row >= 0) for fingerprint, split in splits.items()},
        failed={fingerprint: np.packbits(split.permanent) for fingerprint, split in splits.items()},
        lengths=lengths,
        damaged=len(answers.damage),
        rows=sum(int((split.row >= 0).sum()) for split in splits.values()),
        duplicates=answers.duplicates,
    )


def _lengths(
    answers: Answers, outlines: Mapping[str, Outline], splits: Mapping[str, Split]
) -> dict[str, AnswerLengths]:
    """Lengths of a sample of what is answered, spread over the files."""
    names = list(splits)
    found = [np.flatnonzero(splits[name].row >= 0) for name in names]
    if not sum(map(len, found)):
        return {}
    task = np.repeat(np.arange(len(names)), list(map(len, found)))
    ordinal = np.concatenate(found)
    row = np.concatenate([splits[name].row[o] for name, o in zip(names, found, strict=True)])
    order = answers.reading_order(row)
    if len(order) > _WINDOWS * _WINDOW_ROWS:
        starts = np.linspace(0, len(order) - _WINDOW_ROWS, _WINDOWS).astype(np.int64)
        order = order[(starts[:, None] + np.arange(_WINDOW_ROWS)).ravel()]
    chosen: dict[str, tuple[str, int]] = {}
    for t, o in zip(task[order].tolist(), ordinal[order].tolist(), strict=True):
        chosen[outlines[names[t]].key(o)] = (names[t], o)
    sums: dict[str, AnswerLengths] = {}
    for key, answer in answers.read(list(chosen)).items():
        name, o = chosen[key]
        if isinstance(answer, Response):
            outline, old = outlines[name], sums.get(name, _EMPTY)
            sums[name] = AnswerLengths(
                answers=old.answers + 1,
                characters=old.characters + int(outline.characters[o]),
                caps=old.caps + int(outline.caps[o]),
                prompt_tokens=old.prompt_tokens + answer.prompt_tokens,
                completion_tokens=old.completion_tokens + answer.completion_tokens,
            )
    return sums


# --- the file: one line of JSON, then the bits ---


def _packed(token: str, found: Completion) -> bytes:
    blobs = [zlib.compress(b.tobytes(), 1) for f in found.answered for b in (found.answered[f], found.failed[f])]
    body = b"".join(blobs)
    head: dict[str, Json] = {
        "format": _FORMAT,
        "token": token,
        "damaged": found.damaged,
        "rows": found.rows,
        "duplicates": found.duplicates,
        "recordings": list(found.answered),
        "sizes": [len(b) for b in blobs],
        "lengths": {name: asdict(lengths) for name, lengths in found.lengths.items()},
        "crc": zlib.crc32(body),
    }
    return json.dumps(head | {"check": digest(head)}).encode() + b"\n" + body


def _read(path: Path, token: str) -> Completion | None:
    """What was kept, if it was found in these very files and is whole."""
    try:
        line, _, body = path.read_bytes().partition(b"\n")
        head = json.loads(line)
        check = head.pop("check")
        if (
            head["format"] != _FORMAT
            or head["token"] != token
            or check != digest(head)
            or zlib.crc32(body) != head["crc"]
        ):
            return None
        return _Body(head=head, body=body).completion()
    except (OSError, ValueError, KeyError, TypeError, AttributeError, zlib.error):
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Body:
    head: dict[str, Json]
    body: bytes

    def completion(self) -> Completion:
        ends = np.cumsum([0, *self.head["sizes"]]).tolist()
        blobs = [np.frombuffer(zlib.decompress(self.body[a:b]), np.uint8) for a, b in itertools.pairwise(ends)]
        names = self.head["recordings"]
        return Completion(
            answered=dict(zip(names, blobs[0::2], strict=True)),
            failed=dict(zip(names, blobs[1::2], strict=True)),
            lengths={name: AnswerLengths(**value) for name, value in self.head["lengths"].items()},
            damaged=self.head["damaged"],
            rows=self.head["rows"],
            duplicates=self.head["duplicates"],
        )
