"""Scores: one pair of parquet files for each scoring job, the latest of each suite counts."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Final

from proctor.records import Coverage, SampleScore, ScoreRow
from proctor.store.arrow import checked, opened, pa, pq, read_table
from proctor.store.durable import make_directory, publish, store_errors

_META: Final = b"proctor"


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredSuite:
    """One suite marked for one model: the unit that a later scoring replaces as a whole."""

    model: str
    """Display name."""
    label: str
    """Checkpoint label, or `main`."""
    suite: str
    """The suite's id."""
    rows: tuple[ScoreRow, ...]
    samples: tuple[SampleScore, ...] = ()
    run: str = ""
    """Set when read."""
    written: float = 0.0
    """Unix time; set when read."""

    @property
    def identity(self) -> tuple[str, str, str, str]:
        """What a later scoring must share to replace this one."""
        return (self.run, self.model, self.label, self.suite)


def write_scores(directory: Path, run: str, scored: Sequence[ScoredSuite]) -> str:
    """Write one part for all of `scored`; its name. Raises StoreError."""
    name = uuid.uuid4().hex
    head = {"run": run, "written": time.time(), "suites": [[s.model, s.label, s.suite] for s in scored]}
    with store_errors("write scores", directory):
        make_directory(directory)
        # The rows come last: a part that is there has its samples.
        _publish(directory / f"samples-{name}.parquet", _sample_columns(run, scored), _SAMPLE_SCHEMA, head)
        _publish(directory / f"part-{name}.parquet", _row_columns(run, scored), _ROW_SCHEMA, head)
    return name


def read_scores(directory: Path, *, run: str | None = None, samples: bool = False) -> list[ScoredSuite]:
    """The latest scores of each run, model, label and suite, in the order they were written. Raises StoreError.

    Samples are read only when asked for: they hold every prompt and answer.
    """
    latest: dict[tuple[str, str, str, str], tuple[Path, int]] = {}
    with store_errors("read scores", directory):
        if not directory.is_dir():
            return []
        heads = {path: _head(path) for path in directory.glob("part-*.parquet")}
        for path in sorted(heads, key=lambda path: (heads[path]["written"], path.name)):
            for n, (model, label, suite) in enumerate(heads[path]["suites"]):
                identity = (heads[path]["run"], model, label, suite)
                # Taken out first, so that the order is that of the last writing.
                latest.pop(identity, None)
                latest[identity] = (path, n)
        wanted = {identity: at for identity, at in latest.items() if run is None or identity[0] == run}
        parts = {path: _rows_of(path) for path in {path for path, _ in wanted.values()}}
        details = {path: _samples_of(path) for path in parts} if samples else {}
    return [
        ScoredSuite(
            run=owner,
            model=model,
            label=label,
            suite=suite,
            rows=tuple(parts[path].get(n, ())),
            samples=tuple(details.get(path, {}).get(n, ())),
            written=heads[path]["written"],
        )
        for (owner, model, label, suite), (path, n) in wanted.items()
    ]


_TYPES: Final[dict[str, Any]] = {
    **dict.fromkeys(("step", "n", "n_expected", "num_fewshot", "tokens_trained", "doc_id"), pa.int64()),
    **dict.fromkeys(("value", "stderr", "low", "high"), pa.float64()),
    **dict.fromkeys(("higher_is_better", "is_group"), pa.bool_()),
    **dict.fromkeys(("engines", "responses", "extracted", "keys"), pa.list_(pa.large_string())),
    "metrics": pa.map_(pa.string(), pa.float64()),
}
"""Columns that are not text."""


def _schema(names: Iterable[str]) -> Any:
    head = [("ordinal", pa.int32()), ("run", pa.string()), ("suite", pa.string())]
    return pa.schema(head + [(name, _TYPES.get(name, pa.large_string())) for name in names])


_ROW_FIELDS: Final = [f.name for f in fields(ScoreRow)]
_SAMPLE_FIELDS: Final = [f.name for f in fields(SampleScore)]
_ROW_SCHEMA: Final = _schema(_ROW_FIELDS)
_SAMPLE_SCHEMA: Final = _schema(["model", "label", *_SAMPLE_FIELDS])


