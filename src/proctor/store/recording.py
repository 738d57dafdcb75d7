"""Recordings and suites: written once, then immutable."""

from __future__ import annotations

import functools
import hashlib
import json
from array import array
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from proctor.errors import StoreError
from proctor.records import Instance, Kind, Recording, Request, Suite, canonical_json, digest
from proctor.store.arrow import opened, pa, pq, read_table
from proctor.store.durable import publish, publish_bytes, store_errors
from proctor.store.keys import KeyArray, from_bytes
from proctor.store.rows import parse

_META: Final = b"proctor"
_DOCUMENTS_PIECE: Final = 1 << 20
"""Bytes of the documents' text in one row: a cell of hundreds of megabytes serves nobody."""
_ROW_GROUP: Final = 16384
_HINT: Final = "delete it and run `proctor prepare` again"
_PLACES: Final = ("doc_id", "index", "repeat")
_HEAD: Final = ("fingerprint", "source", "source_version", "task", "task_version", "num_fewshot", "settings")


@dataclass(frozen=True, kw_only=True, eq=False)
class _Keyed:
    """Something of each request of a recording, in order, and its key."""

    key_bytes: bytes
    """32 bytes for each request."""

    def __len__(self) -> int:
        return len(self.key_bytes) // 32

    def key(self, ordinal: int) -> str:
        """The key of one request."""
        return self.key_bytes[32 * ordinal : 32 * ordinal + 32].hex()


@dataclass(frozen=True, kw_only=True, eq=False)
class Outline(_Keyed):
    """A recording without its requests; all lists and arrays have one entry for each request, in order."""

    task: str
    num_fewshot: int
    labels: tuple[str, ...]
    documents: NDArray[np.int64]
    characters: NDArray[np.int64]
    """Length of the request as JSON text."""
    caps: NDArray[np.int64]
    """Tokens that may be generated; 0 for a log-likelihood."""

    @cached_property
    def keys(self) -> list[str]:
        """The keys as text."""
        joined = self.key_bytes.hex()
        return [joined[i : i + 64] for i in range(0, len(joined), 64)]

    @cached_property
    def folded(self) -> KeyArray:
        """The keys as an array."""
        return from_bytes(self.key_bytes, 32)


@dataclass(frozen=True, kw_only=True, eq=False)
class Requests(_Keyed):
    """A recording's requests and their keys without the rest of it: as the bytes that they are kept as."""

    ends: array[int]
    """Where each request's JSON text begins, and where the last one ends."""
    texts: memoryview

    @property
    def size(self) -> int:
        """Bytes in memory."""
        return len(self.key_bytes) + self.ends.itemsize * len(self.ends) + self.texts.nbytes

    def request(self, ordinal: int) -> Request:
        """One request."""
        return Request.from_json(parse(self.texts[self.ends[ordinal] : self.ends[ordinal + 1]]))


def write_recording(path: Path, recording: Recording) -> None:
    """Write `recording` unless an intact file is there. Raises StoreError."""
    if path.exists():
        try:
            read_head(path)
        except StoreError:
            pass
        else:
            return
    table = _table(recording)

    def write(temp: Path) -> None:
        pq.write_table(table, temp, compression="zstd", row_group_size=_ROW_GROUP, write_page_checksum=True)

    with store_errors("write a recording", path):
        publish(path, write)


def write_labels(path: Path, labels: Iterable[str]) -> None:
    """Keep, beside the recording at `path`, what marking it was found to need. Raises StoreError."""
    with store_errors("write the labels of a recording", path):
        publish_bytes(_labels_path(path), json.dumps(sorted(labels)).encode())


def read_labels(path: Path, head: Mapping[str, Any] | None = None) -> tuple[str, ...]:
    """As found by `prepare`, else as recorded; `head` if it was read. Raises StoreError."""
    with store_errors("read the labels of a recording", path):
        try:
            return tuple(str(label) for label in json.loads(_labels_path(path).read_bytes()))
        except FileNotFoundError:
            return tuple((head or read_head(path))["labels"])
        except (ValueError, TypeError) as error:
            raise _damaged(_labels_path(path), str(error)) from error


def _labels_path(path: Path) -> Path:
    return path.with_suffix(".labels.json")


