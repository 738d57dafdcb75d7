"""The production cut in simulation: how much longer than the best possible, with predictions that are wrong."""

from __future__ import annotations

import heapq

import numpy as np
import pytest

from proctor.plan import OwedTask, cut_shards
from proctor.plan.cuts import floor_s

WORK_S = 36_000.0
CLAIM_S = 0.05
SHAPES = {"uniform": 0.3, "heavy": 1.2}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("sigma", "goal"), [(0.5, 1.02), (1.0, 1.10)])
@pytest.mark.parametrize("workers", [1, 8, 64])
def test_workers_end_together_although_predictions_are_wrong(
    shape: str, sigma: float, goal: float, workers: int
) -> None:
    """Of each request and of each of eight tasks as a whole, by a log-normal factor."""
    rng = np.random.default_rng(11)
    cost = rng.lognormal(0, SHAPES[shape], (8, 2500))
    cost *= WORK_S / cost.sum()
    predicted = cost * rng.lognormal(0, sigma, cost.shape) * rng.lognormal(0, sigma, (8, 1))
    every = np.arange(2500)
    owed = [OwedTask(fingerprint=str(i), ordinals=every, documents=every, cost_s=predicted[i]) for i in range(8)]
    free = [0.0] * workers
    for shard in cut_shards("m", owed, workers=workers):
        took = sum(cost[int(task), ordinal] for task, ordinal in shard.items)
        heapq.heapreplace(free, free[0] + took + CLAIM_S)
    assert max(free) <= goal * max(cost.max(), WORK_S / workers)


def test_the_floor_follows_what_each_worker_does() -> None:
    assert [floor_s(WORK_S, w) for w in (1, 8, 30, 64, 1024)] == [2.0, 2.0, 1.2, 0.5625, 0.5]
