import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from proctor.plan import CostModel, OwedTask, cut_shards


def owed(fingerprint: str, costs: list[float], documents: list[int] | None = None) -> OwedTask:
    n = len(costs)
    return OwedTask(
        fingerprint=fingerprint,
        ordinals=np.arange(n),
        documents=np.array(documents if documents is not None else range(n), dtype=np.int64),
        cost_s=np.array(costs, dtype=np.float64),
    )


@given(
    st.lists(st.floats(0.001, 500), max_size=60),
    st.lists(st.floats(0.001, 500), max_size=60),
    st.integers(1, 9),
)
def test_every_owed_request_is_in_exactly_one_shard(a: list[float], b: list[float], workers: int) -> None:
    shards = cut_shards("m", [owed("a", a), owed("b", b)], workers=workers, max_requests=7)
    items = [item for shard in shards for item in shard.items]
    assert sorted(items) == sorted([("a", i) for i in range(len(a))] + [("b", i) for i in range(len(b))])
    assert all(0 < len(s.items) <= 7 for s in shards)
    # Costs are whole microseconds, so that everybody cuts alike.
    assert sum(round(s.cost_s * 1e6) for s in shards) == sum(round(cost * 1e6) for cost in a + b)


def test_long_documents_first_and_their_choices_together() -> None:
    shards = cut_shards("m", [owed("t", [1, 1, 5, 4, 2, 2], [0, 0, 1, 1, 2, 2])], min_s=100)
    assert [o for _, o in shards[0].items] == [2, 3, 4, 5, 0, 1]


def test_shards_shrink_towards_the_end() -> None:
    shards = cut_shards("m", [owed("t", [1.0] * 1000)], workers=4)
    costs = [s.cost_s for s in shards]
    assert costs == sorted(costs, reverse=True)
    assert costs[0] == 125
    assert costs[-1] <= 2


def test_cost_counts_prompt_and_expected_answer() -> None:
    model = CostModel(prefill_tokens_s=100, decode_tokens_s=10, request_s=0.5, decode_share=0.5)
    assert model.seconds(np.array([400]), np.array([20])).tolist() == [0.5 + 1 + 1]
