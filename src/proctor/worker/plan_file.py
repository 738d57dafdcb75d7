"""`plan.parquet`: the shards of a run, those of models that owe the same kept once."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from proctor.plan import Shards, shard_id
from proctor.records import Shard
from proctor.store.arrow import pa, pq

_META: Final = b"proctor"
_ROW_GROUP: Final = 1 << 20
_SCHEMA: Final[Any] = pa.schema(
    [("shard", pa.int32()), ("task", pa.dictionary(pa.int32(), pa.string())), ("ordinal", pa.int32())]
)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Rows:
    """One cut as columns; a row is a request."""

    names: Sequence[str]
    """Fingerprints that `task` counts."""
    task: NDArray[np.int32]
    ordinal: NDArray[np.int32]
    ends: NDArray[np.int64]


def write_plan(path: Path, models: Mapping[str, Sequence[Shard]]) -> None:
    """Write the shards of each model to `path`. Raises OSError."""
    cuts: dict[int, dict[str, Any]] = {}
    kept: list[dict[str, Any]] = []
    which: dict[str, int] = {}
    with pq.ParquetWriter(path, _SCHEMA, compression="zstd") as writer:
        groups = 0
        for model, shards in models.items():
            # Shards of one cut are the same object; a plan holds it, so its id stays its own meanwhile.
            same = id(shards.cut) if isinstance(shards, Shards) else id(shards)
            if same not in cuts:
                rows, ids, costs = _rows(shards)
                table = _table(rows)
                writer.write_table(table, row_group_size=_ROW_GROUP)
                count = -(-table.num_rows // _ROW_GROUP)
                cuts[same] = {"groups": [groups, groups + count], "ids": ids, "costs": costs, "number": len(kept)}
                kept.append({k: v for k, v in cuts[same].items() if k != "number"})
                groups += count
            which[model] = cuts[same]["number"]
        writer.add_key_value_metadata({_META: json.dumps({"models": which, "cuts": kept})})


def read_plan(path: Path, model: str) -> list[Shard]:
    """The shards of one model; none for one that is not planned. Raises OSError, ValueError, KeyError."""
    with pq.ParquetFile(path) as file:
        meta = json.loads((file.schema_arrow.metadata or file.metadata.metadata)[_META])
        if model not in meta["models"]:
            return []
        cut = meta["cuts"][meta["models"][model]]
        table = file.read_row_groups(list(range(*cut["groups"])))
    if not table.num_rows:
        return []
    shard = table.column("shard").to_numpy()
    stops = [0, *(np.flatnonzero(shard[1:] != shard[:-1]) + 1).tolist(), len(shard)]
    task = table.unify_dictionaries().column("task").combine_chunks()
    names: list[str] = task.dictionary.to_pylist()
    numbers: list[int] = task.indices.to_numpy().tolist()
    ordinals: list[int] = table.column("ordinal").to_numpy().tolist()
    items = [(names[i], o) for i, o in zip(numbers, ordinals, strict=True)]
    return [
        Shard(id=id, model=model, items=tuple(items[start:stop]), cost_s=cost)
        for (start, stop), id, cost in zip(pairwise(stops), cut["ids"], cut["costs"], strict=True)
    ]


def count_shards(path: Path, done: Mapping[str, Mapping[str, NDArray[np.uint8]]]) -> tuple[int, int]:
    """(all shards, those of which something is owed) of the planned models that are in `done`.

    `done`: model → task fingerprint → bits of the answered requests, ⌈n/8⌉ bytes. No file is no shards. Raises
    OSError, ValueError, KeyError.
    """
    if not path.exists():
        return 0, 0
    every = owed = 0
    with pq.ParquetFile(path) as file:
        meta = json.loads((file.schema_arrow.metadata or file.metadata.metadata)[_META])
        members: dict[int, list[str]] = {}
        for model, number in meta["models"].items():
            if model in done:
                members.setdefault(number, []).append(model)
        for number, models in members.items():
            cut = meta["cuts"][number]
            every += len(cut["ids"]) * len(models)
            begun = [m for m in models if any(bits.any() for bits in done[m].values())]
            owed += len(cut["ids"]) * (len(models) - len(begun))
            if not begun:
                continue
            table = file.read_row_groups(list(range(*cut["groups"]))).unify_dictionaries()
            task = table.column("task").combine_chunks()
            names: list[str] = task.dictionary.to_pylist()
            numbers, ordinals = task.indices.to_numpy(), table.column("ordinal").to_numpy()
            shard = table.column("shard").to_numpy()
            for model in begun:
                left = np.ones(len(shard), bool)
                for i, name in enumerate(names):
                    rows = np.flatnonzero(numbers == i)
                    if name in done[model] and len(rows):
                        left[rows] = np.unpackbits(done[model][name])[ordinals[rows]] == 0
                owed += len(np.unique(shard[left]))
    return every, owed


def _rows(shards: Sequence[Shard]) -> tuple[_Rows, list[str], list[float]]:
    """The rows of a cut, and each shard's name and cost."""
    if isinstance(shards, Shards):
        task, ordinal = shards.cut.places()
        rows = _Rows(names=shards.cut.order.table.fingerprints, task=task, ordinal=ordinal, ends=shards.cut.ends)
        return rows, [shard_id(i) for i in range(len(shards))], shards.cut.cost_s.tolist()
    names = list(dict.fromkeys(task for s in shards for task, _ in s.items))
    number = {name: i for i, name in enumerate(names)}
    rows = _Rows(
        names=names,
        task=np.fromiter((number[task] for s in shards for task, _ in s.items), np.int32),
        ordinal=np.fromiter((ordinal for s in shards for _, ordinal in s.items), np.int32),
        ends=np.cumsum([len(s.items) for s in shards]).astype(np.int64),
    )
    return rows, [s.id for s in shards], [s.cost_s for s in shards]


def _table(rows: _Rows) -> Any:
    shard = np.repeat(np.arange(len(rows.ends), dtype=np.int32), np.diff(rows.ends, prepend=0))
    task = pa.DictionaryArray.from_arrays(pa.array(rows.task), pa.array(list(rows.names), pa.string()))
    return pa.table([pa.array(shard), task, pa.array(rows.ordinal)], schema=_SCHEMA)