def read_recording(path: Path) -> Recording:
    """The recording at `path`. Raises StoreError if it is missing or not what was written."""
    with store_errors("read a recording", path):
        table = read_table(path, _HINT)
    head = _meta(path, table.schema)
    columns = {name: table.column(name).to_pylist() for name in table.column_names}
    documents = b"".join(piece for piece in columns["documents"] if piece is not None)
    requests = [request for request in columns["request"] if request is not None]
    places = [columns[name][: len(requests)] for name in _PLACES]
    asked = _asked((k for k in columns["key"] if k), (r.encode() for r in requests))
    if head["digest"] != _whole(asked, places, documents):
        raise _damaged(path, "its contents do not agree with their checksum")
    instances = tuple(
        Instance(
            request=Request.from_json(parse(request.encode())),
            key=key.hex(),
            doc_id=doc_id,
            index=index,
            repeat=repeat,
        )
        for request, key, doc_id, index, repeat in zip(
            columns["request"],
            columns["key"],
            columns["doc_id"],
            columns["index"],
            columns["repeat"],
            strict=True,
        )
        if key is not None
    )
    return Recording(
        **{name: head[name] for name in _HEAD},
        instances=instances,
        documents=documents.decode("utf-8", "surrogatepass"),
        labels=read_labels(path, head),
    )


def read_requests(path: Path) -> Requests:
    """The requests of the recording at `path`, without the rest. Raises StoreError if they are not what was written."""
    with store_errors("read a recording", path):
        table = read_table(path, _HINT, ["key", "request"])
    head = _meta(path, table.schema)
    table = _of_requests(table)
    keys, texts = (table.column(name).combine_chunks() for name in ("key", "request"))
    ends, view = np.zeros(1, np.int64), memoryview(b"")
    try:
        key_bytes = _fixed_bytes(keys)
        if len(texts):
            _, offsets, data = texts.buffers()
            ends = np.frombuffer(offsets, np.int64, len(texts) + 1, 8 * texts.offset)
            view = memoryview(data)[ends[0] : ends[-1]]
    except (AttributeError, TypeError, ValueError) as error:
        raise _damaged(path, f"its columns are of other types ({error})") from error
    if "asked" not in head:
        # Written before requests had a checksum of their own: the whole has one.
        read_recording(path)
    elif head["asked"] != _asked((key_bytes,), (view,)).hexdigest():
        raise _damaged(path, "its requests do not agree with their checksum")
    return Requests(key_bytes=key_bytes, ends=array("q", (ends - ends[0]).tobytes()), texts=view)


def read_keys(path: Path) -> list[str]:
    """The keys of the recording at `path`, in its order; reads nothing else. Raises StoreError."""
    with store_errors("read a recording", path):
        table = read_table(path, _HINT, ["key"])
    keys = table.column("key").drop_null().combine_chunks()
    joined = b"".join(keys.to_pylist()).hex()
    return [joined[i : i + 64] for i in range(0, len(joined), 64)]


def read_outline(path: Path) -> Outline:
    """What planning needs of the recording at `path`, without its requests. Raises StoreError."""
    names = ["key", "doc_id", "characters", "cap"]
    with store_errors("read a recording", path):
        table = read_table(path, _HINT, names)
    head = _meta(path, table.schema)
    table = _of_requests(table)
    documents, characters, caps = (table.column(n).to_numpy().astype(np.int64) for n in names[1:])
    return Outline(
        task=head["task"],
        num_fewshot=head["num_fewshot"],
        labels=read_labels(path, head),
        key_bytes=_fixed_bytes(table.column("key").combine_chunks()),
        documents=documents,
        characters=characters,
        caps=caps,
    )


def _of_requests(table: Any) -> Any:
    """The rows of the requests. Those beyond hold more of the documents."""
    # Arrow's own filter takes a tenth of a second to import.
    return table.slice(0, table.num_rows - table.column("key").null_count)


def _fixed_bytes(array: Any) -> bytes:
    """The bytes of a column of keys without nulls."""
    width = array.type.byte_width
    data = memoryview(array.buffers()[1])
    return bytes(data[array.offset * width : (array.offset + len(array)) * width])


def read_head(path: Path) -> dict[str, Any]:
    """What the recording at `path` says of itself, without its requests. Raises StoreError."""
    with store_errors("read a recording", path), opened(path, _HINT) as file:
        return _meta(path, file.schema_arrow)


