"""What a node finds wrong with the files that a run was prepared with."""

from __future__ import annotations

from pathlib import Path

import pytest

from proctor.errors import ModelError, StoreError
from proctor.worker.bundle import BLOCK, Bundle, Piece, sampled_digest


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    path.write_bytes(bytes(range(256)) * (5 * BLOCK // 256))
    return path


def test_as_prepared(weights: Path, tmp_path: Path) -> None:
    bundle = Bundle(pieces=(Piece.of(weights, kind="weights", models=["a"]),))
    path = tmp_path / "bundle.json"
    path.write_text(bundle.to_json(), encoding="utf-8")
    read = Bundle.read(path)
    assert read == bundle
    bundle.check("a")
    assert Bundle.read(tmp_path / "none.json") is None


@pytest.mark.parametrize("at", [0, 2 * BLOCK + BLOCK // 2, 5 * BLOCK - 1], ids=["first", "middle", "last"])
def test_other_contents(weights: Path, at: int) -> None:
    bundle = Bundle(pieces=(Piece.of(weights, kind="weights", models=["a"]),))
    with weights.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)
        file.seek(at)
        file.write(bytes([byte[0] ^ 1]))
    with pytest.raises(ModelError, match="other contents"):
        bundle.check("a")
    bundle.check("another model")


def test_missing_and_cut(weights: Path) -> None:
    bundle = Bundle(pieces=(Piece.of(weights, kind="weights"),))
    with weights.open("r+b") as file:
        file.truncate(100)
    with pytest.raises(ModelError, match=f"has 100 bytes, not {5 * BLOCK}"):
        bundle.check("a")
    weights.unlink()
    with pytest.raises(ModelError, match="is missing") as caught:
        bundle.check("a")
    assert "proctor prepare" in (caught.value.hint or "")


def test_damaged_list(tmp_path: Path) -> None:
    path = tmp_path / "bundle.json"
    path.write_text('{"version": 1, "pieces": [{"kind"')
    with pytest.raises(StoreError, match=r"bundle\.json"):
        Bundle.read(path)


def test_small_files_are_compared_whole(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    digests: set[str] = set()
    for i in range(0, 1000, 37):
        data = bytearray(1000)
        data[i] = 1
        path.write_bytes(bytes(data))
        digests.add(sampled_digest(path))
    assert len(digests) == len(range(0, 1000, 37))
