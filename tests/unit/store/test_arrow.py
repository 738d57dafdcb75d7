"""What Arrow is given to read from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from proctor.errors import StoreError
from proctor.store import arrow
from proctor.store.arrow import opened, pa, pq, read_table


def test_arrow_reads_from_a_file_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # From a Python file its threads hold Python buffers; one that is let go of while the interpreter ends aborts it.
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"a": [1, 2]}), path)
    given: list[Any] = []

    class Parquet:
        @staticmethod
        def ParquetFile(source: Any, **settings: Any) -> Any:
            given.append(source)
            return pq.ParquetFile(source, **settings)

    monkeypatch.setattr(arrow, "pq", Parquet)
    assert read_table(path, "hint").to_pylist() == [{"a": 1}, {"a": 2}]
    assert [isinstance(source, pa.NativeFile) and not isinstance(source, pa.PythonFile) for source in given] == [True]
    assert given[0].closed


def test_a_missing_file_is_no_damaged_one(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    with pytest.raises(FileNotFoundError) as caught, opened(path, "hint"):
        pass
    assert str(caught.value) == f"[Errno 2] No such file or directory: {str(path)!r}"


def test_what_is_no_file_is_damage(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="is damaged"), opened(tmp_path, "hint"):
        pass
