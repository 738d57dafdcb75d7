"""Which way of scoring costs a server least: the counts, and that no way is taken that cannot be cheaper."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proctor.infer.costs import (
    CACHED_ECHO,
    ECHO,
    NEXT_TOKEN,
    Costs,
    by_cost,
    cached_echo_cost,
    divided,
    echo_cost,
    places_cost,
    same_context,
)
from proctor.infer.engine import Passage
from proctor.infer.next_tokens import places


def of(context: int, *lengths: int) -> list[Passage]:
    shared = tuple(range(context))
    return [
        Passage(token_ids=(*shared, *(1000 * (i + 1) + j for j in range(n))), scored=n) for i, n in enumerate(lengths)
    ]


@pytest.mark.parametrize(
    ("passages", "costs", "by_places"),
    [
        (of(500, 1, 1, 1, 1), Costs(), True),
        (of(500, 1, 1, 1, 1), Costs(cached=False), True),  # one request: no cache is needed
        (of(1000, 4, 2, 6, 3), Costs(), True),
        (of(1000, 4, 2, 6, 3), Costs(cached=False), False),
        (of(1000, 4, 2, 6, 3), Costs(block=2048), False),  # the context never fills a block
        (of(60, 25, 25, 25, 25), Costs(), False),
        (of(500, 3), Costs(), False),  # nothing to share
        (of(500, 1), Costs(), True),  # only the last place needs its logits
    ],
)
def test_next_tokens_where_they_cost_less_than_echo(passages: list[Passage], costs: Costs, by_places: bool) -> None:
    assert (NEXT_TOKEN in by_cost(passages, costs)) is by_places
    assert (places_cost(places(passages), costs) < echo_cost(passages, costs)) is by_places


@pytest.mark.parametrize(
    ("passages", "costs", "before", "way"),
    [
        (of(60, 25, 25, 25, 25), Costs(), 0, CACHED_ECHO),
        (of(1000, 40, 40), Costs(), 0, CACHED_ECHO),
        (of(1000, 4, 2, 6, 3), Costs(), 0, CACHED_ECHO),  # four requests, where next tokens take sixteen
        (of(500, 1, 1, 1, 1), Costs(), 0, NEXT_TOKEN),  # one request
        (of(60, 25, 25, 25, 25), Costs(cached=False), 0, ECHO),
        (of(60, 25, 25, 25, 25), Costs(block=128), 0, ECHO),
        (of(64, 25, 25, 25, 25), Costs(block=32), 0, CACHED_ECHO),  # with a request for the first tokens
        (of(65, 25, 25, 25, 25), Costs(block=32), 0, CACHED_ECHO),
        (of(500, 30), Costs(), 0, ECHO),  # nothing to share
        (of(500, 30), Costs(), 15, ECHO),  # not a whole block
        (of(500, 30), Costs(), 400, CACHED_ECHO),  # the examples of the question before
    ],
)
def test_the_cheapest_way(passages: list[Passage], costs: Costs, before: int, way: str) -> None:
    assert by_cost(passages, costs, before=before)[0] == way


def test_what_is_often_echoed_after_all_is_echoed_at_once() -> None:
    passages = of(60, 25, 25, 25, 25)
    assert by_cost(passages, Costs(), again=0.2)[0] == CACHED_ECHO
    assert by_cost(passages, Costs(), again=0.5) == [ECHO]
    long = of(1000, 4, 2, 6, 3)
    assert by_cost(long, Costs(), again=0.5, next_tokens=False) == [CACHED_ECHO, ECHO]
    assert by_cost(long, Costs(), again=0.9, next_tokens=False) == [ECHO]
    assert by_cost(long, Costs(), again=0.5)[0] == CACHED_ECHO, (
        "what it does not say costs little: the context is there"
    )


def test_the_tokens_that_cached_echo_computes() -> None:
    passages = of(70, 10, 20)  # 64 of the context's 70 are kept
    assert cached_echo_cost(passages, Costs(request=0)) == 80 + (6 + 20)
    assert cached_echo_cost(passages, Costs(request=0), before=40) == 80 - 32 + (6 + 20)
    assert cached_echo_cost(passages, Costs(request=5)) == 80 + (6 + 20) + 10
    assert cached_echo_cost(of(10, 3), Costs()) == math.inf
    # All of the context is kept, and a request computes it that asks for the first tokens.
    assert cached_echo_cost(of(64, 10, 20, 1), Costs(request=0)) == math.inf
    assert cached_echo_cost(of(64, 10, 20, 1), Costs(request=0), next_tokens=True) == 64 + (10 + 20)
    assert cached_echo_cost(of(64, 10, 20, 1), Costs(request=5), next_tokens=True) == 64 + 5 + (10 + 20) + 2 * 5
    assert cached_echo_cost(of(64, 10, 20, 1), Costs(request=0), before=40, next_tokens=True) == 64 - 32 + (10 + 20)


def test_a_passage_is_divided_after_its_first_scored_token() -> None:
    assert divided(Passage(token_ids=(1, 2, 3, 4), scored=2)) == (
        Passage(token_ids=(1, 2, 3), scored=1),
        Passage(token_ids=(1, 2, 3, 4), scored=1),
    )
    assert divided(Passage(token_ids=(1, 2, 3), scored=1)) == (Passage(token_ids=(1, 2, 3), scored=1), None)


@given(
    st.integers(1, 300),
    st.lists(st.integers(1, 40), min_size=1, max_size=6),
    st.sampled_from([1, 16, 32, 128]),
    st.booleans(),
    st.integers(0, 300),
)
def test_echo_is_the_last_and_nothing_dearer_is_named(
    context: int, lengths: list[int], block: int, cached: bool, before: int
) -> None:
    costs, passages = Costs(block=block, cached=cached), of(context, *lengths)
    found = by_cost(passages, costs, before=min(before, context))
    assert found[-1] == ECHO
    assert len(set(found)) == len(found)
    if not cached:
        assert CACHED_ECHO not in found


def test_contexts_are_compared_token_by_token() -> None:
    assert same_context(Passage(token_ids=(1, 2, 3), scored=1), Passage(token_ids=(1, 2, 4, 5), scored=2))
    assert not same_context(Passage(token_ids=(1, 2, 3), scored=1), Passage(token_ids=(1, 3, 3), scored=1))
    assert not same_context(Passage(token_ids=(1, 2, 3), scored=1), Passage(token_ids=(1, 2, 3), scored=2))
