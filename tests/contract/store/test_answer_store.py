"""What every answer store promises, on disk or in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest

from proctor.records import Boundary, EngineInfo, Failure, Response
from proctor.store import Owner, Store

WEIGHTS, RESOLUTION, OTHER = "a1" * 32, "0" * 16, "1" * 16


def key(name: object) -> str:
    return hashlib.sha256(str(name).encode()).hexdigest()


def response(name: object, physical: object = None, **more: object) -> Response:
    return Response(key=key(name), physical_key=key(("p", physical or name)), **more)  # type: ignore[arg-type]


def failure(name: object, *, retryable: bool) -> Failure:
    return Failure(key=key(name), boundary=Boundary.TRANSPORT, message="time-out", retryable=retryable)


@pytest.fixture(params=[Store.open], ids=["on disk"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    make: Callable[[Path], Store] = request.param
    return make(tmp_path / "store")


async def test_what_is_appended_is_read(store: Store) -> None:
    engine = EngineInfo(engine="fake", version="1")
    one, two = response(1, text="a\nb", engine_id=engine.id), response(2, logprob=-1.5, is_greedy=True)
    async with store.writer(WEIGHTS, RESOLUTION, owner=Owner.here()) as writer:
        await writer.engine(engine)
        await writer.append(one)
        await writer.append_many([two, failure(3, retryable=True)])
    answers = store.answers(WEIGHTS, RESOLUTION)
    assert answers.read([key(3), key(2), key(1), key(0)]) == {
        key(3): failure(3, retryable=True),
        key(2): two,
        key(1): one,
    }
    assert answers.engines() == {engine.id: engine}
    assert store.weights() == [WEIGHTS]


async def test_a_writer_need_not_read_what_it_writes(store: Store) -> None:
    async with (
        store.writer(WEIGHTS, RESOLUTION, owner=Owner.here()) as mine,
        store.writer(WEIGHTS, RESOLUTION, owner=Owner.here()) as other,
    ):
        await mine.append(response(1))
        await other.append(response(2))
        answers = store.answers(WEIGHTS, RESOLUTION, without=mine)
        assert answers.owed([key(1), key(2), key(3), key(4)]) == [key(1), key(3), key(4)]
        await mine.append(response(3))
        await other.append(response(4))
        answers.refresh()
        assert answers.owed([key(1), key(2), key(3), key(4)]) == [key(1), key(3)]
    assert store.answers(WEIGHTS, RESOLUTION).owed([key(1), key(3)]) == []


async def test_owed_is_what_can_still_be_answered(store: Store) -> None:
    async with store.writer(WEIGHTS, RESOLUTION, owner=Owner.here()) as writer:
        await writer.append_many([response(1), failure(2, retryable=True), failure(3, retryable=False)])
    answers = store.answers(WEIGHTS, RESOLUTION)
    assert answers.owed([key(n) for n in range(5)]) == [key(0), key(2), key(4)]
    assert answers.failed([key(n) for n in range(5)]) == [key(3)]
    assert answers.owed([]) == []


async def test_weights_and_resolutions_do_not_mix(store: Store) -> None:
    async with store.writer(WEIGHTS, RESOLUTION, owner=Owner.here()) as writer:
        await writer.append(response(1))
    other_resolution, other_weights = store.answers(WEIGHTS, OTHER), store.answers("b2" * 32, RESOLUTION)
    assert not other_resolution.answered(key(1))
    assert other_resolution.physical_of([response(1).physical_key])
    assert not other_weights.answered(key(1))
    assert not other_weights.physical_of([response(1).physical_key])


async def test_an_alias_answers_with_what_is_there(store: Store) -> None:
    async with store.writer(WEIGHTS, RESOLUTION, owner=Owner.here()) as writer:
        await writer.append(response(1, text="shared"))
        await writer.alias(key(2), response(1).physical_key)
    answers = store.answers(WEIGHTS, RESOLUTION)
    assert answers.read([key(2)]) == {key(2): response(2, 1, text="shared")}


async def test_the_first_answer_stays_and_success_beats_failure(store: Store) -> None:
    for answer in (failure(1, retryable=False), response(1, text="first"), response(1, text="second")):
        async with store.writer(WEIGHTS, RESOLUTION, owner=Owner.here()) as writer:
            await writer.append(answer)
    answers = store.answers(WEIGHTS, RESOLUTION)
    assert answers.read([key(1)]) == {key(1): response(1, text="first")}
    assert answers.duplicates == 1
    assert answers.failure(key(1)) is None


async def test_a_snapshot_moves_only_when_refreshed(store: Store) -> None:
    answers = store.answers(WEIGHTS, RESOLUTION)
    async with store.writer(WEIGHTS, RESOLUTION, owner=Owner.here()) as writer:
        await writer.append(response(1))
        assert not answers.answered(key(1))
        answers.refresh()
        assert answers.answered(key(1))


async def test_claims_do_not_overlap(store: Store) -> None:
    one, two = (store.ledger(WEIGHTS, owner=Owner.here()) for _ in range(2))
    first = await one.claim([key(1), key(2)])
    second = await two.claim([key(2), key(3)])
    assert (first.granted, second.granted) == ((key(1), key(2)), (key(3),))
    assert second.deferred == {first.seq: (key(2),)}
    await one.finish(first)
    assert await two.wait(first.seq or 0, timeout_s=5)
    assert (await two.claim([key(2)])).granted == (key(2),)
