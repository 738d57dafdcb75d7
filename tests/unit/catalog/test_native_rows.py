"""Reading data sets: every format, and every way to be malformed."""

from __future__ import annotations

import json
import math
import sys
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from proctor.catalog.native_rows import read_file, read_rows
from proctor.config.native_task import DatasetSpec
from proctor.errors import MissingTool, TaskError

WANTED = ({"q": "Größe\u2028?", "a": "1"}, {"q": "x,y", "a": "2"})


def write(path: Path) -> Path:
    rows = [dict(r) for r in WANTED]
    match path.suffix:
        case ".jsonl":
            text = "\n" + "\n\n".join(json.dumps(r, ensure_ascii=False) for r in rows) + "\n"
        case ".json":
            text = "\ufeff" + json.dumps(rows)
        case ".csv":
            text = 'q,a\r\nGröße\u2028?,1\r\n"x,y",2\r\n'
        case ".tsv":
            text = "q\ta\nGröße\u2028?\t1\nx,y\t2\n"
        case _:
            pq.write_table(pa.Table.from_pylist(rows), path)
            return path
    path.write_text(text, encoding="utf-8", newline="")
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".tsv", ".parquet"])
def test_one_content_in_any_format(suffix: str, tmp_path: Path) -> None:
    read = read_file(write(tmp_path / f"data{suffix}"))
    assert read.rows == WANTED
    assert read.digest == read_file(write(tmp_path / "other.jsonl")).digest


def test_place_counts_lines_of_the_file(tmp_path: Path) -> None:
    assert read_file(write(tmp_path / "d.jsonl")).place(1).endswith("line 4")
    assert read_file(write(tmp_path / "d.csv")).place(1).endswith("line 3")
    assert read_file(write(tmp_path / "d.parquet")).place(1).endswith("row 1")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.jsonl", b'{"a": 1}\n{"a":\n', "line 2: not valid JSON"),
        ("d.jsonl", b'{"a": 1}\n[1]\n', "line 2: must be an object with fields, not list"),
        ("d.jsonl", b"\xff\xfe", "not UTF-8"),
        ("d.jsonl", b"\n \n", "is empty"),
        ("d.json", b'{"a": 1}', "must hold a list of objects, not dict"),
        ("d.json", b"[1", "not valid JSON"),
        ("d.json", b"[]", "is empty"),
        ("d.csv", b"a,b\n1,2\n3\n", "line 3: fewer cells than the header's 2"),
        ("d.csv", b"a,b\n1,2,3\n", "line 2: more cells"),
        ("d.csv", b'a,b\n1,"2\n', "unexpected end of data"),
        ("d.csv", b"a,b\n", "is empty"),
        ("d.parquet", b"nonsense", "not a Parquet file"),
        ("d.xlsx", b"x", "unknown suffix '.xlsx'; valid: .jsonl"),
        ("d", b"x", "unknown suffix ''"),
    ],
)
def test_malformed(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TaskError, match=message):
        read_rows(DatasetSpec(path=name), tmp_path)


def test_missing_file_and_directory(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").mkdir()
    for name in ("nothing.jsonl", "nothing.parquet", "d.jsonl"):
        with pytest.raises(TaskError, match="cannot read the data set") as caught:
            read_rows(DatasetSpec(path=name), tmp_path)
        assert "relative to the task file" in str(caught.value)


def test_values_become_plain_and_what_is_no_text_is_left_out(tmp_path: Path) -> None:
    when = datetime(2020, 1, 2, tzinfo=UTC)
    table = pa.Table.from_pylist(
        [{"when": when, "price": Decimal("1.50"), "odd": math.nan, "deep": {"x": [1, None]}, "image": b"\x00"}]
    )
    pq.write_table(table, tmp_path / "d.parquet")
    read = read_file(tmp_path / "d.parquet")
    assert read.rows == ({"when": when.isoformat(), "price": "1.50", "odd": "nan", "deep": {"x": [1, None]}},)
    assert read.omitted == ("image",)


def test_hub_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingTool, match="org/name") as caught:
        read_rows(DatasetSpec(hub="org/name"), tmp_path)
    assert "pip install 'proctor-evals[hub]'" in str(caught.value)


def test_hub_is_asked_for_subset_split_and_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load_dataset(*args: Any, **kwargs: Any) -> list[dict[str, Any]]:
        asked.append((args, kwargs))
        if kwargs["split"] == "nope":
            raise ValueError('Unknown split "nope"')
        return [{"q": "x"}]

    fake = ModuleType("datasets")
    fake.__dict__["load_dataset"] = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", fake)
    spec = DatasetSpec(hub="org/name", name="subset", revision="abc")
    assert read_rows(spec, tmp_path).rows == ({"q": "x"},)
    assert asked == [(("org/name", "subset"), {"split": "test", "revision": "abc"})]
    with pytest.raises(TaskError, match="Unknown split"):
        read_rows(DatasetSpec(hub="org/name", split="nope"), tmp_path)
