"""Request tables, cuts that models share, strategies, and the file of a plan."""

import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proctor.plan import (
    CostModel,
    Cut,
    Cutter,
    Lengths,
    Priced,
    RequestTable,
    Shards,
    ShardSizes,
    Strategy,
    StrategyName,
    TaskRequests,
)
from proctor.worker.run_directory import RunDirectory


def task(name: str, keys: list[int], *, choices: int = 1, cap: int = 64) -> TaskRequests:
    n = len(keys)
    return TaskRequests(
        fingerprint=f"fp-{name}",
        task=name,
        num_fewshot=0,
        keys=np.array([[k % 3, k] for k in keys], dtype=np.uint64).reshape(-1, 2),
        documents=np.arange(n, dtype=np.int64) // choices,
        characters=np.arange(n, dtype=np.int64) % 7 * 400 + 100,
        caps=np.full(n, cap, dtype=np.int64),
    )


tables = st.lists(st.lists(st.integers(0, 40), max_size=30), min_size=1, max_size=4).map(
    lambda found: [task(f"t{i}", keys, choices=1 + i, cap=64 * (i % 2)) for i, keys in enumerate(found)]
)


@given(tables)
def test_a_question_is_first_once_in_its_task_and_once_in_the_run(tasks: list[TaskRequests]) -> None:
    table = RequestTable.of(tasks)
    first = np.unpackbits(table.first, count=table.rows)
    in_task = np.unpackbits(table.first_in_task, count=table.rows)
    seen: set[int] = set()
    for i, one in enumerate(tasks):
        here: set[int] = set()
        for ordinal, key in enumerate(one.keys[:, 1].tolist()):
            row = int(table.starts[i]) + ordinal
            assert (first[row], in_task[row]) == (key not in seen, key not in here)
            seen.add(key)
            here.add(key)
    assert table.counts(table.first).sum() == len(seen)


