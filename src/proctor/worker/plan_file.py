"""`plan.bits`: what a run owes, as the orders in which it is asked and bits that say who owes what.

Compressed arrays one after the other, then a line of JSON that says what they are, then its place. Models of one kind
share an order, models that owe the same share their bits. Shards stand in it only where a strategy has made them by
rules of its own; otherwise whoever reads a model cuts them, and everybody cuts alike: see `proctor.plan.cuts`.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO, Final, TypeVar

import numpy as np
from numpy.typing import NDArray

from proctor.plan import AskingOrder, Cut, Shards, ShardSizes
from proctor.records import Shard, digest
from proctor.store.arrow import pa

Number = TypeVar("Number", bound=np.generic)

_FORMAT: Final = 1
_TAIL: Final = 16
"""The place and the length of the JSON, 8 bytes each: the end of the file."""


def write_plan(path: Path, models: Mapping[str, Sequence[Shard]]) -> None:
    """Write the shards of each model to `path`. Raises OSError."""
    with path.open("wb") as file:
        writer = _Writer(file)
        which = {model: writer.shards(shards) for model, shards in models.items()}
        head: dict[str, Any] = {"format": _FORMAT, "orders": writer.orders, "sets": writer.sets, "models": which}
        text = json.dumps({**head, "check": digest(_exact(head))}).encode() + b"\n"
        place = file.tell()
        file.write(text + place.to_bytes(8, "little") + len(text).to_bytes(8, "little"))


def read_plan(path: Path, model: str) -> Shards | None:
    """The shards of one model; None for one that is not planned. Raises OSError, ValueError, KeyError."""
    with path.open("rb") as file:
        plan = _Reader(file)
        number = plan.models.get(model)
        return None if number is None else Shards(model, plan.cut(number), plan.ids(number))


def count_shards(path: Path, done: Mapping[str, Mapping[str, NDArray[np.uint8]]]) -> tuple[int, int]:
    """(all shards, those of which something is owed) of the planned models that are in `done`.

    `done`: model → task fingerprint → bits of the answered requests, ⌈n/8⌉ bytes. No file is no shards. Raises
    OSError, ValueError, KeyError.
    """
    if not path.exists():
        return 0, 0
    every = owed = 0
    with path.open("rb") as file:
        plan = _Reader(file)
        members: dict[int, list[str]] = {}
        for model, number in plan.models.items():
            if model in done:
                members.setdefault(number, []).append(model)
        for number, models in members.items():
            cut = plan.cut(number)
            count = len(cut.ends)
            every += count * len(models)
            begun = [m for m in models if any(bits.any() for bits in done[m].values())]
            owed += count * (len(models) - len(begun))
            if begun and count:
                rows = cut.order.rows[cut.positions()]
                starts = np.concatenate([[0], cut.ends[:-1]])
                for model in begun:
                    left = _left(cut.order, done[model]).take(rows)
                    owed += int(np.logical_or.reduceat(left, starts).sum())
    return every, owed


def _left(order: AskingOrder, done: Mapping[str, NDArray[np.uint8]]) -> NDArray[np.bool_]:
    """Which rows of the order's table have no answer."""
    left = np.ones(int(order.starts[-1]), np.bool_)
    for name, start, stop in zip(
        order.fingerprints, order.starts[:-1].tolist(), order.starts[1:].tolist(), strict=True
    ):
        if name in done:
            answered = np.unpackbits(done[name])[: stop - start]
            left[start : start + len(answered)] = answered == 0
    return left