def write_suite(path: Path, suite: Suite) -> None:
    """Write `suite`. Raises StoreError."""
    value = {
        "id": suite.id,
        "source": suite.source,
        "names": list(suite.names),
        "num_fewshot": suite.num_fewshot,
        "recordings": list(suite.recordings),
        "settings": suite.settings,
    }
    with store_errors("write a suite", path):
        publish_bytes(path, canonical_json(value).encode())


def read_suite(path: Path) -> Suite:
    """The suite at `path`. Raises StoreError."""
    with store_errors("read a suite", path):
        data = path.read_bytes()
    try:
        value = json.loads(data)
        return Suite(**value | {"names": tuple(value["names"]), "recordings": tuple(value["recordings"])})
    except (ValueError, TypeError, KeyError) as error:
        raise _damaged(path, str(error)) from error


def _cap(request: Request) -> int:
    """The length limit as the task states it; 256 is the default of lm-eval's classes."""
    if request.kind is not Kind.GENERATE:
        return 0
    return _length_limit(request.arguments)


@functools.lru_cache(maxsize=64)
def _length_limit(text: str) -> int:
    arguments = json.loads(text)
    for name in ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens"):
        if isinstance(arguments.get(name), int):
            return int(arguments[name])
    return 256


def _table(recording: Recording) -> Any:
    """Requests in their order, and the documents' text in pieces beside them."""
    # A lone surrogate may stand in a document, and parquet's text may not hold it: bytes can.
    documents = recording.documents.encode("utf-8", "surrogatepass")
    step = max(_DOCUMENTS_PIECE, -(-len(documents) // max(1, len(recording.instances))))
    pieces = [documents[i : i + step] for i in range(0, len(documents), step)]
    length = max(len(recording.instances), len(pieces))
    keys = [bytes.fromhex(i.key) for i in recording.instances]
    requests = [canonical_json(i.request.to_json()) for i in recording.instances]

    def padded(values: Iterable[Any], kind: Any) -> Any:
        listed = list(values)
        return pa.array(listed + [None] * (length - len(listed)), kind)

    columns = {
        "key": padded(keys, pa.binary(32)),
        "doc_id": padded((i.doc_id for i in recording.instances), pa.int64()),
        "index": padded((i.index for i in recording.instances), pa.int64()),
        "repeat": padded((i.repeat for i in recording.instances), pa.int64()),
        "characters": padded(map(len, requests), pa.int64()),
        "cap": padded((_cap(i.request) for i in recording.instances), pa.int64()),
        "request": padded(requests, pa.large_string()),
        "documents": padded(pieces, pa.large_binary()),
    }
    places = [[getattr(i, name) for i in recording.instances] for name in _PLACES]
    asked = _asked(keys, map(str.encode, requests))
    head = {name: getattr(recording, name) for name in _HEAD} | {
        "labels": list(recording.labels),
        "asked": asked.hexdigest(),
        "digest": _whole(asked, places, documents),
    }
    meta = {"head": head, "check": digest(head)}
    return pa.table(columns).replace_schema_metadata({_META: json.dumps(meta)})


def _asked(keys: Iterable[bytes], requests: Iterable[bytes | memoryview]) -> Any:
    """A hash of what is asked, for more to be added to."""
    asked = hashlib.sha256()
    for key in keys:
        asked.update(key)
    for request in requests:
        asked.update(request)
    return asked


def _whole(asked: Any, places: list[list[int]], documents: bytes) -> str:
    """The digest of all of a recording: of what is asked, and of what belongs to it."""
    whole = asked.copy()
    whole.update(canonical_json(places).encode())
    whole.update(documents)
    return whole.hexdigest()


def _meta(path: Path, schema: Any) -> dict[str, Any]:
    try:
        meta = json.loads(schema.metadata[_META])
        if meta["check"] != digest(meta["head"]):
            raise _damaged(path, "what it says of itself does not agree with its checksum")
        return meta["head"]
    except (TypeError, KeyError, ValueError) as error:
        raise _damaged(path, "it is not a recording") from error


def _damaged(path: Path, why: str) -> StoreError:
    return StoreError(f"{path} is damaged: {why}", hint=_HINT)