def _row_columns(run: str, scored: Sequence[ScoredSuite]) -> dict[str, list[Any]]:
    rows = [row for one in scored for row in one.rows]
    columns = {name: [getattr(row, name) for row in rows] for name in _ROW_FIELDS}
    columns["coverage"] = [json.dumps(asdict(row.coverage)) for row in rows]
    return columns | _places(run, [(n, one) for n, one in enumerate(scored) for _ in one.rows])


def _places(run: str, owners: Sequence[tuple[int, ScoredSuite]]) -> dict[str, list[Any]]:
    """Of which suite each line is."""
    return {
        "ordinal": [n for n, _ in owners],
        "run": [run] * len(owners),
        "suite": [one.suite for _, one in owners],
    }


def _row(cells: dict[str, Any]) -> ScoreRow:
    coverage = json.loads(cells["coverage"])
    coverage["failures"] = tuple((name, count) for name, count in coverage["failures"])
    values: dict[str, Any] = {name: cells[name] for name in _ROW_FIELDS}
    values |= {"coverage": Coverage(**coverage), "engines": tuple(cells["engines"])}
    return ScoreRow(**values)


def _sample_columns(run: str, scored: Sequence[ScoredSuite]) -> dict[str, list[Any]]:
    samples = [sample for one in scored for sample in one.samples]
    columns: dict[str, list[Any]] = {name: [getattr(sample, name) for sample in samples] for name in _SAMPLE_FIELDS}
    for name in ("prompt", "target"):
        columns[name] = [_text(value) for value in columns[name]]
    for name in ("responses", "extracted"):
        columns[name] = [[_text(value) for value in values] for values in columns[name]]
    owners = [(n, one) for n, one in enumerate(scored) for _ in one.samples]
    whose = {"model": [one.model for _, one in owners], "label": [one.label for _, one in owners]}
    return columns | whose | _places(run, owners)


def _sample(cells: dict[str, Any]) -> SampleScore:
    values: dict[str, Any] = {name: cells[name] for name in _SAMPLE_FIELDS}
    values |= {name: tuple(values[name]) for name in ("responses", "extracted", "keys")}
    values["metrics"] = tuple((name, value) for name, value in values["metrics"])
    return SampleScore(**values)


def _text(value: str) -> str:
    """Parquet holds UTF-8 only: a lone surrogate, which a server may send, becomes its escape."""
    return value if value.isascii() else value.encode("utf-8", "backslashreplace").decode("utf-8")


def _publish(path: Path, columns: dict[str, list[Any]], schema: Any, head: dict[str, Any]) -> None:
    table = pa.Table.from_pydict(columns, schema=schema.with_metadata({_META: json.dumps(head)}))

    def write(temp: Path) -> None:
        pq.write_table(table, temp, compression="zstd", write_page_checksum=True)

    publish(path, write)


def _head(path: Path) -> dict[str, Any]:
    with opened(path, _HINT) as file:
        return checked(path, _HINT, lambda: json.loads(file.schema_arrow.metadata[_META]))


def _rows_of(path: Path) -> dict[int, list[ScoreRow]]:
    """The rows of each suite of a part, by its ordinal there."""
    out: dict[int, list[ScoreRow]] = {}
    for cells in _cells(path):
        out.setdefault(cells["ordinal"], []).append(_row(cells))
    return out


def _samples_of(path: Path) -> dict[int, list[SampleScore]]:
    """The samples of each suite of a part, by its ordinal there."""
    out: dict[int, list[SampleScore]] = {}
    for cells in _cells(path.with_name(path.name.replace("part-", "samples-", 1))):
        out.setdefault(cells["ordinal"], []).append(_sample(cells))
    return out


def _cells(path: Path) -> list[dict[str, Any]]:
    return read_table(path, _HINT).to_pylist()


_HINT: Final = "delete it and run `proctor score` again"