@given(
    tables,
    st.integers(0, 2**32),
    st.sampled_from(["balanced", "naive", "size", "workers"]),
    st.integers(1, 5),
    st.booleans(),
)
def test_every_owed_question_is_in_exactly_one_shard(
    tasks: list[TaskRequests], seed: int, name: StrategyName, workers: int, split: bool
) -> None:
    table = RequestTable.of(tasks)
    owed = np.random.default_rng(seed).integers(0, 256, table.rows // 8).astype(np.uint8) & table.first
    strategy = Strategy(name=name, max_task_size=100, min_task_size=3, split=split, n=2)
    cut = Cutter(Priced.of(table, CostModel()), strategy).cut(owed, ShardSizes(workers=workers, max_requests=9))
    shards = Shards("m", cut)
    items = [item for shard in shards for item in shard.items]
    wanted = np.flatnonzero(np.unpackbits(owed, count=table.rows)).tolist()
    start = dict(zip(table.fingerprints, table.starts.tolist(), strict=False))
    assert sorted(start[fp] + ordinal for fp, ordinal in items) == wanted
    assert cut.requests == len(wanted)
    assert all(shard.items for shard in shards)
    assert [shards[i] for i in range(len(shards))] == list(shards) == shards


def test_models_that_owe_the_same_share_one_cut() -> None:
    table = RequestTable.of([task("t", list(range(50)))])
    cutter = Cutter(Priced.of(table, CostModel()), Strategy())
    half = table.first.copy()
    half[3:] = 0
    cuts = [cutter.cut(owed.copy(), ShardSizes()) for owed in (table.first, half, table.first)]
    assert cuts[0] is cuts[2]
    assert [c.requests for c in cuts] == [50, 24, 50]


def test_a_named_strategy_makes_its_published_tasks() -> None:
    table = RequestTable.of([task("a", list(range(100))), task("q", list(range(100, 180)), choices=2, cap=0)])
    strategy = Strategy(name="size", max_task_size=1000)
    cut = Cutter(Priced.of(table, CostModel()), strategy).cut(table.first, ShardSizes())
    # a: 100 generations at 20 each are two parts of 50; q: 40 documents of two choices cost 80 and stay whole.
    assert [(s.items[0][0], len(s.items)) for s in Shards("m", cut)] == [("fp-a", 50), ("fp-a", 50), ("fp-q", 80)]
    owed = table.first.copy()
    owed[:6] = 0
    cut = Cutter(Priced.of(table, CostModel()), strategy).cut(owed, ShardSizes())
    assert [len(s.items) for s in Shards("m", cut)] == [2, 50, 80]
    owed[6] = 0
    cut = Cutter(Priced.of(table, CostModel()), strategy).cut(owed, ShardSizes())
    assert [(s.items[0], len(s.items)) for s in Shards("m", cut)] == [(("fp-a", 56), 44), (("fp-q", 0), 80)]


def test_costs_are_sums_of_what_is_owed() -> None:
    table = RequestTable.of([task("a", [1, 2, 3]), task("empty", []), task("b", [3, 4])])
    priced = Priced.of(table, CostModel())
    found = priced.totals(table.first).cost_s
    each = [CostModel().seconds(t.characters, t.caps) for t in table.tasks]
    assert found.tolist() == pytest.approx([each[0].sum(), 0, each[2][1]], abs=1e-4)  # in 64ths of a token


@given(tables, st.integers(0, 2**32))
def test_sums_over_bits_are_sums_over_rows(tasks: list[TaskRequests], seed: int) -> None:
    table, model = RequestTable.of(tasks), CostModel(decode_share=0.37)
    bits = np.random.default_rng(seed).integers(0, 256, table.rows // 8).astype(np.uint8) & table.first
    priced = Priced.of(table, model)
    found, longest = priced.totals(bits), 0.0
    chosen = np.unpackbits(bits, count=table.rows).astype(bool)
    for i, one in enumerate(tasks):
        mine = chosen[int(table.starts[i]) :][: len(one)]
        tokens = model.tokens(one.characters, one.caps)
        cost_s = model.cost_s(tokens)[mine]
        longest = max(longest, cost_s.max(initial=0.0))
        assert found.requests[i] == mine.sum()
        assert found.prompt_tokens[i] == pytest.approx(tokens.prompt[mine].sum(), abs=0.01 * len(one))
        assert found.completion_tokens[i] == pytest.approx(tokens.completion[mine].sum(), abs=0.01 * len(one))
        assert found.cost_s[i] == pytest.approx(cost_s.sum(), abs=1e-4 * len(one) + 1e-9)
    assert priced.longest_s(bits) == pytest.approx(longest, abs=1e-6)


def test_measured_lengths_replace_the_prior_as_they_grow() -> None:
    model = CostModel(decode_share=0.5)
    caps, characters = np.array([100, 10]), np.array([800, 800])
    assert model.tokens(characters, caps).completion.tolist() == [50, 5]
    little = Lengths(answers=16, characters=1600, caps=1600, prompt_tokens=800, completion_tokens=160)
    assert model.tokens(characters, caps, little).completion.tolist() == [30, 7.5]
    assert model.tokens(characters, caps, little).prompt.tolist() == [400, 400]
    much = Lengths(answers=16_000, characters=1, caps=1, prompt_tokens=0, completion_tokens=160_000)
    assert model.tokens(characters, caps, much).completion == pytest.approx([10, 10], rel=0.01)


def test_models_with_the_same_cut_share_their_rows_on_disk(tmp_path: Path) -> None:
    table = RequestTable.of([task("a", list(range(3000))), task("b", list(range(3000, 4000)))])
    cutter = Cutter(Priced.of(table, CostModel()), Strategy())
    cut = cutter.cut(table.first, ShardSizes(workers=2))
    directory = RunDirectory(tmp_path)
    directory.create()
    directory.write_plan({"one": Shards("one", cut)})
    alone = directory.plan.stat().st_size
    directory.write_plan({f"m{i}": Shards(f"m{i}", cut) for i in range(50)})
    assert directory.plan.stat().st_size < 2 * alone
    assert directory.read_shards("m49") == list(Shards("m49", cut))
    assert directory.read_shards("other") == []


@given(tables, st.integers(0, 2**32), st.sampled_from(["balanced", "naive", "size", "workers"]), st.integers(1, 5))
def test_whoever_reads_a_plan_cuts_as_the_planner_would(
    tasks: list[TaskRequests], seed: int, name: StrategyName, workers: int
) -> None:
    table = RequestTable.of(tasks)
    cutter = Cutter(Priced.of(table, CostModel()), Strategy(name=name, max_task_size=100, min_task_size=3))
    rng = np.random.default_rng(seed)
    owed = {f"m{i}": rng.integers(0, 256, table.rows // 8).astype(np.uint8) & table.first for i in range(3)}
    sizes = ShardSizes(workers=workers, max_requests=9, limit_s=30.0)
    made = {model: Shards(model, cutter.cut(bits, sizes)) for model, bits in owed.items()}
    with tempfile.TemporaryDirectory() as place:
        directory = RunDirectory(Path(place))
        directory.create()
        directory.write_plan(made)
        for model, shards in made.items():
            assert directory.read_shards(model) == list(shards)


@pytest.mark.parametrize("workers", [1, 4, 64])
@pytest.mark.parametrize("limit", [1000, 20_000], ids=["few requests a shard", "many"])
def test_shards_that_nobody_has_looked_at_are_counted_from_a_sample(workers: int, limit: int) -> None:
    rng = np.random.default_rng(5)
    many = [task(f"t{i}", list(range(i * 40_000, (i + 1) * 40_000)), cap=64 * (i % 2)) for i in range(4)]
    many = [replace(t, characters=rng.lognormal(7, 1.0, len(t)).astype(np.int64)) for t in many]
    table = RequestTable.of(many)
    half = rng.integers(0, 256, table.rows // 8).astype(np.uint8) & table.first
    half[: table.rows // 32] = 0  # most of one task is done
    cut = Cutter(Priced.of(table, CostModel()), Strategy()).cut(half, ShardSizes(workers=workers, max_requests=limit))
    fresh = Cut(order=cut.order, owed=cut.owed, sizes=cut.sizes)
    assert not fresh.made
    assert fresh.about() == pytest.approx(len(cut.ends), rel=0.03, abs=2)
    assert cut.about() == len(cut.ends)


@given(
    tables,
    st.sampled_from(["balanced", "naive", "size", "workers"]),
    st.floats(0.05, 30, allow_subnormal=False),
)
def test_whatever_the_strategy_a_shard_fits_the_time_limit(
    tasks: list[TaskRequests], name: StrategyName, limit_s: float
) -> None:
    table = RequestTable.of(tasks)
    priced = Priced.of(table, CostModel())
    cutter = Cutter(priced, Strategy(name=name, max_task_size=100, min_task_size=3, n=2))
    free = Shards("m", cutter.cut(table.first, ShardSizes(workers=2)))
    shards = Shards("m", cutter.cut(table.first, ShardSizes(workers=2, limit_s=limit_s)))
    assert [i for s in shards for i in s.items] == [i for s in free for i in s.items]
    assert all(s.cost_s <= limit_s + 1e-6 or len(s.items) == 1 for s in shards)
    if all(s.cost_s < limit_s for s in free):
        assert shards == free


def test_a_shard_that_does_not_fit_is_cut_where_it_stops_to_fit() -> None:
    table = RequestTable.of([task("a", list(range(6)), cap=0), task("b", [10, 11], cap=0)])
    priced = Priced.of(table, CostModel(prefill_tokens_s=1e9, request_s=1.0))
    strategy = Strategy(name="naive")
    cut = Cutter(priced, strategy).cut(table.first, ShardSizes(limit_s=2.5))
    assert [len(s.items) for s in Shards("m", cut)] == [2, 2, 2, 2]
    cut = Cutter(priced, strategy).cut(table.first, ShardSizes(limit_s=5.5))
    assert [len(s.items) for s in Shards("m", cut)] == [5, 1, 2]
    cut = Cutter(priced, strategy).cut(table.first, ShardSizes(limit_s=0.5))
    assert [len(s.items) for s in Shards("m", cut)] == [1] * 8