class _Writer:
    """Writes arrays, each once, and keeps what is to be said of them."""

    def __init__(self, file: BinaryIO) -> None:
        self.orders: list[dict[str, Any]] = []
        self.sets: list[dict[str, Any]] = []
        self._file = file
        # What is shared is the same object; it is held, so that an id stays its own.
        self._order_of: dict[int, int] = {}
        self._set_of: dict[int, int] = {}
        self._held: list[object] = []

    def shards(self, shards: Sequence[Shard]) -> int:
        """The number of the set that these shards are cut from."""
        same = id(shards.cut) if isinstance(shards, Shards) else id(shards)
        if same not in self._set_of:
            known = shards if isinstance(shards, Shards) else _spelt_out(shards)
            self.sets.append(self._set(known))
            self._set_of[same] = len(self.sets) - 1
            self._held += [shards, known.cut.order]
        return self._set_of[same]

    def _set(self, shards: Shards) -> dict[str, Any]:
        cut = shards.cut
        return {
            "order": self._order(cut.order),
            "owed": None if cut.owed is None else self._array(cut.owed),
            "sizes": asdict(cut.sizes),
            "ends": None if cut.fixed is None else self._array(cut.fixed),
            "ids": None if shards.ids is None else list(shards.ids),
        }

    def _order(self, order: AskingOrder) -> int:
        if id(order) not in self._order_of:
            arrays = {name: self._array(getattr(order, name)) for name in ("starts", "rows", "cost_us")}
            self.orders.append({"fingerprints": list(order.fingerprints), **arrays})
            self._order_of[id(order)] = len(self.orders) - 1
        return self._order_of[id(order)]

    def _array(self, values: NDArray[Any]) -> list[Any]:
        """[place, bytes in the file, bytes unpacked, checksum, type]."""
        raw = np.ascontiguousarray(values)
        packed = pa.compress(raw.tobytes(), codec="zstd", asbytes=True)
        place = self._file.tell()
        self._file.write(packed)
        return [place, len(packed), raw.nbytes, zlib.crc32(packed), raw.dtype.str]


class _Reader:
    """Reads what it is asked for. Raises ValueError, KeyError for what is no plan."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        end = file.seek(0, 2)
        file.seek(max(0, end - _TAIL))
        tail = file.read(_TAIL)
        place, length = int.from_bytes(tail[:8], "little"), int.from_bytes(tail[8:], "little")
        if place + length + _TAIL != end:
            raise ValueError("it is cut off, or no plan")
        file.seek(place)
        head = json.loads(file.read(length))
        check = head.pop("check")
        if head["format"] != _FORMAT or check != digest(_exact(head)):
            raise ValueError("what it says of itself does not agree with its checksum")
        self.models: dict[str, int] = head["models"]
        self._orders: list[dict[str, Any]] = head["orders"]
        self._sets: list[dict[str, Any]] = head["sets"]
        self._read: dict[int, AskingOrder] = {}

    def cut(self, number: int) -> Cut:
        """The set with this number."""
        found = self._sets[number]
        return Cut(
            order=self._order(found["order"]),
            owed=None if found["owed"] is None else self._array(found["owed"], np.uint8),
            sizes=ShardSizes(**found["sizes"]),
            fixed=None if found["ends"] is None else self._array(found["ends"], np.int64),
        )

    def ids(self, number: int) -> list[str] | None:
        """Names of its shards, where they have names of their own."""
        return self._sets[number]["ids"]

    def _order(self, number: int) -> AskingOrder:
        if number not in self._read:
            found = self._orders[number]
            self._read[number] = AskingOrder(
                fingerprints=tuple(found["fingerprints"]),
                starts=self._array(found["starts"], np.int64),
                rows=self._array(found["rows"], np.int32),
                cost_us=self._array(found["cost_us"], np.int64),
            )
        return self._read[number]

    def _array(self, said: Sequence[Any], kind: type[Number]) -> NDArray[Number]:
        place, length, unpacked, crc, name = said
        self._file.seek(place)
        packed = self._file.read(length)
        if zlib.crc32(packed) != crc or np.dtype(name) != np.dtype(kind):
            raise ValueError("a part of it does not agree with its checksum")
        raw = pa.decompress(packed, decompressed_size=unpacked, codec="zstd", asbytes=True) if unpacked else b""
        return np.frombuffer(raw, kind)


def _spelt_out(shards: Sequence[Shard]) -> Shards:
    """Shards that come from no cut, as one: each item's place is a row, a shard's cost stands at its first item."""
    items = [item for shard in shards for item in shard.items]
    sizes: dict[str, int] = {}
    for task, ordinal in items:
        sizes[task] = max(sizes.get(task, 0), -(-(ordinal + 1) // 8) * 8)
    starts = np.cumsum([0, *sizes.values()]).astype(np.int64)
    first = dict(zip(sizes, starts.tolist(), strict=False))
    ends = np.cumsum([len(s.items) for s in shards]).astype(np.int64)
    cost = np.zeros(len(items), np.int64)
    cost[ends - [len(s.items) for s in shards]] = [round(s.cost_s * 1e6) for s in shards]
    order = AskingOrder(
        fingerprints=tuple(sizes),
        starts=starts,
        rows=np.array([first[task] + ordinal for task, ordinal in items], np.int32),
        cost_us=cost,
    )
    return Shards("", Cut(order=order, owed=None, fixed=ends), [s.id for s in shards])


def _exact(head: Mapping[str, Any]) -> str:
    return json.dumps(head, sort_keys=True)
