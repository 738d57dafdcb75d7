"""How many shards of a plan are done, by the bits of what is answered."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from proctor.records import Shard
from proctor.worker.plan_file import count_shards, read_plan, write_plan


def shards(model: str) -> list[Shard]:
    return [
        Shard(id="000000", model=model, items=(("t", 0), ("t", 1), ("u", 0)), cost_s=3.0),
        Shard(id="000001", model=model, items=(("u", 1),), cost_s=1.0),
        Shard(id="000002", model=model, items=(("t", 9),), cost_s=1.0),
    ]


def bits(*ordinals: int) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    flags = np.zeros(10, np.uint8)
    flags[list(ordinals)] = 1
    return np.packbits(flags)


def test_a_shard_is_done_when_all_of_it_is_answered(tmp_path: Path) -> None:
    path = tmp_path / "plan.bits"
    write_plan(path, {"a": shards("a"), "b": shards("b")})
    assert list(read_plan(path, "a") or ()) == shards("a")
    none = {"t": bits(), "u": bits()}
    assert count_shards(path, {"a": none, "b": none}) == (6, 6)
    assert count_shards(path, {"a": {"t": bits(0, 1), "u": bits(1)}, "b": none}) == (6, 5)
    assert count_shards(path, {"a": {"t": bits(0, 1, 9), "u": bits(0, 1)}}) == (3, 0)
    assert count_shards(path, {"unplanned": none}) == (0, 0)
    assert count_shards(tmp_path / "none", {"a": none}) == (0, 0)
