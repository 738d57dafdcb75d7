"""The published partition strategies, against recorded outputs of the original code."""

import json
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proctor.errors import ConfigError
from proctor.plan.partition import (
    Dataset,
    PartitionTask,
    actual_size,
    chosen,
    even_bounds,
    factor,
    longest_first,
    partition_naive,
    partition_size,
    partition_workers,
)

DATA = Path(__file__).parent / "data"
VECTORS: dict[str, Any] = json.loads((DATA / "opencompass_partitioners.json").read_text())
CRASHES: dict[str, str] = json.loads((DATA / "opencompass_crashes.json").read_text())

A = Dataset(name="a", total=1319)
B = Dataset(name="b", total=100)
C = Dataset(name="c", total=5000)
D = Dataset(name="d", total=300)
PIQA = Dataset(name="piqa", total=1838, template=("0", "1"))
GSM8K = Dataset(name="gsm8k", total=1319)
MMLU = Dataset(name="mmlu", total=14042, template=("A", "B", "C", "D"))

TASKS: dict[str, Callable[[], list[PartitionTask]]] = {
    "size_default_gsm8k(factor200)_piqa_ppl2_mmlu_ppl4": lambda: partition_size(["m"], [GSM8K, PIQA, MMLU]),
    "size_2000_gen_b100_d300": lambda: partition_size(["m"], [B, D], max_task_size=2000),
    "size_2000_c_gen5000": lambda: partition_size(["m"], [C], max_task_size=2000),
    "size_5000_mix": lambda: partition_size(["m"], [A, B, D, PIQA], max_task_size=5000),
    "size_split_strategy": lambda: partition_size(["m"], [A, B, D, PIQA], max_task_size=5000, strategy="split"),
    "size_skip_existing_part1": lambda: partition_size(
        ["m"], [C], max_task_size=2000, existing={("m", "c_1"), ("m", "c_3")}
    ),
    "size_test_range_double_application": lambda: partition_size(
        ["m"], [Dataset(name="c", total=5000, test_range="[100:200]")], max_task_size=2000
    ),
    "size_int_test_range_split": lambda: partition_size(
        ["m"], [Dataset(name="c", total=5000, test_range=1000)], max_task_size=2000
    ),
    "numworker_default": lambda: partition_workers(["m"], [A, B, D]),
    "numworker_min": lambda: partition_workers(["m"], [B]),
    "numworker_split_strategy_3": lambda: partition_workers(["m"], [B], num_worker=3, strategy="split"),
    "numworker_num_split_2": lambda: partition_workers(["m"], [B, D], num_split=2, strategy="split"),
    "numworker_1": lambda: partition_workers(["m"], [A, B], num_worker=1),
    "naive_n2": lambda: partition_naive(["m1", "m2"], [A, B, D], n=2, existing={("m1", "b")}),
}


def listed(tasks: list[PartitionTask]) -> list[list[list[str]]]:
    return [[[t.model, p.name, p.range_text] for p in t.parts] for t in tasks]


@pytest.mark.parametrize("name", TASKS)
def test_tasks_are_the_published_ones(name: str) -> None:
    assert listed(TASKS[name]()) == VECTORS[name]


FACTORS = {
    "factor gen": Dataset(name="x", total=1),
    "factor ppl3": Dataset(name="x", total=1, template=("A", "B", "C")),
    "factor math_x": Dataset(name="math_x", total=1),
    "factor bbh-x ppl3": Dataset(name="bbh-x", total=1, template=("A", "B", "C")),
    "factor gen begin/round dict": Dataset(name="x", total=1, template=("begin", "round")),
    "factor dict round + A": Dataset(name="x", total=1, template=("round", "A")),
}


@pytest.mark.parametrize("name", FACTORS)
def test_factors_are_the_published_ones(name: str) -> None:
    assert factor(FACTORS[name]) == VECTORS[name]


SIZES: dict[str, Any] = {
    "actual_size None of 1000": None,
    "actual_size '' of 1000": "",
    "actual_size 100 of 1000": 100,
    "actual_size 0.25 of 1000": 0.25,
    "actual_size -1 of 1000": -1,
    "actual_size 99999 of 1000": 99999,
    "actual_size '[:100]' of 1000": "[:100]",
    "actual_size '[10:20:2]' of 1000": "[10:20:2]",
}


@pytest.mark.parametrize("name", SIZES)
def test_sizes_are_the_published_ones(name: str) -> None:
    assert actual_size(SIZES[name], 1000) == VECTORS[name]


def test_no_vector_is_left_out() -> None:
    assert set(VECTORS) == set(TASKS) | set(FACTORS) | set(SIZES)
    assert set(CRASHES) == {"size_zero_div(factor>max)", "numworker_int_range", "actual_size '[5]' of 1000"}


# --- where the original stops with an error ---


