"""The documents of a native task: rows of a local file or of a hub data set."""

from __future__ import annotations

import csv
import hashlib
import importlib
import io
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import date, datetime, time
from decimal import Decimal
from pathlib import Path
from typing import Any, Final, cast

from proctor.config.native_task import DatasetSpec
from proctor.errors import MissingTool, TaskError
from proctor.records import Json, digest

SUFFIXES: Final = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")

Row = Mapping[str, Json]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Documents in file order, and what identifies their content."""

    name: str
    """The file's path, or the hub's name, for messages."""
    rows: tuple[Row, ...]
    digest: str
    """SHA-256 of the rows' canonical form: the same for one content in any format."""
    lines: tuple[int, ...] = ()
    """Line number in the file of each row, where the format has lines."""
    omitted: tuple[str, ...] = ()
    """Fields left out because they hold no text, number or list (images, audio, bytes)."""

    def place(self, index: int) -> str:
        """Where row `index` is, in words."""
        if self.lines:
            return f"{self.name!r}, line {self.lines[index]}"
        return f"{self.name!r}, row {index}"


def read_rows(spec: DatasetSpec, directory: Path) -> Rows:
    """Read every document. Raises TaskError for a missing, malformed or empty data set, MissingTool for
    a hub data set where the package `datasets` is not installed."""
    rows = read_file(directory / spec.path) if spec.path is not None else _read_hub(spec)
    if not rows.rows:
        raise TaskError(f"the data set {rows.name!r} is empty", hint="a task needs at least one document")
    return rows


def read_file(path: Path) -> Rows:
    """Read a local file by its suffix."""
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise TaskError(
            f"cannot read the data set {str(path)!r}: unknown suffix {suffix!r}; valid: {', '.join(SUFFIXES)}"
        )
    try:
        if suffix == ".parquet":
            return _read_parquet(path)
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise TaskError(
            f"cannot read the data set {str(path)!r}: {error.strerror or error}",
            hint="`dataset.path` is relative to the task file",
        ) from error
    except UnicodeDecodeError as error:
        raise TaskError(f"the data set {str(path)!r} is not UTF-8 text: {error}") from error
    if suffix in (".csv", ".tsv"):
        return _read_csv(path, text, "\t" if suffix == ".tsv" else ",")
    return _read_json(path, text) if suffix == ".json" else _read_jsonl(path, text)


def _read_jsonl(path: Path, text: str) -> Rows:
    rows: list[object] = []
    lines: list[int] = []
    # Not splitlines(): a JSON string may hold U+2028 and its kin as they are.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise TaskError(f"{str(path)!r}, line {number}: not valid JSON: {error}") from error
        lines.append(number)
    return _finished(str(path), rows, lines)


def _read_json(path: Path, text: str) -> Rows:
    try:
        value: object = json.loads(text)
    except ValueError as error:
        raise TaskError(f"{str(path)!r} is not valid JSON: {error}") from error
    if not isinstance(value, list):
        raise TaskError(f"{str(path)!r} must hold a list of objects, not {type(value).__name__}")
    return _finished(str(path), cast("list[object]", value), [])


def _read_csv(path: Path, text: str, delimiter: str) -> Rows:
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows: list[object] = []
    lines: list[int] = []
    try:
        for row in reader:
            if None in row or None in row.values():
                raise TaskError(
                    f"{str(path)!r}, line {reader.line_num}: {'more' if None in row else 'fewer'} cells than "
                    f"the header's {len(reader.fieldnames or ())}"
                )
            rows.append(row)
            lines.append(reader.line_num)
    except csv.Error as error:
        raise TaskError(f"{str(path)!r}, line {reader.line_num}: {error}") from error
    return _finished(str(path), rows, lines)


def _read_parquet(path: Path) -> Rows:
    # Imported here, and untyped: it is slow to load and ships no type information.
    pa: Any = importlib.import_module("pyarrow")
    pq: Any = importlib.import_module("pyarrow.parquet")
    try:
        table: Any = pq.read_table(path)
    except pa.ArrowException as error:
        raise TaskError(f"{str(path)!r} is not a Parquet file: {error}") from error
    return _finished(str(path), table.to_pylist(), [])


def _read_hub(spec: DatasetSpec) -> Rows:
    name = f"{spec.hub}" + (f" ({spec.name})" if spec.name else "")
    try:
        datasets = importlib.import_module("datasets")
    except ImportError as error:
        raise MissingTool(
            f"the data set {name!r} is on the hub; reading it needs the package datasets",
            hint="pip install 'proctor-evals[hub]', or save the data set as a file and use dataset.path",
        ) from error
    split = spec.split or "test"
    try:
        table = datasets.load_dataset(spec.hub, spec.name, split=split, revision=spec.revision)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise TaskError(f"cannot load the data set {name!r}, split {split!r}: {error}") from error
    return _finished(f"{name} [{split}]", list(table), [])


def _finished(name: str, rows: Iterable[object], lines: list[int]) -> Rows:
    kept: list[dict[str, Json]] = []
    omitted: set[str] = set()
    for index, row in enumerate(rows):
        if not isinstance(row, Mapping):
            where = f"line {lines[index]}" if lines else f"row {index}"
            raise TaskError(f"{name!r}, {where}: must be an object with fields, not {type(row).__name__}")
        plain: dict[str, Json] = {}
        for key, value in cast("Mapping[object, object]", row).items():
            try:
                plain[str(key)] = _plain(value)
            except TypeError:
                omitted.add(str(key))
        kept.append(plain)
    shown = tuple({k: v for k, v in row.items() if k not in omitted} for row in kept)
    if len(shown) == 0:
        content = hashlib.sha256(b"").hexdigest()
    else:
        content = digest(list(shown))
    return Rows(name=name, rows=shown, digest=content, lines=tuple(lines), omitted=tuple(sorted(omitted)))


def _plain(value: object) -> Json:
    """JSON for `value`; TypeError where there is none that people would read as text."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, datetime | date | time):
        return value.isoformat()
    if isinstance(value, Decimal):
        return str(value)
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in cast("Mapping[object, object]", value).items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in cast("list[object]", value)]
    raise TypeError(type(value).__name__)