def test_a_factor_above_the_largest_task_makes_parts_of_one_document() -> None:
    tasks = partition_size(["m"], [Dataset(name="math", total=3)], max_task_size=100)
    assert listed(tasks) == [[["m", f"math_{i}", f"[{i}: {i + 1}]"]] for i in range(3)]


def test_a_single_position_is_that_document() -> None:
    assert chosen("[5]", 1000).tolist() == [5]
    assert chosen("[-1]", 10).tolist() == [9]


def test_a_sample_is_split_by_position() -> None:
    dataset = Dataset(name="b", total=100, test_range=40)
    parts = [p for t in partition_workers(["m"], [dataset], num_worker=2) for p in t.parts]
    assert [p.range_text for p in parts] == ["40[0:20]", "40[20:40]"]
    found = [chosen(p.range_text, 100).tolist() for p in parts]
    assert found[0] + found[1] == chosen(40, 100).tolist()
    assert len(set(found[0] + found[1])) == 40


@pytest.mark.parametrize("text", ["[1000]", "[]", "5 to 9", "[::0]", "__import__('os')", "[0:5", "[a:b]", "[-:3]"])
def test_what_is_no_range_is_an_error_that_names_it(text: str) -> None:
    with pytest.raises(ConfigError) as error:
        chosen(text, 1000)
    assert repr(text) in error.value.message


def test_limits_below_one_are_errors() -> None:
    with pytest.raises(ConfigError, match="max_task_size is 0"):
        partition_size(["m"], [A], max_task_size=0)
    with pytest.raises(ConfigError, match="n is 0"):
        partition_naive(["m"], [A], n=0)
    with pytest.raises(ConfigError, match="num_worker is 0"):
        partition_workers(["m"], [A], num_worker=0)


# --- whatever the input ---

texts = st.one_of(
    st.none(),
    st.integers(-3, 500),
    st.sampled_from(["", "[:50]", "[7:]", "[::3]", "[10:200][5:]", "100[3:40]"]),
)
datasets = st.lists(
    st.builds(
        Dataset,
        name=st.sampled_from(["a", "gsm8k", "bbh-x", "q"]),
        total=st.integers(0, 400),
        test_range=texts,
        template=st.sampled_from([None, ("A", "B"), ("round",)]),
    ),
    max_size=4,
    unique_by=lambda d: d.name,
)


@given(datasets, st.integers(1, 3000), st.integers(1, 9), st.sampled_from(["heuristic", "split"]))
def test_every_document_is_in_exactly_one_part(found: list[Dataset], most: int, width: int, strategy: Any) -> None:
    for tasks in (
        partition_naive(["m"], found, n=width),
        partition_size(["m"], found, max_task_size=most, strategy=strategy),
        partition_workers(["m"], found, num_worker=width, strategy=strategy),
    ):
        asked: dict[str, list[int]] = {d.name: [] for d in found}
        total = {d.name: d.total for d in found}
        for part in (p for t in tasks for p in t.parts):
            asked[part.dataset] += chosen(part.test_range, total[part.dataset]).tolist()
        for dataset in found:
            assert sorted(asked[dataset.name]) == sorted(chosen(dataset.test_range, dataset.total).tolist())


@given(st.integers(0, 10_000), st.integers(1, 300))
def test_even_bounds_cover_everything_and_differ_by_one(total: int, parts: int) -> None:
    bounds = even_bounds(total, parts)
    assert [b for b, _ in bounds[1:]] == [e for _, e in bounds[:-1]]
    assert (bounds[0][0], bounds[-1][1]) == (0, total)
    assert max(e - b for b, e in bounds) - min(e - b for b, e in bounds) <= 1


@given(st.lists(st.floats(0, 100), min_size=1, max_size=6), st.integers(1, 3))
def test_longest_first_is_within_its_bound(costs: list[float], workers: int) -> None:
    assigned = longest_first(costs, workers)
    assert sorted(i for items in assigned for i in items) == list(range(len(costs)))
    best = min(
        max(sum(c for c, w in zip(costs, choice, strict=True) if w == worker) for worker in range(workers))
        for choice in product(range(workers), repeat=len(costs))
    )
    assert max(sum(costs[i] for i in items) for items in assigned) <= (4 / 3 - 1 / (3 * workers)) * best + 1e-9


def test_longest_first_by_weight_and_ties() -> None:
    assert longest_first([6, 8, 8], 2, weights=[1, 1, 1.25]) == [[2], [1, 0]]
    assert longest_first([1, 1, 1], 2) == [[0, 2], [1]]
    with pytest.raises(ValueError, match="0 workers"):
        longest_first([1], 0)


def test_a_sample_is_python_s_own_shuffle_seeded_with_its_size() -> None:
    # random.Random(3).shuffle(list(range(10))), as published; a change would ask other documents.
    assert chosen(3, 10).tolist() == chosen("3", 10).tolist() == chosen(0.3, 10).tolist()
    assert len(np.unique(chosen(3, 10))) == 3
    assert chosen(3, 10).tolist() == [1, 5, 6]
